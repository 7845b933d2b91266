// The law and the token rule against sorting and scanning in float64; and the same bits on every machine.
#include "law.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <vector>

#include "couple_tokens.hpp"
#include "kernels.hpp"
#include "random.hpp"
#include "verify_logits.hpp"

using namespace specfast;

namespace {

const LawLoops& loops = scalar_kernels().law;
const float kUnknown = std::numeric_limits<float>::quiet_NaN();
int failures = 0;

void expect(bool held, const char* what, uint64_t round) {
  if (held) return;
  std::printf("FAILED %s in round %llu\n", what, static_cast<unsigned long long>(round));
  failures++;
}

double draw(uint64_t round, uint32_t position) {
  return uniform(20221130, round, position, Purpose::draft);
}

/// Laws, sums and draws are defined without fused or reordered arithmetic: this hash is the same on every machine.
constexpr uint64_t kExpectedBits = 0x101af4c0a8fd048b;
uint64_t bits_hash = 14695981039346656037u;

void hash(const void* data, size_t bytes) {
  for (size_t i = 0; i < bytes; i++)
    bits_hash = (bits_hash ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
}

std::vector<float> random_logits(uint64_t round, int32_t V) {
  std::vector<float> x(static_cast<size_t>(V));
  const double scale = draw(round, 1) < 0.1 ? 1e30 : 12.0;
  const double steps = draw(round, 2) < 0.3 ? 4.0 : 1e9;  // few distinct values: ties
  for (size_t i = 0; i < x.size(); i++) {
    const double u = draw(round, static_cast<uint32_t>(i) + 100);
    x[i] = static_cast<float>((std::floor(u * steps) / steps - 0.5) * scale);
    if (draw(round, 3) < 0.2 && u > 0.8) x[i] = -std::numeric_limits<float>::infinity();
  }
  x[0] = 0.0f;
  return x;
}

Law random_law(uint64_t round, int32_t V) {
  Law law;
  law.temperature = static_cast<float>(0.1 + 1.9 * draw(round, 10));
  if (draw(round, 11) < 0.6) law.top_k = static_cast<int32_t>(draw(round, 12) * (V + 2));
  if (draw(round, 13) < 0.4) law.top_p = static_cast<float>(1.0 - draw(round, 14));
  if (draw(round, 15) < 0.3) law.min_p = static_cast<float>(draw(round, 16));
  if (draw(round, 17) < 0.3) law.vocab_limit = static_cast<int32_t>(draw(round, 18) * (V + 2));
  return law;
}

/// Against the definition by sorting, with a margin for tokens whose place is decided by rounding.
void check_law(uint64_t round, int32_t V, LawScratch& scratch) {
  const std::vector<float> x = random_logits(round, V);
  const Law law = random_law(round, V);
  std::vector<float> p(x.size(), -1.0f);
  expect(law_row(loops, x.data(), V, kUnknown, law, p.data(), scratch) == LawStatus::ok, "status", round);
  hash(p.data(), p.size() * sizeof(float));

  static VerifyScratch team_scratch;
  std::vector<float> shared_p(x.size(), -1.0f);
  const double u = draw(round, 19);
  int32_t token = -1;
  const auto prepare = [&](int threads) { team_scratch.reserve(threads, V, law); };
  ThreadPool::instance().run(round % 3 == 0, prepare, [&](const Team& team) {
    const int32_t drawn = draw_row(loops, team, x.data(), V, kUnknown, law, u, shared_p.data(),
                                   team_scratch.laws[size_t(team.id)], team_scratch.shared);
    if (team.id == 0) token = drawn;
  });
  expect(std::equal(p.begin(), p.end(), shared_p.begin()), "a team writes the same law", round);
  expect(token == sample_token(loops, p.data(), V, u), "a team draws the same token", round);

  const int32_t n = law.limit(V);
  std::vector<int32_t> rank(static_cast<size_t>(n));
  std::iota(rank.begin(), rank.end(), 0);
  std::stable_sort(rank.begin(), rank.end(), [&](int32_t a, int32_t b) { return x[size_t(a)] > x[size_t(b)]; });
  const size_t k = law.top_k > 0 && law.top_k < n ? static_cast<size_t>(law.top_k) : rank.size();
  const double highest = static_cast<double>(x[size_t(rank[0])]);
  double before = 0, total = 0, kept_total = 0;
  std::vector<double> weight(x.size(), 0.0);
  for (size_t i = 0; i < k; i++) {
    weight[size_t(rank[i])] =
        std::exp((static_cast<double>(x[size_t(rank[i])]) - highest) / static_cast<double>(law.temperature));
    total += weight[size_t(rank[i])];
  }
  constexpr double kSlack = 1e-5;
  for (size_t i = 0; i < k; i++) {  // what must and what may be kept
    const size_t id = static_cast<size_t>(rank[i]);
    const bool must = before < (static_cast<double>(law.top_p) - kSlack) * total &&
                      weight[id] > (1 + kSlack) * static_cast<double>(law.min_p) && weight[id] > 1e-37;
    const bool may = before < (static_cast<double>(law.top_p) + kSlack) * total &&
                     weight[id] >= (1 - kSlack) * static_cast<double>(law.min_p);
    if (must) expect(p[id] > 0, "a token was lost", round);
    if (!may) expect(p[id] == 0, "a token was kept", round);
    before += weight[id];
    if (p[id] > 0) kept_total += weight[id];
  }
  for (size_t i = 0; i < p.size(); i++) {
    const double expected = p[i] > 0 ? weight[i] / kept_total : 0.0;
    expect(std::fabs(static_cast<double>(p[i]) - expected) <= 2e-5 * expected + 2e-38, "probability", round);
  }
  expect(argmax_row(loops, x.data(), n) == rank[0], "arg max", round);
}

void check_rule(uint64_t round, int32_t V, LawScratch& scratch) {
  const int32_t gamma = 1 + static_cast<int32_t>(draw(round, 20) * 6);
  const size_t width = static_cast<size_t>(V);
  std::vector<float> p(width * static_cast<size_t>(gamma + 1)), q(width * static_cast<size_t>(gamma)), logits;
  const Law law = round % 2 ? random_law(round, V) : Law{};
  std::vector<int32_t> tokens;
  std::vector<double> u;
  for (int32_t i = 0; i <= gamma; i++) {
    std::vector<float> x = random_logits(round * 32 + static_cast<uint64_t>(i), V);
    logits.insert(logits.end(), x.begin(), x.end());
    law_row(loops, x.data(), V, kUnknown, law, p.data() + width * static_cast<size_t>(i), scratch);
    u.push_back(uniform(1, round, static_cast<uint32_t>(i), Purpose::accept));
    if (i == gamma) break;
    for (float& value : x) value *= 0.75f;
    law_row(loops, x.data(), V, kUnknown, law, q.data() + width * static_cast<size_t>(i), scratch);
    tokens.push_back(
        sample_token(loops, q.data() + width * static_cast<size_t>(i), V, draw(round, 30 + static_cast<uint32_t>(i))));
  }
  const double lenience = draw(round, 40) < 0.5 ? 1.0 : 0.5 + 1.5 * draw(round, 41);
  const bool certain = draw(round, 42) < 0.3;
  const Verdict verdict =
      verify_tokens(loops, p.data(), V, certain ? nullptr : q.data(), V, tokens.data(), gamma, u.data(), lenience);
  hash(&verdict, sizeof verdict);
  static VerifyScratch verify;
  const Verdict direct =
      verify_logits(loops, round % 3 == 0, logits.data(), V, nullptr, law, certain ? nullptr : q.data(), V,
                    tokens.data(), gamma, u.data(), lenience, verify);
  expect(direct.tau == verdict.tau && direct.next_token == verdict.next_token, "the verdict from logits", round);

  const auto same = [](const Verdict& a, const Verdict& b) { return a.tau == b.tau && a.next_token == b.next_token; };
  const Verdict block = verify_block(loops, p.data(), V, q.data(), V, tokens.data(), gamma, u.data());
  hash(&block, sizeof block);
  expect(same(block, verify_logits_block(loops, round % 3 == 0, logits.data(), V, nullptr, law, q.data(), V,
                                         tokens.data(), gamma, u.data(), verify)),
         "the block verdict from logits", round);
  std::vector<int32_t> drafted;  // by the noise that the target will see
  for (int32_t i = 0; i < gamma; i++)
    drafted.push_back(
        couple_tokens(loops, q.data() + width * static_cast<size_t>(i), V, nullptr, 0, round, static_cast<uint64_t>(i))
            .next_token);
  const Verdict coupled = couple_tokens(loops, p.data(), V, drafted.data(), gamma, round, 0);
  const double noise = noise_of(round, 7, V);
  hash(&coupled, sizeof coupled);
  hash(&noise, sizeof noise);
  expect(same(coupled, couple_logits(loops, round % 3 == 0, logits.data(), V, nullptr, law, drafted.data(), gamma,
                                     round, 0, verify)),
         "the coupled verdict from logits", round);

  int32_t tau = 0;
  std::vector<double> left(width);
  for (; tau <= gamma; tau++) {
    const float* row = p.data() + width * static_cast<size_t>(tau);
    for (size_t i = 0; i < width; i++) left[i] = static_cast<double>(row[i]);
    if (tau == gamma) break;
    const size_t x = static_cast<size_t>(tokens[static_cast<size_t>(tau)]);
    const auto q_of = [&](size_t i) {
      return certain ? (i == x ? 1.0 : 0.0) : static_cast<double>(q[width * static_cast<size_t>(tau) + i]);
    };
    if (u[static_cast<size_t>(tau)] * q_of(x) < lenience * left[x]) continue;
    for (size_t i = 0; i < width; i++)
      left[i] = lenience <= 1 ? left[i] - std::min(q_of(i), lenience * left[i]) : std::max(left[i] - q_of(i), 0.0);
    break;
  }
  expect(verdict.tau == tau, "tau", round);
  const double total = std::accumulate(left.begin(), left.end(), 0.0);
  const size_t next = static_cast<size_t>(verdict.next_token);
  expect(verdict.next_token >= 0 && next < width && (left[next] > 0 || total == 0), "next token", round);
  const double below = std::accumulate(left.begin(), left.begin() + static_cast<std::ptrdiff_t>(next), 0.0),
               wanted = u.back() * total;
  expect(total == 0 || (below <= wanted + 1e-12 * total && wanted <= below + left[next] + 1e-12 * total), "inverse CDF",
         round);
}

void check_edges() {
  std::vector<float> x(3000, 1.0f);
  x[2999] = std::numeric_limits<float>::quiet_NaN();
  expect(argmax_row(loops, x.data(), 3000) == -1, "NaN has no arg max", 0);
  expect(argmax_row(loops, x.data(), 2999) == 0, "arg max below the limit", 0);
  x[2999] = -x[2999];
  expect(argmax_row(loops, x.data(), 3000) == -1, "-NaN has no arg max", 0);
  x[2999] = x[1500] = std::numeric_limits<float>::infinity();
  expect(argmax_row(loops, x.data(), 3000) == 1500, "the first infinity", 0);
  expect(argmax_row(loops, x.data(), 0) == -1, "the arg max of nothing", 0);

  LawScratch scratch;
  std::vector<float> p(3000, 5.0f);
  expect(law_row(loops, x.data(), 3000, kUnknown, Law{}, p.data(), scratch) == LawStatus::not_finite && p[7] == 0,
         "not finite", 0);
  std::fill(x.begin(), x.end(), -std::numeric_limits<float>::infinity());
  expect(law_row(loops, x.data(), 3000, kUnknown, Law{}, p.data(), scratch) == LawStatus::empty && p[7] == 0, "empty",
         0);

  const float target[] = {0.25f, 0.75f, 0.5f, 0.5f}, draft[] = {0.5f, 0.5f};
  const double u[] = {0.0, 0.2};
  for (const int32_t outside : {-1, 2, 1 << 30}) {
    for (const float* q : {draft, static_cast<const float*>(nullptr)}) {
      const Verdict verdict = verify_tokens(loops, target, 2, q, q ? 2 : 0, &outside, 1, u, 1.0);
      expect(verdict.tau == 0 && verdict.next_token == (q ? 1 : 0), "a token outside the vocabulary", 0);
    }
  }
  const int32_t best[] = {4, 5, 6}, drafted[] = {4, 7};
  expect(verify_greedy(best, drafted, 2).tau == 1 && verify_greedy(best, drafted, 2).next_token == 5, "greedy", 0);
  expect(verify_greedy(best, best, 2).tau == 2 && verify_greedy(best, best, 2).next_token == 6, "greedy bonus", 0);
}

}  // namespace

int main(int argc, char** argv) {
  ThreadPool::instance().set_size(3);
  const uint64_t rounds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 300;
  check_edges();
  LawScratch scratch;
  for (uint64_t round = 0; round < rounds; round++) {
    const double size = draw(round, 0);
    const int32_t V = 1 + static_cast<int32_t>(size * size * size * (round % 16 ? 700 : 60000));
    check_law(round, V, scratch);
    check_rule(round, V, scratch);
    if (round == 299) expect(bits_hash == kExpectedBits, "the same bits on every machine", round);
    if (round == 299) std::printf("bits %016llx\n", static_cast<unsigned long long>(bits_hash));
  }
  std::printf("law_test: %d failures\n", failures);
  return failures ? 1 : 0;
}

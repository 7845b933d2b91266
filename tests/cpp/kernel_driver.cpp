// Checks every kernel table this CPU can run, without Python: against float64 definitions, the scalar table, and itself
// at other row and thread counts. Runs natively, under an emulator, and with sanitizers. Exit code 0 when all holds.
//
//   kernel_driver [--full] [isa]     --full checks more shapes; isa checks one table only
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <tuple>

#include "attend_rows.hpp"
#include "decoder.hpp"
#include "dispatch.hpp"
#include "errors.hpp"
#include "random.hpp"
#include "thread_pool.hpp"

using namespace specfast;

namespace {

int failures = 0, checks = 0;
bool full = false;

void expect(bool ok, const char* isa, const std::string& what) {
  checks++;
  if (ok) return;
  if (failures++ < 20) std::fprintf(stderr, "FAILED %s: %s\n", isa, what.c_str());
}

std::mt19937 generator(7);
float gaussian() {
  return std::normal_distribution<float>()(generator);
}

float widen_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
uint16_t cut_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

/// A random matrix that owns its memory, with its values in float64. Vectors are exactly as long as the format needs,
/// so that a sanitizer sees every read beyond them.
struct OwnedMatrix {
  Matrix view;
  std::vector<uint8_t> weight, scales, biases;
  std::vector<double> values;
};

OwnedMatrix random_matrix(Format format, int N, int K, int group, Format scale_format) {
  OwnedMatrix m;
  m.view.format = format;
  m.view.N = N;
  m.view.K = K;
  m.values.resize(static_cast<size_t>(N) * K);
  const float spread = 1.0f / std::sqrt(static_cast<float>(K));
  if (!is_quantised(format)) {
    m.weight.resize(static_cast<size_t>(N) * m.view.row_bytes());
    for (size_t i = 0; i < m.values.size(); i++) {
      const float x = gaussian() * spread;
      if (format == Format::bf16) {
        const uint16_t h = cut_bf16(x);
        std::memcpy(&m.weight[2 * i], &h, 2);
        m.values[i] = widen_bf16(h);
      } else if (format == Format::f16) {
        const uint16_t h = static_cast<uint16_t>(0x2000 + generator() % 0x1000 + (generator() % 2 ? 0x8000 : 0));
        std::memcpy(&m.weight[2 * i], &h, 2);
        const double magnitude = std::ldexp(1.0 + (h & 1023) / 1024.0, ((h >> 10) & 31) - 15);
        m.values[i] = h & 0x8000 ? -magnitude : magnitude;
      } else {
        std::memcpy(&m.weight[4 * i], &x, 4);
        m.values[i] = x;
      }
    }
  } else {
    m.view.group = group;
    m.view.scale_format = scale_format;
    const int levels = format == Format::q4 ? 16 : 256;
    m.weight.resize(static_cast<size_t>(N) * m.view.row_bytes());
    const size_t groups = static_cast<size_t>(N) * m.view.groups();
    m.scales.resize(groups * m.view.scale_bytes());
    m.biases.resize(m.scales.size());
    std::vector<double> s(groups), b(groups);
    const auto put = [&](std::vector<uint8_t>& to, size_t i, float x) {
      if (scale_format == Format::f32) {
        std::memcpy(&to[4 * i], &x, 4);
        return static_cast<double>(x);
      }
      const uint16_t h = cut_bf16(x);
      std::memcpy(&to[2 * i], &h, 2);
      return static_cast<double>(widen_bf16(h));
    };
    for (size_t i = 0; i < groups; i++) {
      s[i] = put(m.scales, i,
                 (0.5f + static_cast<float>(generator() % 100) / 100.0f) * spread / static_cast<float>(levels) * 4);
      b[i] = put(m.biases, i, static_cast<float>(-s[i]) * static_cast<float>(levels) * 0.47f);
    }
    for (int n = 0; n < N; n++) {
      for (int k = 0; k < K; k++) {
        const uint32_t q = generator() % static_cast<uint32_t>(levels);
        uint8_t& byte = m.weight[static_cast<size_t>(n) * m.view.row_bytes() +
                                 static_cast<size_t>(format == Format::q4 ? k / 2 : k)];
        byte = static_cast<uint8_t>(format == Format::q4 ? byte | (q << (4 * (k % 2))) : q);
        const size_t g = static_cast<size_t>(n) * m.view.groups() + static_cast<size_t>(k / group);
        m.values[static_cast<size_t>(n) * K + k] = s[g] * q + b[g];
      }
    }
  }
  m.view.weight = m.weight.data();
  m.view.scales = m.scales.data();
  m.view.biases = m.biases.data();
  return m;
}

std::vector<float> multiply(const KernelTable& kernels, const Matrix& w, const std::vector<float>& x, int M,
                            Precision precision) {
  RowsBuffer buffer(w.K);
  const Needs needs = needs_of({&w}, precision);
  buffer.reserve(needs);
  const Rows rows = buffer.view(M);
  for (int m = 0; m < M; m++)
    std::copy_n(&x[static_cast<size_t>(m) * w.K], w.K, rows.f32 + static_cast<size_t>(m) * rows.stride);
  prepare_rows(Team{}, kernels, rows, needs);
  std::vector<float> scratch(matmul_scratch_floats(w.K)), y(static_cast<size_t>(M) * w.N);
  kernels.matmul_rows(w, rows, activation_of(w, precision), 0, w.N, y.data(), w.N, {}, scratch.data());
  return y;
}

void check_matmul(const KernelTable& kernels, const OwnedMatrix& m, Precision precision, double tolerance) {
  const Matrix& w = m.view;
  std::vector<float> x(static_cast<size_t>(kTileRows) * w.K);
  for (float& value : x) value = gaussian();
  const std::vector<float> y = multiply(kernels, w, x, kTileRows, precision);
  double error = 0, norm = 0;
  for (int r = 0; r < kTileRows; r++) {
    for (int n = 0; n < w.N; n++) {
      double exact = 0;
      for (int k = 0; k < w.K; k++)
        exact += m.values[static_cast<size_t>(n) * w.K + k] * x[static_cast<size_t>(r) * w.K + k];
      error += std::pow(exact - y[static_cast<size_t>(r) * w.N + n], 2);
      norm += exact * exact;
    }
  }
  const std::string name = "matmul format " + std::to_string(static_cast<int>(w.format)) + " group " +
                           std::to_string(w.group) + " N " + std::to_string(w.N) + " K " + std::to_string(w.K) +
                           " precision " + std::to_string(static_cast<int>(precision));
  expect(std::sqrt(error / norm) < tolerance, kernels.isa, name + " error " + std::to_string(std::sqrt(error / norm)));
  for (int M = 1; M < kTileRows; M += full ? 1 : 1 + M / 3) {
    const std::vector<float> part = multiply(kernels, w, x, M, precision);
    expect(!std::memcmp(part.data(), y.data(), part.size() * 4), kernels.isa,
           name + " differs at M = " + std::to_string(M));
  }
  if (precision == Precision::int8 && is_quantised(w.format)) {
    const std::vector<float> scalar = multiply(scalar_kernels(), w, x, kTileRows, precision);
    expect(!std::memcmp(scalar.data(), y.data(), y.size() * 4), kernels.isa, name + " differs from the scalar bits");
  }
}

/// Rows of zeros, subnormal, huge and infinite numbers, NaN and ties become int8 as the scalar table has them.
void check_special_values(const KernelTable& kernels) {
  const float huge = 3e38f, infinity = HUGE_VALF;
  for (const Format format : {Format::q4, Format::q8}) {
    for (const int group : {32, 64}) {
      const OwnedMatrix m = random_matrix(format, 16, 2 * group, group, Format::f32);
      std::vector<float> x(static_cast<size_t>(kTileRows * m.view.K));
      for (size_t i = 0; i < x.size(); i++) {
        const float values[] = {0.0f, gaussian() * 1e-40f, gaussian() * huge,
                                static_cast<float>(generator() % 254) / 2};
        x[i] = values[i / static_cast<size_t>(m.view.K) % 4];
        if (values[3] == 5.0f) x[i] = i % 3 ? 127.0f : i % 2 ? -infinity : NAN;
      }
      for (int k = 0; k < m.view.K; k += 32) x[static_cast<size_t>(3 * m.view.K + k)] = 127.0f;  // a scale of 1: ties
      const std::vector<float> y = multiply(kernels, m.view, x, kTileRows, Precision::int8);
      const std::vector<float> scalar = multiply(scalar_kernels(), m.view, x, kTileRows, Precision::int8);
      bool same = true;
      for (size_t i = 0; i < y.size(); i++)
        same &= !std::memcmp(&y[i], &scalar[i], 4) || (std::isnan(y[i]) && std::isnan(scalar[i]));
      expect(same, kernels.isa, "special values at group " + std::to_string(group));
    }
  }
}

void check_matmuls(const KernelTable& kernels) {
  for (const Format format : {Format::q4, Format::q8}) {
    for (const int group : {32, 64, 128}) {
      for (const auto& [N, K] :
           {std::pair{37, 3 * group}, std::pair{16, group}, std::pair{64, 256}, std::pair{5, 640}}) {
        if (!full && N != 37 && N != 16) continue;
        for (const Format scales : {Format::bf16, Format::f32}) {
          const OwnedMatrix m = random_matrix(format, N, K, group, scales);
          check_matmul(kernels, m, Precision::int8, 0.02);
          check_matmul(kernels, m, Precision::bf16, 0.006);
          check_matmul(kernels, m, Precision::f32, 1e-5);
        }
      }
    }
  }
  for (const Format format : {Format::bf16, Format::f16, Format::f32}) {
    for (const auto& [N, K] : {std::pair{16, 64}, std::pair{37, 100}, std::pair{3, 33}}) {
      const OwnedMatrix m = random_matrix(format, N, K, 0, Format::f32);
      check_matmul(kernels, m, Precision::bf16, format == Format::f32 ? 1e-5 : 0.006);
      check_matmul(kernels, m, Precision::f32, 1e-5);
    }
  }
}

/// What a vector becomes in 8 bits.
void round_vector(float* x, int n) {
  float largest = 0;
  for (int i = 0; i < n; i++) largest = std::max(largest, std::fabs(x[i]));
  for (int i = 0; i < n; i++) x[i] = std::rint(x[i] * (127.0f / largest)) * (largest / 127.0f);
}

/// What a group of a vector becomes in affine codes.
void round_group(float* x, int n, int bits) {
  const float least = *std::min_element(x, x + n), largest = *std::max_element(x, x + n);
  const float far = -least > largest ? least : largest;
  float step = std::max((largest - least) / static_cast<float>((1 << bits) - 1), 1e-7f);
  if (!(-least > largest)) step = -step;
  if (const float steps = std::rint(far / step); steps != 0) step = far / steps;
  const float bias = std::rint(far / step) != 0 ? far : 0;
  for (int i = 0; i < n; i++) {
    const float code = std::min(std::max(std::rint((x[i] - bias) / step), 0.0f), static_cast<float>((1 << bits) - 1));
    x[i] = code * step + bias;
  }
}

/// Attention of M rows at the end of S positions against float64 on what the cache rounds to.
void check_attention(const KernelTable& kernels, KvFormat format, int dim, int S, int M, Window window, int bits = 0) {
  const int heads = 6, kv_heads = 2, group = bits ? 32 : 0;
  const KvShape shape{1, kv_heads, dim, format, bits, group};
  KvCache cache(shape, {window}, S);
  cache.append(S);
  const auto random_rows = [&](int rows, int columns) {
    std::vector<float> x(static_cast<size_t>(rows) * columns);
    for (float& value : x) value = format == KvFormat::bf16 ? widen_bf16(cut_bf16(gaussian())) : gaussian();
    return x;
  };
  const std::vector<float> q = random_rows(M, heads * dim);
  std::vector<float> k = random_rows(S, kv_heads * dim), v = random_rows(S, kv_heads * dim);
  for (int i = 0; i < S; i++) {
    for (int h = 0; h < kv_heads; h++) {
      const size_t at = static_cast<size_t>((i * kv_heads + h) * dim);
      kernels.append_head(cache.page(i / kPagePositions, 0, h), &k[at], &v[at], dim, cache.shape().padded_dim(),
                          i % kPagePositions);
    }
  }
  Attention a;
  a.heads = heads;
  a.M = M;
  a.position = S - M;
  a.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  std::vector<float> partial(Attention::partial_floats(cache, heads, M, S - M)), out(q.size());
  a.q = q.data();
  a.q_stride = a.out_stride = heads * dim;
  a.partial = partial.data();
  a.out = out.data();
  std::vector<float> wide(shape.wide_page_floats());
  a.wide = wide.data();
  attend_rows(Team{}, kernels, cache, a);

  if (format == KvFormat::int8) {
    for (std::vector<float>* x : {&k, &v}) {
      for (size_t at = 0; at < x->size(); at += static_cast<size_t>(dim)) round_vector(&(*x)[at], dim);
    }
  }
  for (std::vector<float>* x : {&k, &v}) {
    for (size_t at = 0; bits && at < x->size(); at += 32) round_group(&(*x)[at], 32, bits);
  }
  double worst = 0;
  for (int m = 0; m < M; m++) {
    const int end = S - M + m + 1, begin = window.size ? std::max(0, end - static_cast<int>(window.size)) : 0;
    for (int head = 0; head < heads; head++) {
      const float* query = &q[static_cast<size_t>((m * heads + head) * dim)];
      const size_t kv_head = static_cast<size_t>(head / (heads / kv_heads) * dim);
      std::vector<double> exact(static_cast<size_t>(dim));
      double total = 0;
      for (int i = 0; i < end; i++) {
        if (i >= window.sinks && i < begin) continue;
        const size_t at = static_cast<size_t>(i * kv_heads * dim) + kv_head;
        double score = 0;
        for (int d = 0; d < dim; d++) score += static_cast<double>(query[d]) * k[at + static_cast<size_t>(d)];
        const double weight = std::exp(score * a.scale);
        total += weight;
        for (int d = 0; d < dim; d++) exact[static_cast<size_t>(d)] += weight * v[at + static_cast<size_t>(d)];
      }
      for (int d = 0; d < dim; d++)
        worst = std::max(worst, std::fabs(exact[static_cast<size_t>(d)] / total -
                                          out[static_cast<size_t>((m * heads + head) * dim + d)]));
    }
  }
  expect(worst < (format == KvFormat::f32 || bits ? 3e-5
                  : format == KvFormat::bf16      ? 0.01
                                                  : 4e-4),
         kernels.isa,
         "attention of head " + std::to_string(dim) + ", " + std::to_string(S) + " positions, window " +
             std::to_string(window.size) + ", sinks " + std::to_string(window.sinks) + ": error " +
             std::to_string(worst));
}

void check_attentions(const KernelTable& kernels) {
  for (const KvFormat format : {KvFormat::bf16, KvFormat::f32, KvFormat::int8}) {
    for (const int dim : {6, 16, 80, 128}) {
      for (const auto& [S, M] : {std::pair{3, 3}, std::pair{270, 16}, std::pair{1300, 6}}) {
        if (!full && S == 1300 && dim != 16) continue;
        for (const Window window : {Window{0}, {1}, {5}, {258}, {700}, {1, 4}, {5, 1}, {258, 4}, {700, 300}})
          check_attention(kernels, format, dim, S, M, window);
      }
    }
  }
  for (const int bits : {4, 8}) {
    for (const int dim : {32, 96, 128}) {
      for (const Window window : {Window{0}, {5}, {258, 4}})
        check_attention(kernels, KvFormat::affine, dim, 270, 6, window, bits);
    }
  }
}

/// A tiny model whose matrices are owned here.
struct TinyModel {
  std::vector<OwnedMatrix> matrices;
  std::shared_ptr<Model> model = std::make_shared<Model>();
};

TinyModel tiny_model(const KernelTable& kernels, Format format, Precision precision, KvFormat kv) {
  TinyModel tiny;
  tiny.matrices.reserve(64);
  Model& m = *tiny.model;
  m.hidden = 128;
  m.heads = 4;
  m.kv_heads = 2;
  m.head_dim = 32;
  m.intermediate = 192;
  m.vocab = 131;
  m.max_context = 600;
  m.precision = precision;
  m.kv_format = kv;
  m.kernels = &kernels;
  for (int i = 0; i < m.head_dim / 2; i++) m.rope_inv_freq.push_back(std::pow(10000.0f, -static_cast<float>(i) / 16));
  const auto matrix = [&](int N, int K) {
    tiny.matrices.push_back(random_matrix(format, N, K, 64, Format::bf16));
    return tiny.matrices.back().view;
  };
  const std::vector<float> ones(static_cast<size_t>(m.hidden), 1.0f);
  m.embed = m.head = matrix(m.vocab, m.hidden);
  m.norm = ones;
  for (int i = 0; i < 2; i++) {
    LayerWeights w;
    w.q = matrix(m.q_columns(), m.hidden);
    w.k = matrix(m.kv_columns(), m.hidden);
    w.v = matrix(m.kv_columns(), m.hidden);
    w.o = matrix(m.hidden, m.q_columns());
    w.gate = matrix(m.intermediate, m.hidden);
    w.up = matrix(m.intermediate, m.hidden);
    w.down = matrix(m.hidden, m.intermediate);
    w.input_norm = w.post_norm = ones;
    if (i == 0) w.q_bias.assign(static_cast<size_t>(m.q_columns()), 0.1f);
    if (i == 1) w.q_norm.assign(static_cast<size_t>(m.head_dim), 1.0f);
    if (i == 1) w.window = 100;
    m.layers.push_back(w);
  }
  m.check();
  return tiny;
}

std::vector<float> run_in_steps(const TinyModel& tiny, const std::vector<int32_t>& tokens, int step, int threads) {
  ThreadPool::instance().set_size(threads);
  Sequence sequence(tiny.model, 0 + tiny.model->max_context);
  std::vector<float> logits;
  for (size_t i = 0; i < tokens.size(); i += static_cast<size_t>(step)) {
    const int n = static_cast<int>(std::min(tokens.size() - i, static_cast<size_t>(step)));
    sequence.forward(&tokens[i], n, n, tiny.model->vocab);
    sequence.cache().commit(n);
    logits.insert(logits.end(), sequence.logits(), sequence.logits() + static_cast<size_t>(n) * tiny.model->vocab);
  }
  return logits;
}

void check_decoder(const KernelTable& kernels) {
  for (const auto& [format, precision, kv] : {std::tuple{Format::q4, Precision::int8, KvFormat::bf16},
                                              std::tuple{Format::q8, Precision::int8, KvFormat::int8},
                                              std::tuple{Format::bf16, Precision::bf16, KvFormat::bf16},
                                              std::tuple{Format::f32, Precision::f32, KvFormat::f32}}) {
    const TinyModel tiny = tiny_model(kernels, format, precision, kv);
    std::vector<int32_t> tokens(270);  // across a page
    for (int32_t& token : tokens) token = static_cast<int32_t>(generator() % 131);
    const std::vector<float> one = run_in_steps(tiny, tokens, 1, 1);
    for (const int step : {5, 21, 2, 9, 16, 270}) {
      for (const int threads : {2, 1, 3}) {
        if (!full && (step < 5 || step == 9 || threads == 3)) continue;
        expect(
            run_in_steps(tiny, tokens, step, threads) == one, kernels.isa,
            "decoder: " + std::to_string(step) + " rows and " + std::to_string(threads) + " threads give other bits");
      }
    }
    // Speculation with a drafter that is sometimes right, greedy: the tokens are the plain ones.
    ThreadPool::instance().set_size(2);
    const Law greedy{0.0f};
    std::vector<int32_t> plain{tokens[0]}, guessed{tokens[0]};
    Sequence a(tiny.model, 600), b(tiny.model, 600);
    while (plain.size() < 60) {
      const Verdict verdict = a.verify(&plain.back(), 1, {}, greedy, 1.0, 0, 0);
      a.cache().commit(1);
      plain.push_back(verdict.next_token);
    }
    while (guessed.size() < 60) {
      Proposal proposal;
      for (int i = 0; i < 5; i++) {
        const size_t at = guessed.size() + static_cast<size_t>(i);
        proposal.tokens.push_back(generator() % 4 && at < plain.size() ? plain[at]
                                                                       : static_cast<int32_t>(generator() % 131));
      }
      const Verdict verdict = b.verify(&guessed.back(), 1, proposal, greedy, 1.0, 0, 0);
      b.cache().commit(1 + verdict.tau);
      guessed.insert(guessed.end(), proposal.tokens.begin(), proposal.tokens.begin() + verdict.tau);
      guessed.push_back(verdict.next_token);
    }
    guessed.resize(plain.size());
    expect(guessed == plain, kernels.isa, "greedy speculation changed the tokens");
    // Sampling runs, and a full context is refused with the cache as it was.
    const Law sampled{0.9f, 40, 0.95f, 0.01f, 0};
    Proposal drafted;
    Sequence c(tiny.model, 30);
    c.draft(tokens.data(), 20, 4, sampled, 1, 0, drafted);
    expect(drafted.gamma() == 4 && c.cache().length() == 20 && c.cache().provisional() == 3, kernels.isa,
           "draft leaves the cache wrong");
    c.cache().commit(0);
    bool refused = false;
    try {
      c.forward(tokens.data(), 11, 0, 131);
    } catch (const ContextFullError&) {
      refused = true;
    }
    expect(refused && c.cache().length() == 20 && c.cache().provisional() == 0, kernels.isa,
           "a full context is not refused cleanly");
  }
}

/// The loops over logits and laws give the scalar table's bits, and a mass that is one ulp off is seen.
void check_law_loops(const KernelTable& kernels) {
  const LawLoops &loops = kernels.law, &plain = scalar_kernels().law;
  const auto same = [&](const auto& a, const auto& b, const char* what) {
    expect(a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0, kernels.isa, what);
  };
  for (const int n : {0, 1, 15, 16, 17, 63, 64, 65, 200, 255, 256, 1000}) {
    const size_t size = static_cast<size_t>(n);
    std::vector<float> x(size), q(size), w(size), plain_w(size), p(size), plain_p(size);
    for (float& value : x) value = generator() % 9 ? 30.0f * gaussian() : -INFINITY;
    for (float& value : q) value = std::fabs(gaussian()) * 0.5f;
    const float highest = loops.highest(x.data(), n);
    expect(highest == plain.highest(x.data(), n), kernels.isa, "highest");
    for (const float inverse : {1.0f, 1.25f, 0.01f, 3e38f}) {
      loops.weigh(x.data(), n, std::max(highest, 0.0f), inverse, w.data());
      plain.weigh(x.data(), n, std::max(highest, 0.0f), inverse, plain_w.data());
      same(w, plain_w, "weigh");
      loops.normalise(w.data(), n, 0.7, p.data());
      plain.normalise(w.data(), n, 0.7, plain_p.data());
      same(p, plain_p, "normalise");
      if (n > kChunk) continue;
      for (const double kept : {0.5, 1.0})
        for (const double prefix : {1.0, 0.3})
          expect(loops.residual_mass(w.data(), 0.7, q.data(), prefix, kept, n) ==
                     plain.residual_mass(w.data(), 0.7, q.data(), prefix, kept, n),
                 kernels.isa, "residual_mass");
      const double mass = plain.mass(p.data(), n);
      expect(loops.mass(p.data(), n) == mass, kernels.isa, "mass");
      if (n == 0 || mass == 0) continue;
      float& largest = *std::max_element(p.begin(), p.end());
      largest = std::nextafter(largest, 2.0f);
      expect(loops.mass(p.data(), n) != mass, kernels.isa, "a mass that is off");
    }
    for (const float least : {-INFINITY, 0.0f, 40.0f, 1e9f}) {
      std::vector<int32_t> ids(size + 16), plain_ids(size + 16);
      const int count = loops.at_least(x.data(), n, least, ids.data());
      expect(count == plain.at_least(x.data(), n, least, plain_ids.data()), kernels.isa, "at_least");
      ids.resize(static_cast<size_t>(count));
      same(ids, plain_ids, "at_least's ids");
    }
    std::vector<uint32_t> words(size / kNoiseGroup * kNoiseGroup), plain_words(words.size());
    loops.noise(~0ull - 7, (1ull << 40) + 3, 5, n / kNoiseGroup, words.data());
    plain.noise(~0ull - 7, (1ull << 40) + 3, 5, n / kNoiseGroup, plain_words.data());
    same(words, plain_words, "noise");
    for (size_t i = 0; i < words.size(); i++)
      expect(words[i] ==
                 noise_word(~0ull - 7, (1ull << 40) + 3, 5 * kNoiseGroup + static_cast<int32_t>(i), Purpose::noise),
             kernels.isa, "a word of noise");
    for (const float bound : {0.0f, 1e4f, 1e8f, 1e12f, INFINITY}) {
      const int most = static_cast<int>(words.size());
      expect(loops.any_within(words.data(), w.data(), most, bound) ==
                 plain.any_within(words.data(), w.data(), most, bound),
             kernels.isa, "any_within");
    }
    if (n == 0) continue;
    x[generator() % size] = generator() % 2 ? NAN : -NAN;
    expect(std::isnan(loops.highest(x.data(), n)), kernels.isa, "highest of NaN");
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::string only;
  for (int i = 1; i < argc; i++) {
    if (std::string(argv[i]) == "--full") {
      full = true;
    } else {
      only = argv[i];
    }
  }
  expect(philox({0, 0, 0, 0}, 0).word[0] == 0x6627e8d5u, "any", "Philox4x32-10 known answer");
  std::string why;
  const KernelTable* best = find_kernels("", &why);
  std::printf("best: %s\n", best ? best->isa : why.c_str());
  for (const IsaEntry& entry : compiled_isas()) {
    if (!only.empty() && only != entry.table->isa) continue;
    if (!entry.supported) {
      std::printf("%s: not run, this CPU lacks %s\n", entry.table->isa, entry.table->features);
      continue;
    }
    const int before = checks;
    check_matmuls(*entry.table);
    check_special_values(*entry.table);
    check_attentions(*entry.table);
    check_decoder(*entry.table);
    check_law_loops(*entry.table);
    std::printf("%s: %d checks\n", entry.table->isa, checks - before);
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}

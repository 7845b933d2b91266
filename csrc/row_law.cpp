// Masses and draws in float64, in an order that neither the instruction set, nor the threads, nor a list changes.
#include "row_law.hpp"

#include <algorithm>

namespace specfast {
namespace {

inline float rounded(float weight, double scale) noexcept {
  return static_cast<float>(static_cast<double>(weight) * scale);
}

/// c p - min(q, kept c p), c the prefix. NaN stays NaN.
inline double left_of(float p, const Drafted& drafted, int32_t id) noexcept {
  const double mass = drafted.prefix * static_cast<double>(p), most = drafted.kept * mass, q = drafted(id);
  return mass - (most < q ? most : q);
}

/// What LawLoops::mass sums in lanes: one chunk's, added element by element.
struct Lanes {
  double sum[kSumLanes] = {};

  void add(int32_t i, double mass) noexcept { sum[i % kSumLanes] += mass; }
  double total() noexcept {
    for (int32_t n = kSumLanes / 2; n > 0; n /= 2) {
      for (int32_t j = 0; j < n; j++) sum[j] += sum[j + n];
    }
    return sum[0];
  }
};

/// Calls f(first, n, p) for the chunks of [first, last) of a law without a list.
template <class F>
void for_chunks(const LawLoops& loops, const RowLaw& row, int32_t first, int32_t last, const F& f) noexcept {
  float buffer[kChunk];
  last = std::min(last, row.count);
  for (int32_t i = first; i < last; i += kChunk) {
    const int32_t n = std::min(kChunk, last - i);
    f(i, n, chunk_of(loops, row, i, n, buffer));
  }
}

double block_mass(const LawLoops& loops, const RowLaw& row, const Drafted& drafted, int32_t first,
                  int32_t last) noexcept {
  float buffer[kChunk], padded[kChunk];
  double total = 0;
  last = std::min(last, row.count);
  for (int32_t i = first; i < last; i += kChunk) {
    const int32_t n = std::min(kChunk, last - i);
    const bool touched = drafted.q ? i < drafted.Vq : i <= drafted.token && drafted.token < i + n;
    if (!touched && drafted.prefix == 1.0) {
      total += loops.mass(chunk_of(loops, row, i, n, buffer), n);
      continue;
    }
    const float* q = drafted.q ? drafted.q + i : nullptr;
    if (drafted.q && n <= drafted.Vq - i) {
      constexpr int32_t kDistance = 4 * kChunk;
      for (int32_t j = kDistance; j < kDistance + kChunk && i + j < drafted.Vq; j += 16) __builtin_prefetch(q + j);
    } else {
      for (int32_t j = 0; j < n; j++) padded[j] = static_cast<float>(drafted(i + j));
      q = padded;
    }
    const float* weights = weights_of(loops, row, i, n, buffer);
    total += loops.residual_mass(weights, row.scale, q, drafted.prefix, drafted.kept, n);
  }
  return total;
}

/// block_masses of a list: chunk by chunk in the order of a law without one, whose other ids add zeros.
void list_masses(const RowLaw& row, const Drafted& drafted, const Blocks& blocks, int32_t first, int32_t last,
                 double* mass) noexcept {
  const int32_t *end = row.ids + row.count, *id = std::lower_bound(row.ids, end, blocks.first(first));
  std::fill(mass + first, mass + last, 0.0);
  while (id < end && *id / blocks.size < last) {
    const int32_t chunk = *id / kChunk, block = *id / blocks.size;
    Lanes lanes;
    for (; id < end && *id / kChunk == chunk; id++)
      lanes.add(*id, left_of(rounded(row.weights[id - row.ids], row.scale), drafted, *id));
    mass[block] += lanes.total();
  }
}

}  // namespace

const float* weights_of(const LawLoops& loops, const RowLaw& row, int32_t first, int32_t n, float* buffer) noexcept {
  if (row.weights) return row.weights + first;
  float* out = row.store ? row.store + first : buffer;
  loops.weigh(row.logits + first, n, row.highest, row.inverse_temperature, out);
  return out;
}

const float* chunk_of(const LawLoops& loops, const RowLaw& row, int32_t first, int32_t n, float* buffer) noexcept {
  const float* weights = weights_of(loops, row, first, n, buffer);
  if (row.scale == 1.0) return weights;
  loops.normalise(weights, n, row.scale, buffer);
  return buffer;
}

float RowLaw::probability(const LawLoops& loops, int32_t id) const noexcept {
  if (ids) {
    const int32_t* found = std::lower_bound(ids, ids + count, id);
    return found < ids + count && *found == id ? rounded(weights[found - ids], scale) : 0.0f;
  }
  float p;
  return id >= 0 && id < count ? *chunk_of(loops, *this, id, 1, &p) : 0.0f;
}

void block_masses(const LawLoops& loops, const RowLaw& row, const Drafted& drafted, const Blocks& blocks, int32_t first,
                  int32_t last, double* mass) noexcept {
  if (row.ids) return list_masses(row, drafted, blocks, first, last, mass);
  for (int32_t b = first; b < last; b++) mass[b] = block_mass(loops, row, drafted, blocks.first(b), blocks.last(b));
}

int32_t pick_token(const LawLoops& loops, const RowLaw& row, const Drafted& drafted, const Blocks& blocks,
                   const double* mass, double u) noexcept {
  const double total = blocks.total(mass);
  if (!(total > 0)) return -1;

  const double wanted = u * total;
  double before = 0, running = 0;
  int32_t block = -1;  // the one that holds the token: without rounding the first to pass `wanted`
  for (int32_t b = 0; b < blocks.count && (block < 0 || !(running > wanted)); b++) {
    if (!(mass[b] > 0)) continue;
    block = b;
    before = running;
    running += mass[b];
  }
  int32_t token = -1;
  const auto passes = [&](int32_t id, float p) {
    const double left = left_of(p, drafted, id);
    if (!(left > 0) || (token >= 0 && before > wanted)) return;
    token = id;
    before += left;
  };
  const int32_t first = blocks.first(block), last = blocks.last(block);
  if (row.ids) {
    const int32_t* id = std::lower_bound(row.ids, row.ids + row.count, first);
    for (; id < row.ids + row.count && *id < last; id++) passes(*id, rounded(row.weights[id - row.ids], row.scale));
  } else {
    for_chunks(loops, row, first, last, [&](int32_t i, int32_t n, const float* p) {
      for (int32_t j = 0; j < n; j++) passes(i + j, p[j]);
    });
  }
  return token;
}

int32_t draw_token(const LawLoops& loops, const RowLaw& row, const Drafted& drafted, int32_t V, double u) noexcept {
  const Blocks blocks(V);
  double mass[Blocks::kMost];
  block_masses(loops, row, drafted, blocks, 0, blocks.count, mass);
  return pick_token(loops, row, drafted, blocks, mass, u);
}

}  // namespace specfast

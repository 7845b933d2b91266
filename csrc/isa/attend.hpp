// Attention over one page, written once over the vector primitives: keys and values are read once for all rows and
// heads.
#pragma once

namespace {

constexpr int kQueries = 4;                      // queries that share each key and value load
constexpr int kBatch = 16;                       // queries that share a page in the first-level cache
constexpr int kHeldVecs = kLanes >= 16 ? 4 : 2;  // vectors of scores, or of values, held per query
constexpr int kWhole = kLanes > 2 ? kLanes : 2;  // positions whose weights are made together

/// Fetches the next page while this one is multiplied: every step of a dot asks for its share.
struct Ahead {
  const char* at;
  ptrdiff_t share;  // bytes

  void step() {
    __builtin_prefetch(at, 0, 2);
    if (share > 64) {
      SPECFAST_UNROLL
      for (int j = 1; j < kHeldVecs; j++) __builtin_prefetch(at + j * share / kHeldVecs, 0, 2);
    }
    at += share;
  }
};

/// Scores of Q queries (rows of q, head_dim apart) against kHeldVecs vectors of positions of a K tile, into rows of s,
/// kPagePositions apart.
template <class Kv, int Q>
inline void score_keys(const typename Kv::Factor* q, const typename Kv::Element* tile, int lane, int head_dim,
                       const float* scales, const float* key_scales, float* s, Ahead& ahead) {
  Ahead fetch = ahead;
  typename Kv::Sum acc[Q][kHeldVecs];
  SPECFAST_UNROLL
  for (int i = 0; i < Q; i++) {
    SPECFAST_UNROLL
    for (int j = 0; j < kHeldVecs; j++) acc[i][j] = Kv::nothing();
  }
  for (int d = 0; d < head_dim; d += 2) {
    fetch.step();
    typename Kv::Pair key[kHeldVecs];
    SPECFAST_UNROLL
    for (int j = 0; j < kHeldVecs; j++) key[j] = Kv::keys(tile, d, lane + j * kLanes);
    SPECFAST_UNROLL
    for (int i = 0; i < Q; i++) {
      const typename Kv::Pair query = Kv::both(q + i * head_dim + d);
      SPECFAST_UNROLL
      for (int j = 0; j < kHeldVecs; j++) acc[i][j] = Kv::dot(acc[i][j], query, key[j]);
    }
  }
  SPECFAST_UNROLL
  for (int i = 0; i < Q; i++) {
    SPECFAST_UNROLL
    for (int j = 0; j < kHeldVecs; j++)
      store(s + i * kPagePositions + lane + j * kLanes, Kv::score(acc[i][j], scales[i], key_scales, lane + j * kLanes));
  }
  ahead = fetch;
}

/// Turns scores into weights exp(s - max), as they are multiplied, where max is that of this page and those before it,
/// stats[0]; adds their sum to stats[1]. Returns what the sums of the pages before count now. Positions outside
/// [begin, valid) weigh nothing; their scores are overwritten.
template <class Kv>
inline float softmax_page(float* s, int begin, int valid, bool first_page, const float* value_scales, float* stats,
                          typename Kv::Factor* weights, float* step) {
  const int first = begin / kWhole * kWhole;
  for (int i = first; i < begin; i++) s[i] = s[begin];
  Vec best = broadcast(first_page ? s[begin] : stats[0]);
  for (int i = first; i < valid; i += kLanes) best = max(best, keep(load(s + i), valid - i, s[begin]));
  const float top = maximum(best);
  const Vec shift = broadcast(top);
  Vec total = zero();
  for (int i = first; i < (valid + 1) / 2 * 2; i += kLanes) {
    Vec e = keep(exp(sub(load(s + i), shift)), valid - i, 0.0f);
    if (i < begin) e = sub(e, keep(e, begin - i, 0.0f));
    if constexpr (Kv::kExact) {
      total = add(total, e);
      store(s + i, keep(mul(e, load(value_scales + i)), valid - i, 0.0f));
    } else {
      total = add(total, Kv::weigh(e, weights + i));
    }
  }
  if constexpr (Kv::kExact) {
    for (int i = first; i < begin; i++) s[i] = 0.0f;
    std::memset(weights, 0, kPagePositions * sizeof(*weights));
    *step = round_to_ints(s + first, valid - first, Kv::kWeightTop, weights + first);
  }
  alignas(64) float e[kLanes];
  store(e, exp(broadcast(first_page ? 0.0f : stats[0] - top)));
  stats[1] = sum(total) + (first_page ? 0.0f : stats[1] * e[0]);
  stats[0] = top;
  return e[0];
}

/// acc[i] += sum over positions [first, last) of weight * value, for Q queries and VECS vectors of dimensions from d on
/// of a slice of `width` dimensions; `first` is even.
template <class Kv, int Q, int VECS>
inline void weigh_vectors(const typename Kv::Factor (*weights)[kPagePositions], const float* steps,
                          const typename Kv::Element* slice, int width, int d, int first, int last, float* const* acc,
                          Ahead& ahead) {
  Ahead fetch = ahead;
  typename Kv::Sum a[Q][VECS];
  SPECFAST_UNROLL
  for (int i = 0; i < Q; i++) {
    SPECFAST_UNROLL
    for (int j = 0; j < VECS; j++) a[i][j] = Kv::resume(acc[i] + d + j * kLanes);
  }
  const auto step = [&](int position, auto values) {
    fetch.step();
    typename Kv::Pair value[VECS];
    SPECFAST_UNROLL
    for (int j = 0; j < VECS; j++)
      value[j] = values(slice + static_cast<size_t>(position) * static_cast<size_t>(width), d + j * kLanes);
    SPECFAST_UNROLL
    for (int i = 0; i < Q; i++) {
      const typename Kv::Pair weight = Kv::both(weights[i] + position);
      SPECFAST_UNROLL
      for (int j = 0; j < VECS; j++) a[i][j] = Kv::dot(a[i][j], weight, value[j]);
    }
  };
  int position = first;
  for (; position + 2 <= last; position += 2)
    step(position, [=](const typename Kv::Element* at, int dim) { return Kv::values(at, width, dim); });
  if constexpr (!Kv::kExact) {
    if (position < last)  // what lies in the other half of the pair is no value yet
      step(position, [=](const typename Kv::Element* at, int dim) { return Kv::first_values(at, width, dim); });
  }
  SPECFAST_UNROLL
  for (int i = 0; i < Q; i++) {
    SPECFAST_UNROLL
    for (int j = 0; j < VECS; j++) Kv::keep_sum(acc[i] + d + j * kLanes, a[i][j], steps[i]);
  }
  ahead = fetch;
}

/// The same for a whole slice; acc points at its first dimension.
template <class Kv, int Q>
inline void weigh_values(const typename Kv::Factor (*weights)[kPagePositions], const float* steps,
                         const typename Kv::Element* slice, int width, int first, int last, float* const* acc,
                         Ahead& ahead) {
  for (int d = 0; d < width; d += kHeldVecs * kLanes) {
    switch (smaller(kHeldVecs, (width - d) / kLanes)) {
      case 1: weigh_vectors<Kv, Q, 1>(weights, steps, slice, width, d, first, last, acc, ahead); break;
      case 2: weigh_vectors<Kv, Q, 2>(weights, steps, slice, width, d, first, last, acc, ahead); break;
      case 3:
        weigh_vectors<Kv, Q, kHeldVecs >= 3 ? 3 : 1>(weights, steps, slice, width, d, first, last, acc, ahead);
        break;
      default: weigh_vectors<Kv, Q, kHeldVecs>(weights, steps, slice, width, d, first, last, acc, ahead); break;
    }
  }
}

/// Calls f<Q>(first) for groups of kQueries and then for what is left.
template <class F>
inline void in_groups(int count, const F& f) {
  int i = 0;
  for (; i + kQueries <= count; i += kQueries) f.template operator()<kQueries>(i);
  switch (count - i) {
    case 3: return f.template operator()<3>(i);
    case 2: return f.template operator()<2>(i);
    case 1: return f.template operator()<1>(i);
  }
}

/// What a batch of queries knows of one page.
template <class Kv>
struct Batch {
  alignas(64) float s[kBatch][kPagePositions];  // scores
  alignas(64) typename Kv::Factor weights[kBatch][kPagePositions];
  alignas(64) typename Kv::Factor q[kBatch * kMaxHeadDim];
  float scales[kBatch], steps[kBatch];  // of scores, of weights
  float *stats[kBatch], *acc[kBatch];
  int begin[kBatch], valid[kBatch];  // keys [begin, valid) are seen
  bool first_page[kBatch];
};

/// Adds a slice of values to the accumulators of Q queries from i on. Positions that only some rows see are added to
/// those alone, in the same order.
template <class Kv, int Q>
inline void weigh_seen(Batch<Kv>& b, int i, const typename Kv::Element* slice, int width, Ahead& ahead) {
  int from = 0, to = kPagePositions;
  for (int other = i; other < i + Q; other++) {
    from = larger(from, (b.begin[other] + 1) / 2 * 2);
    to = smaller(to, b.valid[other] / 2 * 2);
  }
  to = larger(from, to);
  for (int other = i; other < i + Q; other++) {
    const int own = b.begin[other] / 2 * 2, end = smaller(from, b.valid[other]);
    if (own < end)
      weigh_values<Kv, 1>(b.weights + other, b.steps + other, slice, width, own, end, b.acc + other, ahead);
  }
  weigh_values<Kv, Q>(b.weights + i, b.steps + i, slice, width, from, to, b.acc + i, ahead);
  for (int other = i; other < i + Q; other++) {
    if (b.valid[other] > to)
      weigh_values<Kv, 1>(b.weights + other, b.steps + other, slice, width, to, b.valid[other], b.acc + other, ahead);
  }
}

/// The same where sums are exact: positions that a row does not see weigh nothing.
template <class Kv, int Q>
inline void weigh_all(Batch<Kv>& b, int i, const typename Kv::Element* slice, int width, Ahead& ahead) {
  int from = kPagePositions, to = 0;
  for (int other = i; other < i + Q; other++) {
    if (b.valid[other] == 0) continue;
    from = smaller(from, b.begin[other] / 2 * 2);
    to = larger(to, (b.valid[other] + 1) / 2 * 2);
  }
  weigh_values<Kv, Q>(b.weights + i, b.steps + i, slice, width, from, to, b.acc + i, ahead);
}

/// At most kBatch queries: query n is row n / group, head n % group.
template <class Kv>
void attend_batch(const AttendPage& args, int first_query, int queries, Ahead& ahead) {
  using Element = typename Kv::Element;
  Batch<Kv> b;
  int earliest = kPagePositions, longest = 0;
  for (int i = 0; i < queries; i++) {
    const int m = (first_query + i) / args.group, g = (first_query + i) % args.group;
    const float* from = args.q + m * args.q_stride + static_cast<int64_t>(g) * args.head_dim;
    b.scales[i] = args.scale * Kv::round_query(from, b.q + i * args.head_dim, args.head_dim);
    b.stats[i] = args.partial + m * args.partial_stride + static_cast<int64_t>(g) * (args.padded_dim + 2);
    b.acc[i] = b.stats[i] + 2;
    const int end = args.first_valid + m, start = end - args.window;
    const bool begins = args.window && start >= 0 && start > args.sinks;  // its window does, in this page or later
    b.first_page[i] = begins ? !args.sinks_done : args.first_page;
    b.begin[i] = begins ? start : 0;
    b.valid[i] = smaller(end, args.last_valid);
    if (b.begin[i] >= b.valid[i]) b.begin[i] = b.valid[i] = 0;
    if (b.valid[i] > longest) longest = b.valid[i];
    if (b.valid[i] > 0) earliest = smaller(earliest, b.begin[i]);
  }

  const int first_tile = earliest / kKeyTile * kKeyTile;
  const Element* tile = static_cast<const Element*>(args.kv.k) + args.head_dim * first_tile;
  for (int first = first_tile; first < longest; first += kKeyTile, tile += args.head_dim * kKeyTile) {
    const float* key_scales = Kv::kExact ? args.kv.k_scales + first : nullptr;
    for (int lane = 0; lane < kKeyTile && first + lane < longest; lane += kHeldVecs * kLanes) {
      in_groups(queries, [&]<int Q>(int i) {
        score_keys<Kv, Q>(b.q + i * args.head_dim, tile, lane, args.head_dim, b.scales + i, key_scales, b.s[i] + first,
                          ahead);
      });
    }
  }
  for (int i = 0; i < queries; i++) {
    if (b.valid[i] == 0) {  // nothing is seen, and whatever is added goes nowhere
      std::memset(b.weights[i], 0, sizeof(b.weights[i]));
      b.steps[i] = 0;
      if (Kv::kExact) b.acc[i] = b.s[0];
      continue;
    }
    const Vec before = broadcast(softmax_page<Kv>(b.s[i], b.begin[i], b.valid[i], b.first_page[i], args.kv.v_scales,
                                                  b.stats[i], b.weights[i], &b.steps[i]));
    for (int d = 0; d < args.padded_dim; d += kLanes)
      store(b.acc[i] + d, b.first_page[i] ? zero() : mul(load(b.acc[i] + d), before));
  }
  const Element* slice = static_cast<const Element*>(args.kv.v);
  for (int d = 0; d < args.padded_dim; d += kValueSlice) {
    const int width = smaller(kValueSlice, args.padded_dim - d);
    in_groups(queries, [&]<int Q>(int i) {
      if constexpr (Kv::kExact) {
        weigh_all<Kv, Q>(b, i, slice, width, ahead);
      } else {
        weigh_seen<Kv, Q>(b, i, slice, width, ahead);
      }
      for (int other = i; other < i + Q; other++) b.acc[other] += width;
    });
    slice += width * kPagePositions;
  }
}

template <class Kv>
void attend_all(const AttendPage& args) {
  const int queries = args.M * args.group;
  constexpr ptrdiff_t kStepBytes = sizeof(typename Kv::Element) * 2 * kHeldVecs * kLanes;
  Ahead ahead{static_cast<const char*>(args.next), kStepBytes / ((queries + kQueries - 1) / kQueries)};
  for (int n = 0; n < queries; n += kBatch) attend_batch<Kv>(args, n, smaller(kBatch, queries - n), ahead);
}

/// Codes become float32 first, once for all rows and heads.
void attend_codes(AttendPage args) {
  const int end = smaller(args.first_valid + args.M - 1, args.last_valid), start = args.first_valid - args.window;
  const int begin = args.window && start > args.sinks ? larger(start, 0) / 2 * 2 : 0;
  if (begin >= end) return;
  args.kv = widen_codes(args.kv, begin, end, args.head_dim, args.wide);
  attend_all<F32Kv>(args);
}

void attend_rows(const AttendPage& args) {
  switch (args.kv.format) {
    case KvFormat::bf16: return attend_all<Bf16Kv>(args);
    case KvFormat::f32: return attend_all<F32Kv>(args);
    case KvFormat::int8: return attend_all<Int8Kv>(args);
    case KvFormat::affine: return attend_codes(args);
  }
}

template <class Kv>
void append_head_as(const KvPage& page, const float* k, const float* v, int head_dim, int padded_dim, int position) {
  using Element = typename Kv::Element;
  alignas(64) Element keys[kMaxHeadDim], values[kMaxHeadDim];
  const float k_scale = Kv::round(k, keys, head_dim), v_scale = Kv::round(v, values, head_dim);
  if constexpr (Kv::kExact) {
    page.k_scales[position] = k_scale;
    page.v_scales[position] = v_scale;
  }
  Element* k_to =
      static_cast<Element*>(page.k) + position / kKeyTile * kKeyTile * head_dim + position % kKeyTile * Kv::kBeside;
  for (int d = 0; d < head_dim; d += Kv::kBeside)
    std::memcpy(k_to + d * kKeyTile, keys + d, Kv::kBeside * sizeof(Element));
  Element* slice = static_cast<Element*>(page.v);
  for (int d = 0; d < head_dim; d += kValueSlice) {
    const int width = smaller(kValueSlice, padded_dim - d);
    Element* v_to = slice + (position - position % Kv::kBeside) * width + position % Kv::kBeside;
    for (int i = 0; i < smaller(width, head_dim - d); i++) v_to[i * Kv::kBeside] = values[d + i];
    slice += width * kPagePositions;
  }
}

void append_head(const KvPage& page, const float* k, const float* v, int head_dim, int padded_dim, int position) {
  switch (page.format) {
    case KvFormat::bf16: return append_head_as<Bf16Kv>(page, k, v, head_dim, padded_dim, position);
    case KvFormat::f32: return append_head_as<F32Kv>(page, k, v, head_dim, padded_dim, position);
    case KvFormat::int8: return append_head_as<Int8Kv>(page, k, v, head_dim, padded_dim, position);
    case KvFormat::affine: return append_codes(page, k, v, head_dim, position);
  }
}

void merge_spans(const float* partial, int64_t stride, int spans, float* out, int head_dim) {
  constexpr int kSpans = 64;  // spans whose factors are held
  float top = partial[0], total = 0;
  for (int p = 1; p < spans; p++) top = partial[p * stride] > top ? partial[p * stride] : top;
  for (int first = 0; first < spans; first += kSpans) {
    const int count = smaller(kSpans, spans - first);
    const float* span = partial + first * stride;
    alignas(64) float factor[kSpans];
    for (int p = 0; p < count; p++) factor[p] = span[p * stride] - top;
    for (int p = 0; p < count; p += kLanes) store(factor + p, exp(load(factor + p)));
    for (int p = 0; p < count; p++) total += factor[p] * span[p * stride + 1];
    const Vec scale = broadcast(first + count == spans ? 1.0f / total : 1.0f);
    for (int d = 0; d < head_dim; d += kLanes) {
      const int part = smaller(kLanes, head_dim - d);
      Vec acc = first ? load_part(out + d, part) : zero();
      for (int p = 0; p < count; p++) acc = fma(broadcast(factor[p]), load(span + p * stride + 2 + d), acc);
      store_part(out + d, mul(acc, scale), part);
    }
  }
}

}  // namespace

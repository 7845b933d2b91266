// Attention over one page, written once over the vector primitives: keys and values are read once for all rows and
// heads.
#pragma once

namespace {

constexpr int kQueries = 4;                       // queries that share each key and value load
constexpr int kTileVecs = kKeyTile / kLanes;      // vectors of one K tile
constexpr int kValueVecs = kLanes >= 16 ? 4 : 2;  // value vectors held per query

inline Vec load_kv(const float* p) {
  return load(p);
}
inline Vec load_kv(const uint16_t* p) {
  return load_f16(p);
}

/// Scores of `Q` queries against the first `tiles` K tiles, each (256,) row of s.
template <int Q, class Element>
inline void score_tiles(const float* const* q, const Element* k, int head_dim, int tiles, float scale,
                        float (*s)[kPagePositions]) {
  for (int t = 0; t < tiles; t++) {
    Vec acc[Q][kTileVecs];
    SPECFAST_UNROLL
    for (int i = 0; i < Q; i++) {
      SPECFAST_UNROLL
      for (int j = 0; j < kTileVecs; j++) acc[i][j] = zero();
    }
    const Element* tile = k + static_cast<size_t>(t) * static_cast<size_t>(head_dim) * kKeyTile;
    for (int d = 0; d < head_dim; d++) {
      SPECFAST_UNROLL
      for (int j = 0; j < kTileVecs; j++) {
        const Vec key = load_kv(tile + d * kKeyTile + j * kLanes);
        SPECFAST_UNROLL
        for (int i = 0; i < Q; i++) acc[i][j] = fma(broadcast(q[i][d]), key, acc[i][j]);
      }
    }
    SPECFAST_UNROLL
    for (int i = 0; i < Q; i++) {
      SPECFAST_UNROLL
      for (int j = 0; j < kTileVecs; j++) store(&s[i][t * kKeyTile + j * kLanes], mul(acc[i][j], broadcast(scale)));
    }
  }
}

/// Turns scores into exp(s - max) in place; returns the sum, writes the maximum. Positions from `valid` on weigh
/// nothing.
inline float softmax_page(float* s, int valid, float* top) {
  Vec best = broadcast(s[0]);
  for (int i = 0; i < valid; i += kLanes) best = max(best, keep(load(s + i), valid - i, s[0]));
  *top = maximum(best);
  const Vec shift = broadcast(*top);
  Vec total = zero();
  for (int i = 0; i < valid; i += kLanes) {
    const Vec e = keep(exp(sub(load(s + i), shift)), valid - i, 0.0f);
    store(s + i, e);
    total = add(total, e);
  }
  return sum(total);
}

/// acc[i] += sum over keys [first, last) of s[i][key] * value, for Q queries and `kValueVecs` vectors of dimensions.
template <int Q, class Element>
inline void weigh_values(float (*s)[kPagePositions], const Element* v, int padded_dim, int first, int last,
                         float* const* acc) {
  for (int d = 0; d < padded_dim; d += kValueVecs * kLanes) {
    Vec a[Q][kValueVecs];
    SPECFAST_UNROLL
    for (int i = 0; i < Q; i++) {
      SPECFAST_UNROLL
      for (int j = 0; j < kValueVecs; j++)
        a[i][j] = d + j * kLanes < padded_dim ? load(acc[i] + d + j * kLanes) : zero();
    }
    for (int key = first; key < last; key++) {
      const Element* row = v + static_cast<size_t>(key) * static_cast<size_t>(padded_dim) + d;
      SPECFAST_UNROLL
      for (int j = 0; j < kValueVecs; j++) {
        if (d + j * kLanes >= padded_dim) continue;
        const Vec value = load_kv(row + j * kLanes);
        SPECFAST_UNROLL
        for (int i = 0; i < Q; i++) a[i][j] = fma(broadcast(s[i][key]), value, a[i][j]);
      }
    }
    SPECFAST_UNROLL
    for (int i = 0; i < Q; i++) {
      SPECFAST_UNROLL
      for (int j = 0; j < kValueVecs; j++)
        if (d + j * kLanes < padded_dim) store(acc[i] + d + j * kLanes, a[i][j]);
    }
  }
}

/// One group of Q queries: query n is row n / group, head n % group.
template <int Q, class Element>
void attend_queries(const AttendPage& args, int first_query) {
  alignas(64) float s[Q][kPagePositions];
  const float* q[Q];
  float* acc[Q];
  float* stats[Q];
  int valid[Q], longest = 0, shortest = kPagePositions;
  SPECFAST_UNROLL
  for (int i = 0; i < Q; i++) {
    const int m = (first_query + i) / args.group, g = (first_query + i) % args.group;
    q[i] = args.q + m * args.q_stride + static_cast<int64_t>(g) * args.head_dim;
    stats[i] = args.partial + m * args.partial_stride + static_cast<int64_t>(g) * (args.padded_dim + 2);
    acc[i] = stats[i] + 2;
    const int seen = args.first_valid + m;
    valid[i] = seen < 0 ? 0 : smaller(seen, kPagePositions);
    if (valid[i] > longest) longest = valid[i];
    shortest = smaller(shortest, valid[i]);
    for (int d = 0; d < args.padded_dim; d += kLanes) store(acc[i] + d, zero());
  }
  score_tiles<Q>(q, static_cast<const Element*>(args.kv.k), args.head_dim, (longest + kKeyTile - 1) / kKeyTile,
                 args.scale, s);
  SPECFAST_UNROLL
  for (int i = 0; i < Q; i++) {
    if (valid[i] > 0) stats[i][1] = softmax_page(s[i], valid[i], &stats[i][0]);
  }
  const Element* v = static_cast<const Element*>(args.kv.v);
  weigh_values<Q>(s, v, args.padded_dim, 0, shortest, acc);
  // Keys that only the later rows see are added to those alone, in the same order.
  SPECFAST_UNROLL
  for (int i = 0; i < Q; i++) {
    if (valid[i] > shortest) weigh_values<1>(&s[i], v, args.padded_dim, shortest, valid[i], &acc[i]);
  }
}

template <class Element>
void attend_all(const AttendPage& args) {
  const int queries = args.M * args.group;
  int n = 0;
  for (; n + kQueries <= queries; n += kQueries) attend_queries<kQueries, Element>(args, n);
  for (; n < queries; n++) attend_queries<1, Element>(args, n);
}

void attend_rows(const AttendPage& args) {
  if (args.kv.half) {
    attend_all<uint16_t>(args);
  } else {
    attend_all<float>(args);
  }
}

void merge_pages(const float* partial, int64_t stride, int pages, float* out, int head_dim, int padded_dim) {
  float top = partial[0];
  for (int p = 1; p < pages; p++) top = partial[p * stride] > top ? partial[p * stride] : top;
  float total = 0;
  for (int d = 0; d < head_dim; d += kLanes) {
    Vec acc = zero();
    total = 0;
    for (int p = 0; p < pages; p++) {
      const float* page = partial + p * stride;
      alignas(64) float factor[kLanes];
      store(factor, exp(broadcast(page[0] - top)));
      acc = fma(broadcast(factor[0]), load(page + 2 + d), acc);
      total += factor[0] * page[1];
    }
    store_part(out + d, mul(acc, broadcast(1.0f / total)), smaller(kLanes, head_dim - d));
  }
  (void)padded_dim;
}

}  // namespace

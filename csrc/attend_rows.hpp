// Attention over a cache, as the decoder's region and the operation by itself share it.
#pragma once

#include "kernels.hpp"
#include "kv_cache.hpp"
#include "thread_pool.hpp"

namespace specfast {

/// Causal attention of the M rows at positions position .. position + M - 1, whose keys and values are in the cache,
/// within the window of its layer.
struct Attention {
  int32_t layer = 0;
  int32_t heads = 0;
  int32_t M = 0;
  int64_t position = 0;
  float scale = 0;
  const float* q = nullptr;  // (M, heads, head_dim), rows q_stride apart
  int64_t q_stride = 0;
  float* wide = nullptr;     // KvShape::wide_page_floats() of this thread, for affine formats
  float* partial = nullptr;  // partial_floats(...): the spans from the first that row 0 sees
  float* out = nullptr;      // (M, heads, head_dim), rows out_stride apart
  int64_t out_stride = 0;

  /// What `partial` must hold for M rows from `position` on, in any layer.
  static size_t partial_floats(const KvCache& cache, int32_t heads, int32_t M, int64_t position);
};

/// Called by every thread of a team; `out` is complete for all of them after their next barrier.
void attend_rows(const Team& team, const KernelTable& kernels, const KvCache& cache, const Attention& attention);

}  // namespace specfast

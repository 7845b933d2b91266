// Causal attention of a tile over the cache, span by span: every page is read once for all rows and the heads of a
// group.
#include "attend_rows.hpp"

#include <algorithm>

#include "regions.hpp"

namespace specfast {

size_t Attention::partial_floats(const KvCache& cache, int32_t heads, int32_t M, int64_t position) {
  int64_t first = position;
  for (int layer = 0; layer < cache.shape().layers; layer++)
    first = std::min(first, cache.window(layer).first(position));
  const int64_t spans = (position + M - 1) / kSpanPositions - first / kSpanPositions + 1;
  return static_cast<size_t>(spans) * static_cast<size_t>(M) * static_cast<size_t>(heads) *
         static_cast<size_t>(cache.shape().padded_dim() + 2);
}

namespace {

/// Begins the partials of a span with the sinks, for those rows whose window begins in it and has left some position
/// behind the sinks.
void attend_sinks(const KernelTable& kernels, const KvCache& cache, const Attention& a, int64_t span, int32_t kv_head,
                  AttendPage args) {
  const Window& window = cache.window(a.layer);
  const auto is_here = [&](int32_t m) {
    const int64_t first = window.first(a.position + m);
    return first > 0 && first / kSpanPositions == span;
  };
  int32_t begin = 0;
  while (begin < a.M && !is_here(begin)) begin++;
  args.M = 0;
  while (begin + args.M < a.M && is_here(begin + args.M)) args.M++;
  if (args.M == 0) return;
  args.q += begin * args.q_stride;
  args.partial += begin * args.partial_stride;
  args.window = 0;
  for (int64_t first = 0; first < window.sinks; first += kPagePositions) {
    args.kv = cache.page(first / kPagePositions, a.layer, kv_head);
    args.first_page = first == 0;
    args.first_valid = args.last_valid = static_cast<int32_t>(std::min<int64_t>(window.sinks - first, kPagePositions));
    kernels.attend_rows(args);
  }
}

}  // namespace

void attend_rows(const Team& team, const KernelTable& kernels, const KvCache& cache, const Attention& a) {
  const KvShape& shape = cache.shape();
  const Window& window = cache.window(a.layer);
  const int32_t group = a.heads / shape.kv_heads;
  const int64_t head_stride = shape.padded_dim() + 2, row_stride = head_stride * a.heads;
  const int64_t span_stride = row_stride * a.M;
  const int32_t first_page = static_cast<int32_t>(window.first(a.position) / kPagePositions);
  const int32_t pages = static_cast<int32_t>((a.position + a.M - 1) / kPagePositions) + 1;
  const int32_t first_span = first_page / kSpanPages, spans = (pages - 1) / kSpanPages + 1 - first_span;
  const int32_t tasks = spans * shape.kv_heads;
  const auto begin = [&](int32_t span) { return std::max((first_span + span) * kSpanPages, first_page); };

  for (int32_t task = team.id; task < tasks; task += team.size) {
    const int32_t span = task / shape.kv_heads, kv_head = task % shape.kv_heads;
    const int32_t next_task = std::min(task + team.size, tasks - 1);
    const int32_t first = begin(span), last = std::min((first_span + span + 1) * kSpanPages, pages);
    AttendPage args;
    args.q = a.q + static_cast<int64_t>(kv_head) * group * shape.head_dim;
    args.q_stride = a.q_stride;
    args.partial = a.partial + span * span_stride + kv_head * group * head_stride;
    args.partial_stride = row_stride;
    args.M = a.M;
    args.group = group;
    args.head_dim = shape.head_dim;
    args.padded_dim = shape.padded_dim();
    args.window = static_cast<int32_t>(window.size);
    args.scale = a.scale;
    args.wide = a.wide;
    if (window.sinks) {
      args.next = cache.page(first, a.layer, kv_head).k;
      attend_sinks(kernels, cache, a, first_span + span, kv_head, args);
      args.sinks_done = true;
    }
    for (int32_t page = first; page < last; page++) {
      args.kv = cache.page(page, a.layer, kv_head);
      args.next = (page + 1 < last ? cache.page(page + 1, a.layer, kv_head)
                                   : cache.page(begin(next_task / shape.kv_heads), a.layer, next_task % shape.kv_heads))
                      .k;
      args.first_page = page == first;
      args.first_valid = static_cast<int32_t>(a.position + 1 - static_cast<int64_t>(page) * kPagePositions);
      args.sinks = static_cast<int32_t>(window.sinks - static_cast<int64_t>(page) * kPagePositions);
      kernels.attend_rows(args);
    }
  }
  team.barrier();

  for (int32_t i = team.id; i < a.M * a.heads; i += team.size) {
    const int32_t m = i / a.heads, head = i % a.heads;
    const int32_t from = static_cast<int32_t>(window.first(a.position + m) / kSpanPositions) - first_span;
    const int32_t to = static_cast<int32_t>((a.position + m) / kSpanPositions) + 1 - first_span;
    kernels.merge_spans(a.partial + from * span_stride + m * row_stride + head * head_stride, span_stride, to - from,
                        a.out + m * a.out_stride + static_cast<int64_t>(head) * shape.head_dim, shape.head_dim);
  }
}

void attend_rows(const Pass& pass, int layer) {
  const Model& model = pass.model;
  const Rows out = pass.work.attended.view(pass.tile.M);
  Attention a;
  a.layer = layer;
  a.heads = model.heads;
  a.M = pass.tile.M;
  a.position = pass.tile.position;
  a.scale = model.attention_scale();
  a.q = pass.work.qkv.data();
  a.wide = pass.scratch();
  a.q_stride = model.qkv_columns();
  a.partial = pass.work.partial.data();
  a.out = out.f32;
  a.out_stride = out.stride;
  attend_rows(pass.team, pass.kernels(), pass.cache, a);
  pass.team.barrier();
}

}  // namespace specfast

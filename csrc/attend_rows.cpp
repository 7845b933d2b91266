// Causal attention of a tile over the cache, page by page: every page is read once for all rows and the heads of a
// group.
#include "regions.hpp"

namespace specfast {

void attend_rows(const Pass& pass, int layer) {
  const Model& model = pass.model;
  const Tile& tile = pass.tile;
  const int32_t padded = pass.cache.shape().padded_dim();
  const int64_t head_stride = padded + 2;
  const int64_t row_stride = head_stride * model.heads;
  const int64_t page_stride = row_stride * tile.M;
  const int32_t pages = static_cast<int32_t>((tile.position + tile.M - 1) / kPagePositions) + 1;
  float* partial = pass.work.partial.data();

  for (int32_t task = pass.team.id; task < pages * model.kv_heads; task += pass.team.size) {
    const int32_t page = task / model.kv_heads, kv_head = task % model.kv_heads;
    const int32_t first_head = kv_head * model.group();
    AttendPage args;
    args.kv = pass.cache.page(page, layer, kv_head);
    args.q = pass.work.qkv.data() + first_head * model.head_dim;
    args.q_stride = model.qkv_columns();
    args.partial = partial + page * page_stride + first_head * head_stride;
    args.partial_stride = row_stride;
    args.M = tile.M;
    args.group = model.group();
    args.head_dim = model.head_dim;
    args.padded_dim = padded;
    args.first_valid =
        static_cast<int32_t>(tile.position + 1 - static_cast<int64_t>(page) * kPagePositions < kPagePositions
                                 ? tile.position + 1 - static_cast<int64_t>(page) * kPagePositions
                                 : kPagePositions);
    args.scale = model.attention_scale();
    pass.kernels().attend_rows(args);
  }
  pass.team.barrier();

  const Rows out = pass.work.attended.view(tile.M);
  for (int32_t i = pass.team.id; i < tile.M * model.heads; i += pass.team.size) {
    const int32_t m = i / model.heads, head = i % model.heads;
    const int32_t seen = static_cast<int32_t>((tile.position + m) / kPagePositions) + 1;
    pass.kernels().merge_pages(partial + m * row_stride + head * head_stride, page_stride, seen,
                               out.f32 + static_cast<size_t>(m) * out.stride + head * model.head_dim, model.head_dim,
                               padded);
  }
  pass.team.barrier();
}

}  // namespace specfast

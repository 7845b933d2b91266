// The fused regions of a decoder layer. Each is called by every thread of a team with the same arguments, splits the
// work itself, and leaves its result complete for all threads (it ends with a barrier).
#pragma once

#include "kv_cache.hpp"
#include "model.hpp"
#include "workspace.hpp"

namespace specfast {

/// One forward pass over one tile, as every thread sees it.
struct Pass {
  const Team& team;
  const Model& model;
  Workspace& work;
  KvCache& cache;
  Tile tile;

  const KernelTable& kernels() const { return *model.kernels; }
  /// The residual stream (M, hidden).
  float* x() const { return tile.x ? tile.x : work.x.data(); }
  float* scratch() const;
};

/// x = embeddings of the tile's tokens.
void embed_rows(const Pass& pass);
/// work.angles of the tile's positions; complete for all threads after the next region.
void rope_angles(const Pass& pass);
/// work.qkv = RoPE(QK-norm(RMSNorm(x) Wqkv + bias)); keys and values appended to the cache at the tile's positions.
void qkv_rope_append(const Pass& pass, int layer);
/// work.attended = causal attention of the tile's queries over the cache.
void attend_rows(const Pass& pass, int layer);
/// x += rows W: the projection that closes attention or MLP.
void project_rows(const Pass& pass, const Matrix& w, RowsBuffer& rows);
/// work.activated = silu(RMSNorm(x) Wgate) * (RMSNorm(x) Wup).
void swiglu_rows(const Pass& pass, int layer);
/// logits = RMSNorm(x[first_row:]) Whead, (M - first_row, vocab), with each row's maximum over ids below `limit` in
/// best.
void logits_rows(const Pass& pass, int32_t first_row, int32_t limit, float* logits, RowMax* best);

}  // namespace specfast

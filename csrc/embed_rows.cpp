// Token embeddings, dequantised.
#include "regions.hpp"

namespace specfast {

void embed_rows(const Pass& pass) {
  const int32_t hidden = pass.model.hidden;
  for (int32_t m = pass.team.id; m < pass.tile.M; m += pass.team.size)
    pass.kernels().embed_row(pass.model.embed, pass.tile.tokens[m], pass.x() + static_cast<size_t>(m) * hidden);
  pass.team.barrier();
}

}  // namespace specfast

// Final norm and head; the running maximum of each row is kept while the head streams.
#include <algorithm>

#include "regions.hpp"

namespace specfast {

void logits_rows(const Pass& pass, int32_t first_row, int32_t limit, float* logits, RowMax* best) {
  constexpr int kColumns = 1024;  // columns whose logits are still in the first-level cache when their maximum is taken
  const Model& model = pass.model;
  const int32_t M = pass.tile.M - first_row;
  const Needs needs = needs_of({&model.head}, model.precision);
  const Rows rows = pass.work.normed.view(M);
  normalise_rows(pass.team, pass.kernels(), pass.x() + static_cast<size_t>(first_row) * model.hidden, model.hidden,
                 model.norm.data(), model.rms_eps, rows, needs);
  pass.team.barrier();

  RowMax* mine = pass.work.best.data() + static_cast<size_t>(pass.team.id) * kTileRows;
  std::fill(mine, mine + kTileRows, RowMax{});
  int first, last;
  pass.team.part(model.vocab, kPanel, &first, &last);
  for (int n0 = first; n0 < last; n0 += kColumns) {
    const int n1 = std::min(n0 + kColumns, last);
    pass.kernels().matmul_rows(model.head, rows, activation_of(model.head, model.precision), n0, n1, logits,
                               model.vocab, {}, pass.scratch());
    const int n = std::min(n1, limit) - n0;
    for (int32_t m = 0; n > 0 && m < M; m++)
      pass.kernels().logits_rows(logits + static_cast<size_t>(m) * model.vocab + n0, n, n0, &mine[m]);
  }
  pass.team.barrier();

  if (pass.team.id == 0) {
    for (int32_t m = 0; m < M; m++) {
      best[m] = RowMax{};
      for (int thread = 0; thread < pass.team.size; thread++) {  // ascending ids: ties stay with the lowest
        const RowMax& part = pass.work.best[static_cast<size_t>(thread * kTileRows + m)];
        best[m].poison += part.poison;
        if (part.index >= 0 && (best[m].index < 0 || part.value > best[m].value)) {
          best[m].value = part.value;
          best[m].index = part.index;
        }
      }
    }
  }
  pass.team.barrier();
}

}  // namespace specfast

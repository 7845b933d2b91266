// The residual projection: rows times one matrix, added to the residual stream.
#include "regions.hpp"

namespace specfast {

float* Pass::scratch() const {
  const size_t each = work.scratch.size() / static_cast<size_t>(team.size);
  return work.scratch.data() + each * static_cast<size_t>(team.id);
}

void project_rows(const Pass& pass, const Matrix& w, RowsBuffer& buffer) {
  const Needs needs = needs_of({&w}, pass.model.precision);
  const Rows rows = buffer.view(pass.tile.M);
  prepare_rows(pass.team, pass.kernels(), rows, needs);
  pass.team.barrier();
  int n0, n1;
  pass.team.part(w.N, kPanel, &n0, &n1);
  Epilogue residual;
  residual.accumulate = true;
  pass.kernels().matmul_rows(w, rows, activation_of(w, pass.model.precision), n0, n1, pass.x(), pass.model.hidden,
                             residual, pass.scratch());
  pass.team.barrier();
}

}  // namespace specfast

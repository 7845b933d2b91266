// Norm, gate and up projections, and SiLU(gate) * up.
#include "regions.hpp"

namespace specfast {

void swiglu_rows(const Pass& pass, int layer) {
  const Model& model = pass.model;
  const LayerWeights& w = model.layers[static_cast<size_t>(layer)];
  const Needs needs = needs_of({&w.gate, &w.up}, model.precision);
  const Rows rows = pass.work.normed.view(pass.tile.M);
  normalise_rows(pass.team, pass.kernels(), pass.x(), model.hidden, w.post_norm.data(), model.rms_eps, rows, needs);
  pass.team.barrier();
  const Rows out = pass.work.activated.view(pass.tile.M);
  int n0, n1;
  pass.team.part(model.intermediate, 64, &n0, &n1);
  pass.kernels().swiglu_rows(w.gate, w.up, rows, activation_of(w.gate, model.precision),
                             activation_of(w.up, model.precision), n0, n1, out.f32, out.stride, pass.scratch());
  // No barrier: project_rows prepares the very columns (cut at 64) that this thread has just written.
}

}  // namespace specfast

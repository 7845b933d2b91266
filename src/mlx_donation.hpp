// Donation of inputs to primitives with several outputs.
#pragma once

#include <algorithm>
#include <vector>

#include "mlx/array.h"

namespace mx = mlx::core;

/// Lets a primitive's inputs be donated although every one of several outputs holds them until it is evaluated: what
/// MLX does after the evaluation, before it. For eval_cpu and eval_gpu.
inline void release_siblings(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (const mx::array& output : outputs) {
    if (output.is_tracer()) return;
  }
  const auto evaluated = std::find_if(outputs.begin(), outputs.end(),
                                      [&](const mx::array& output) { return &output.inputs() == &inputs; });
  if (evaluated == outputs.end()) return;
  for (auto output = outputs.begin(); output != outputs.end(); output++) {
    if (output != evaluated) output->inputs().clear();
  }
}

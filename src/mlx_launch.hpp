// Launches of metal/'s kernels as MLX primitives: what a model's graph is made of on a GPU.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace mx = mlx::core;

/// One kernel on one shape, as specfast.metal's table has it.
struct LaunchPlan {
  std::string library;                          // a name that no other source has
  std::string source;                           // compiled when first needed
  std::string function;                         // host name
  std::array<size_t, 3> grid{}, threadgroup{};  // threadgroups, and threads of each
  std::vector<int32_t> dims;                    // the last buffer; may be empty

  bool operator==(const LaunchPlan&) const = default;
};

/// Buffers are `inputs`, then new outputs of `shapes` and `dtypes`, then `updated`, then dims. Returns the new outputs
/// and the updated arrays, which are written in place: where somebody else has the memory, in a copy, unless `shared`
/// says that what others read of it is not overwritten.
std::vector<mx::array> launch(LaunchPlan plan, const std::vector<mx::array>& inputs, std::vector<mx::Shape> shapes,
                              std::vector<mx::Dtype> dtypes, const std::vector<mx::array>& updated, bool shared,
                              mx::Stream stream);

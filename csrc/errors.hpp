// Failures the native layer reports to its caller; the bindings turn them into Python exceptions.
#pragma once

#include <stdexcept>

namespace specfast {

/// Logits that are not finite.
struct NumericalError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
/// No room for the rows asked for.
struct ContextFullError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
/// A buffer whose shape or type does not fit.
struct ShapeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace specfast

// Metal dispatch of the primitives.
#include "mlx_metal.hpp"

#include <stdexcept>
#include <string>

namespace metal {

void unavailable(const char* primitive) {
  throw std::runtime_error(std::string(primitive) + " has no kernel for this GPU; run it on mx.cpu");
}

void embed_rows(const mx::Stream&, const Graph&, const Arrays&, Arrays&) {
  unavailable("embed_rows");
}
void qkv_rope_append(const mx::Stream&, const Graph&, int, const Arrays&, Arrays&) {
  unavailable("qkv_rope_append");
}
void attend_rows(const mx::Stream&, const Graph&, int, const Arrays&, Arrays&) {
  unavailable("attend_rows");
}
void matmul_rows(const mx::Stream&, const Graph&, int, specfast::ModelRegions::Projection, const Arrays&, Arrays&) {
  unavailable("matmul_rows");
}
void swiglu_rows(const mx::Stream&, const Graph&, int, const Arrays&, Arrays&) {
  unavailable("swiglu_rows");
}
void logits_rows(const mx::Stream&, const Graph&, const Arrays&, Arrays&) {
  unavailable("logits_rows");
}
void verify_tokens(const mx::Stream&, double, const Arrays&, Arrays&) {
  unavailable("verify_tokens");
}

}  // namespace metal

// The primitive that encodes one kernel of metal/ on MLX's command encoder.
#include "mlx_launch.hpp"

#include <stdexcept>

#include "mlx/allocator.h"
#include "mlx_donation.hpp"

#ifdef _METAL_
#include "mlx/backend/metal/device.h"
#include "mlx/backend/metal/utils.h"
#endif

namespace {

class Launch final : public mx::Primitive {
 public:
  Launch(mx::Stream stream, LaunchPlan plan, size_t inputs, std::vector<mx::Shape> shapes, bool shared)
      : mx::Primitive(stream), plan_(std::move(plan)), inputs_(inputs), shapes_(std::move(shapes)), shared_(shared) {}

  const char* name() const override { return "SpecfastLaunch"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    if (typeid(*this) != typeid(other)) return false;
    const Launch& launch = static_cast<const Launch&>(other);
    return plan_ == launch.plan_ && inputs_ == launch.inputs_ && shapes_ == launch.shapes_ && shared_ == launch.shared_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>&) override { return shapes_; }
  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(plan_.function + " is a kernel for GPUs, and this is a stream of the CPU");
  }
  void eval_gpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) override;

 private:
  const LaunchPlan plan_;
  const size_t inputs_;  // bound as such; the others are updated
  const std::vector<mx::Shape> shapes_;
  const bool shared_;
};

#ifdef _METAL_

constexpr const char* kCopy = R"(
[[kernel]] void copy_bytes(device const uchar* from [[buffer(0)]], device uchar* to [[buffer(1)]],
                           uint i [[thread_position_in_grid]]) { to[i] = from[i]; }
)";

MTL::Size size_of(const std::array<size_t, 3>& extent) {
  return MTL::Size(extent[0], extent[1], extent[2]);
}

void Launch::eval_gpu(const std::vector<mx::array>& in, std::vector<mx::array>& out) {
  release_siblings(in, out);
  auto& device = mx::metal::device(stream().device);
  auto& encoder = mx::metal::get_command_encoder(stream());
  const size_t fresh = out.size() - (in.size() - inputs_);
  for (size_t i = 0; i < out.size(); i++) {
    const mx::array* updated = i < fresh ? nullptr : &in[inputs_ + i - fresh];
    if (updated && (shared_ || updated->is_donatable())) {
      out[i].copy_shared_buffer(*updated);
      continue;
    }
    out[i].set_data(mx::allocator::malloc(out[i].nbytes()));
    if (!updated || out[i].nbytes() == 0) continue;
    auto* library = device.get_library("specfast_copy_bytes", [] { return std::string(kCopy); });
    auto* kernel = device.get_kernel("copy_bytes", library);
    encoder.set_compute_pipeline_state(kernel);
    encoder.set_input_array(*updated, 0);
    encoder.set_output_array(out[i], 1);
    encoder.dispatch_threads(MTL::Size(out[i].nbytes(), 1, 1), MTL::Size(256, 1, 1));
  }
  auto* library = device.get_library(plan_.library, [this] { return plan_.source; });
  auto* kernel = device.get_kernel(plan_.function, library);
  encoder.set_compute_pipeline_state(kernel);
  int buffer = 0;
  for (size_t i = 0; i < inputs_; i++) encoder.set_input_array(in[i], buffer++);
  for (mx::array& output : out) encoder.set_output_array(output, buffer++);
  if (!plan_.dims.empty()) encoder.set_vector_bytes(plan_.dims, buffer);
  encoder.dispatch_threadgroups(size_of(plan_.grid), size_of(plan_.threadgroup));
}

#else

void Launch::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::runtime_error(plan_.function + " is a Metal kernel, and this build of mlx has no Metal");
}

#endif

}  // namespace

std::vector<mx::array> launch(LaunchPlan plan, const std::vector<mx::array>& inputs, std::vector<mx::Shape> shapes,
                              std::vector<mx::Dtype> dtypes, const std::vector<mx::array>& updated, bool shared,
                              mx::Stream stream) {
  if (shapes.size() != dtypes.size()) throw std::invalid_argument("every new output has a shape and a type");
  std::vector<mx::array> arguments = inputs;
  for (const mx::array& array : updated) {
    arguments.push_back(array);
    shapes.push_back(array.shape());
    dtypes.push_back(array.dtype());
  }
  auto primitive = std::make_shared<Launch>(stream, std::move(plan), inputs.size(), shapes, shared);
  return mx::array::make_arrays(shapes, dtypes, primitive, arguments);
}

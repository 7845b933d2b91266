// Python's view of one weight matrix.
#include "bindings.hpp"

using namespace specfast;

Format format_named(const std::string& name) {
  if (name == "q4") return Format::q4;
  if (name == "q8") return Format::q8;
  if (name == "bf16") return Format::bf16;
  if (name == "f16") return Format::f16;
  if (name == "f32") return Format::f32;
  throw ShapeError("unknown format '" + name +
                   "'; supported: q4, q8, bf16, f16, f32, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K");
}

namespace {

constexpr std::pair<const char*, BlockType> kBlocks[] = {{"Q4_0", BlockType::q4_0}, {"Q4_1", BlockType::q4_1},
                                                         {"Q8_0", BlockType::q8_0}, {"Q4_K", BlockType::q4_k},
                                                         {"Q5_K", BlockType::q5_k}, {"Q6_K", BlockType::q6_k}};

BlockType blocks_named(const std::string& name) {
  for (const auto& [known, blocks] : kBlocks) {
    if (name == known) return blocks;
  }
  return BlockType::none;
}

const char* format_name(Format format) {
  switch (format) {
    case Format::q4: return "q4";
    case Format::q8: return "q8";
    case Format::bf16: return "bf16";
    case Format::f16: return "f16";
    default: return "f32";
  }
}

const uint8_t* checked(const Bytes& bytes, size_t expected, const char* what) {
  if (bytes.nbytes() != expected)
    throw ShapeError(std::string(what) + " has " + std::to_string(bytes.nbytes()) + " bytes but its shape needs " +
                     std::to_string(expected));
  return bytes.data();
}

void init_matrix(BoundMatrix* self, const std::string& format, int32_t N, int32_t K, const Bytes& weight, int32_t group,
                 const std::optional<Bytes>& scales, const std::optional<Bytes>& biases,
                 const std::string& scale_format) {
  BoundMatrix bound;
  Matrix& w = bound.matrix;
  w.blocks = blocks_named(format);
  w.format = w.blocks != BlockType::none ? unpacked_format(w.blocks) : format_named(format);
  if (N < 1 || K < 1 || N > (1 << 28) || K > (1 << 24))
    throw ShapeError("a matrix of (" + std::to_string(N) + ", " + std::to_string(K) +
                     ") is outside (1, 1) to (2^28, 2^24)");
  w.N = N;
  w.K = K;
  if (w.blocks != BlockType::none) {
    const int32_t inputs = static_cast<int32_t>(block_size(w.blocks).inputs);
    if (K % inputs)
      throw ShapeError("K = " + std::to_string(K) + " is not a multiple of the " + std::to_string(inputs) + " of a " +
                       format + " block");
    if (group || scales || biases) throw ShapeError("blocks hold their own scales; give the weight alone");
    w.group = is_quantised(w.format) ? 32 : 0;
  } else if (is_quantised(w.format)) {
    if (group != 32 && group != 64 && group != 128)
      throw ShapeError("group size " + std::to_string(group) + " is not supported; supported: 32, 64, 128");
    if (K % group)
      throw ShapeError("K = " + std::to_string(K) + " is not a multiple of the group size " + std::to_string(group));
    if (!scales || !biases) throw ShapeError("a quantised matrix needs scales and biases");
    w.group = group;
    w.scale_format = format_named(scale_format);
    if (is_quantised(w.scale_format))
      throw ShapeError("scale_format must be bf16, f16 or f32, not '" + scale_format + "'");
    const size_t expected = static_cast<size_t>(N) * w.groups() * w.scale_bytes();
    w.scales = checked(*scales, expected, "scales");
    w.biases = checked(*biases, expected, "biases");
    bound.owners.push_back(*scales);
    bound.owners.push_back(*biases);
  }
  w.weight = checked(weight, static_cast<size_t>(N) * w.stored_row_bytes(), "weight");
  bound.owners.push_back(weight);
  new (self) BoundMatrix(std::move(bound));
}

}  // namespace

void bind_matrix(nb::module_& m) {
  nb::class_<BoundMatrix>(
      m, "Matrix",
      "One weight matrix (N, K), row major, used in place; keeps the arrays that own its memory alive.\n\n"
      "weight, scales and biases are C-contiguous uint8 views. q4 and q8 are MLX's affine layout: packed\n"
      "little-endian words, scales and biases (N, K / group) in scale_format. Q4_0, Q4_1, Q8_0, Q4_K, Q5_K and Q6_K "
      "are\n"
      "GGUF's blocks, row after row; format then says what they are unpacked to as they are read. Raises ShapeError.")
      .def("__init__", &init_matrix, nb::arg("format"), nb::arg("N"), nb::arg("K"), nb::arg("weight").noconvert(),
           nb::kw_only(), nb::arg("group") = 0, nb::arg("scales").noconvert() = nb::none(),
           nb::arg("biases").noconvert() = nb::none(), nb::arg("scale_format") = "f32")
      .def_prop_ro("N", [](const BoundMatrix& self) { return self.matrix.N; })
      .def_prop_ro("K", [](const BoundMatrix& self) { return self.matrix.K; })
      .def_prop_ro("group", [](const BoundMatrix& self) { return self.matrix.group; })
      .def_prop_ro("format", [](const BoundMatrix& self) { return format_name(self.matrix.format); })
      .def_prop_ro(
          "blocks",
          [](const BoundMatrix& self) -> const char* {
            for (const auto& [name, blocks] : kBlocks) {
              if (self.matrix.blocks == blocks) return name;
            }
            return nullptr;
          },
          nb::sig("def blocks(self) -> str | None"), "The type of GGUF's blocks; None for other matrices.")
      .def_prop_ro(
          "nbytes", [](const BoundMatrix& self) { return self.matrix.bytes(); }, "Bytes streamed in one pass.");
}

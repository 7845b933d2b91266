// Single kernels on NumPy arrays, for tests and for specfast.ops.
#include "attend_rows.hpp"
#include "bindings.hpp"
#include "dispatch.hpp"

using namespace specfast;

namespace {

constexpr size_t kMaxRows = size_t{1} << 18;  // rows times heads, and positions, are counted in 32 bits

nb::ndarray<nb::numpy, float> matmul_rows(const Floats& x, const BoundMatrix& bound, const std::string& precision,
                                          const std::optional<std::string>& isa) {
  const Matrix& w = bound.matrix;
  if (x.ndim() != 2 || x.shape(1) != static_cast<size_t>(w.K) || x.shape(0) < 1 || x.shape(0) > kMaxRows)
    throw ShapeError("x must be (M, " + std::to_string(w.K) + ") with M in 1 to " + std::to_string(kMaxRows));
  const KernelTable& kernels = kernels_named(isa);
  const Precision activations = precision_named(precision);
  const int32_t M = static_cast<int32_t>(x.shape(0));
  float* y;
  auto out = make_array(&y, {x.shape(0), static_cast<size_t>(w.N)});
  WithoutGil released;
  ThreadPool& pool = ThreadPool::instance();
  RowsBuffer buffer(w.K);
  const Needs needs = needs_of({&w}, activations);
  buffer.reserve(needs);
  for (int32_t first = 0; first < M; first += kTileRows) {
    const Rows rows = buffer.view(std::min(M - first, kTileRows));
    for (int32_t m = 0; m < rows.M; m++)
      std::copy_n(x.data() + static_cast<size_t>(first + m) * w.K, w.K,
                  rows.f32 + static_cast<size_t>(m) * rows.stride);
    pool.run([&](const Team& team) {
      std::vector<float> scratch(matmul_scratch_floats(w.K));
      prepare_rows(team, kernels, rows, needs);
      team.barrier();
      int n0, n1;
      team.part(w.N, kPanel, &n0, &n1);
      kernels.matmul_rows(w, rows, activation_of(w, activations), n0, n1, y + static_cast<size_t>(first) * w.N, w.N, {},
                          scratch.data());
    });
  }
  return out;
}

nb::ndarray<nb::numpy, float> bound_attend_rows(const Floats& q, const Floats& k, const Floats& v, int32_t kv_bits,
                                                const std::optional<std::string>& isa, int64_t window, int64_t sinks,
                                                int32_t group) {
  if (q.ndim() != 3 || k.ndim() != 3 || v.ndim() != 3)
    throw ShapeError("q must be (M, heads, head_dim), k and v (S, kv_heads, head_dim)");
  const size_t M = q.shape(0), heads = q.shape(1), dim = q.shape(2), S = k.shape(0), kv_heads = k.shape(1);
  if (k.shape(2) != dim || v.shape(0) != S || v.shape(1) != kv_heads || v.shape(2) != dim || S < M)
    throw ShapeError("q, k and v do not fit: (" + std::to_string(M) + ", " + std::to_string(heads) + ", " +
                     std::to_string(dim) + ") against (" + std::to_string(S) + ", " + std::to_string(kv_heads) + ", " +
                     std::to_string(k.shape(2)) + ") and (" + std::to_string(v.shape(0)) + ", " +
                     std::to_string(v.shape(1)) + ", " + std::to_string(v.shape(2)) + ")");
  if (M < 1 || S > kMaxRows)
    throw ShapeError("attention of " + std::to_string(M) + " rows over " + std::to_string(S) +
                     " positions is outside 1 to " + std::to_string(kMaxRows));
  if (kv_heads == 0 || heads == 0 || heads % kv_heads || heads > kMaxHeads)
    throw ShapeError(std::to_string(heads) + " query heads cannot share " + std::to_string(kv_heads) +
                     " key/value heads; a multiple of those, 1 to " + std::to_string(kMaxHeads) + ", can");
  if (dim < 2 || dim % 2 || dim > kMaxHeadDim)
    throw ShapeError("head_dim " + std::to_string(dim) + " is not an even number in 2 to " +
                     std::to_string(kMaxHeadDim));
  KvShape shape{1, static_cast<int32_t>(kv_heads), static_cast<int32_t>(dim)};
  if (group) {
    shape = affine_shape(shape, kv_bits, group);
  } else if (kv_bits == 8 || kv_bits == 16 || kv_bits == 32) {
    shape.format = kv_bits == 8 ? KvFormat::int8 : kv_bits == 16 ? KvFormat::bf16 : KvFormat::f32;
  } else {
    throw ShapeError("keys and values of " + std::to_string(kv_bits) + " bits are not supported; supported: 8, 16, 32");
  }
  for (const auto& [name, n] : {std::pair{"window ", window}, std::pair{"sinks ", sinks}}) {
    if (n < 0 || n > kMaxRows)
      throw ShapeError(name + std::to_string(n) + " is outside 0 to " + std::to_string(kMaxRows));
  }
  const KernelTable& kernels = kernels_named(isa);
  float* out_data;
  auto out = make_array(&out_data, {M, heads, dim});
  KvCache cache(shape, {{window, sinks}}, static_cast<int64_t>(S));
  cache.append(static_cast<int64_t>(S));
  for (size_t i = 0; i < S; i++) {
    for (size_t h = 0; h < kv_heads; h++)
      kernels.append_head(cache.page(static_cast<int64_t>(i / kPagePositions), 0, static_cast<int>(h)),
                          k.data() + (i * kv_heads + h) * dim, v.data() + (i * kv_heads + h) * dim,
                          static_cast<int>(dim), shape.padded_dim(), static_cast<int>(i % kPagePositions));
  }
  Attention a;
  a.heads = static_cast<int32_t>(heads);
  a.M = static_cast<int32_t>(M);
  a.position = static_cast<int64_t>(S - M);
  a.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  std::vector<float> partial(Attention::partial_floats(cache, a.heads, a.M, a.position)),
      wide(shape.wide_page_floats());
  a.wide = wide.data();
  a.q = q.data();
  a.q_stride = a.out_stride = static_cast<int64_t>(heads * dim);
  a.partial = partial.data();
  a.out = out_data;
  attend_rows(Team{}, kernels, cache, a);
  return out;
}

}  // namespace

void bind_ops(nb::module_& m) {
  m.def("matmul_rows", &matmul_rows, nb::arg("x"), nb::arg("matrix"), nb::arg("precision") = "int8",
        nb::arg("isa") = nb::none(), "x (M, K) float32 times matrix (N, K) transposed: (M, N) float32.");
  m.def("attend_rows", &bound_attend_rows, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("kv_bits") = 16,
        nb::arg("isa") = nb::none(), nb::arg("window") = 0, nb::arg("sinks") = 0, nb::arg("group") = 0,
        "Causal attention of the last M positions: q (M, heads, head_dim), k and v (S, kv_heads, head_dim), all "
        "float32.\n\n"
        "kv_bits: keys and values are stored as int8 with a scale for each vector (8), bf16 (16) or float32 (32). A "
        "row sees itself and the "
        "window - 1 positions before it, and the first of all, sinks many; window 0 is all. With a group they are "
        "MLX's affine codes of 4 or 8 bits, a scale and a bias for each group.");
}

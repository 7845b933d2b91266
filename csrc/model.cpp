// Size checks and totals of a model.
#include "model.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <new>
#include <utility>

#include "errors.hpp"
#include "thread_pool.hpp"

namespace specfast {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;

/// Every matrix a pass streams: those of the first layers, and the head where there is one.
template <class AnyModel, class Visit>
void for_each_matrix(AnyModel& model, int first_layers, Visit&& visit) {
  for (int i = 0; i < first_layers; i++) {
    auto& layer = model.layers[static_cast<size_t>(i)];
    for (auto* w : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) visit(*w);
  }
  if (model.last()) visit(model.head);
}

template <class AnyModel, class Visit>
void for_each_matrix(AnyModel& model, Visit&& visit) {
  for_each_matrix(model, static_cast<int>(model.layers.size()), visit);
}

void expect(const Matrix& w, int32_t N, int32_t K, const std::string& name) {
  if (w.N == N && w.K == K) return;
  throw ShapeError(name + " is (" + std::to_string(w.N) + ", " + std::to_string(w.K) + ") but the config needs (" +
                   std::to_string(N) + ", " + std::to_string(K) + ")");
}

void expect(const std::vector<float>& v, int32_t n, const std::string& name, bool optional = false) {
  if (v.size() == static_cast<size_t>(n) || (optional && v.empty())) return;
  throw ShapeError(name + " has " + std::to_string(v.size()) + " elements but the config needs " + std::to_string(n));
}

void expect_range(int64_t value, int64_t low, int64_t high, const char* name) {
  if (value >= low && value <= high) return;
  throw ShapeError(std::string(name) + " is " + std::to_string(value) + ", outside " + std::to_string(low) + " to " +
                   std::to_string(high));
}

/// Lets the system take back the pages that lie wholly in a read-only mapping of a file; reading them maps them again.
void drop_pages(const void* data, size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

}  // namespace

float Model::attention_scale() const {
  return 1.0f / std::sqrt(static_cast<float>(head_dim));
}

std::vector<Window> Model::windows() const {
  std::vector<Window> of_layers;
  for (const LayerWeights& layer : layers) of_layers.push_back({layer.window, 0});
  return of_layers;
}

size_t Model::pass_bytes(int first_layers) const {
  size_t total = 0;
  for_each_matrix(*this, first_layers, [&](const Matrix& w) { total += w.bytes(); });
  return total;
}

double Model::row_macs() const {
  double total = 0;
  for_each_matrix(*this, [&](const Matrix& w) { total += static_cast<double>(w.N) * w.K; });
  return total;
}

void Model::Free::operator()(uint8_t* p) const {
  std::free(p);
}

void Model::pack(bool mapped) {
  if (!kernels->pack_panel) return;
  const auto size = [this](const Matrix& w) {  // whole cache lines; 0 if the rows stay in place
    const Activation form = activation_of(w, precision);
    const bool packs =
        w.blocks != BlockType::none
            ? false
            : form == Activation::int8 || (form == Activation::bf16 && w.format == Format::bf16 && w.K % 2 == 0);
    return packs ? (w.panels() * w.panel_bytes() + 63) / 64 * 64 : 0;
  };
  size_t total = 0;
  for_each_matrix(*this, [&](const Matrix& w) { total += size(w); });
  if (total == 0) return;
  total = (total + kHugePage - 1) / kHugePage * kHugePage;
  packed_.reset(static_cast<uint8_t*>(std::aligned_alloc(kHugePage, total)));
  if (!packed_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(packed_.get(), total, MADV_HUGEPAGE);
#endif
  uint8_t* next = packed_.get();
  for_each_matrix(*this, [&](Matrix& w) {
    if (size(w) == 0) return;
    uint8_t* data = std::exchange(next, next + size(w));
    ThreadPool::instance().run([&](const Team& team) {
      int first, last;
      team.part(w.N, kPanel, &first, &last);
      for (int n = first; n < last; n += kPanel)
        kernels->pack_panel(w, n, data + static_cast<size_t>(n / kPanel) * w.panel_bytes());
    });
    w.packed = data;
    if (mapped) {
      drop_pages(w.weight, static_cast<size_t>(w.N) * w.row_bytes());
      for (const void* both : {w.scales, w.biases})
        drop_pages(both, static_cast<size_t>(w.N) * w.groups() * w.scale_bytes());
    }
    w.weight = w.scales = w.biases = nullptr;
  });
}

bool Model::reads(const Matrix& w) const {
  bool found = first() && embed.weight == w.weight;
  for_each_matrix(*this, [&](const Matrix& own) { found = found || own.weight == w.weight; });
  return found;
}

size_t Model::packed_bytes() const {
  size_t total = 0;
  for_each_matrix(*this, [&](const Matrix& w) { total += w.packed ? w.panels() * w.panel_bytes() : 0; });
  return total;
}

void Model::check() const {
  expect_range(hidden, 1, 1 << 20, "hidden");
  expect_range(heads, 1, kMaxHeads, "heads");
  expect_range(kv_heads, 1, heads, "kv_heads");
  expect_range(head_dim, 2, kMaxHeadDim, "head_dim");
  expect_range(intermediate, 1, 1 << 22, "intermediate");
  expect_range(vocab, 1, 1 << 22, "vocab");
  expect_range(max_context, 1, int64_t{1} << 30, "max_context");
  expect_range(static_cast<int64_t>(layers.size()), 1, 1 << 16, "the number of layers");
  if (heads % kv_heads)
    throw ShapeError("heads (" + std::to_string(heads) + ") is not a multiple of kv_heads (" +
                     std::to_string(kv_heads) + ")");
  if (head_dim % 2) throw ShapeError("head_dim " + std::to_string(head_dim) + " is odd; RoPE rotates pairs");
  expect(rope_inv_freq, head_dim / 2, "rope_inv_freq");
  if (first()) expect(embed, vocab, hidden, "embed");
  if (last()) {
    expect(norm, hidden, "norm");
    expect(head, vocab, hidden, "head");
  }
  for (size_t i = 0; i < layers.size(); i++) {
    const LayerWeights& layer = layers[i];
    const std::string at = "layer " + std::to_string(i) + " ";
    expect(layer.input_norm, hidden, at + "input_norm");
    expect(layer.post_norm, hidden, at + "post_norm");
    expect(layer.q, q_columns(), hidden, at + "q");
    expect(layer.k, kv_columns(), hidden, at + "k");
    expect(layer.v, kv_columns(), hidden, at + "v");
    expect(layer.o, hidden, q_columns(), at + "o");
    expect(layer.gate, intermediate, hidden, at + "gate");
    expect(layer.up, intermediate, hidden, at + "up");
    expect(layer.down, hidden, intermediate, at + "down");
    expect(layer.q_bias, q_columns(), at + "q_bias", true);
    expect(layer.k_bias, kv_columns(), at + "k_bias", true);
    expect(layer.v_bias, kv_columns(), at + "v_bias", true);
    expect(layer.q_norm, head_dim, at + "q_norm", true);
    expect(layer.k_norm, head_dim, at + "k_norm", true);
    expect_range(layer.window, 0, int64_t{1} << 30, (at + "window").c_str());
  }
}

}  // namespace specfast

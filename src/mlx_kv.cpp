// KV pages in MLX arrays: memory, and the primitives that write and read rows.
#include "mlx_kv.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"

using namespace specfast;

namespace kv {
namespace {

constexpr int64_t kAlignment = 64, kWord = 4;
constexpr int64_t kUnknown = std::numeric_limits<int64_t>::max();

/// At the array's first byte; written when a graph is evaluated, never by a task.
struct Header {
  int64_t start;  // of the pages, in bytes from here
  int64_t end;    // positions written so far, or kUnknown
};

size_t page_bytes(const Model& model) {
  return static_cast<size_t>(model.kv_heads) * model.kv_shape().head_page_bytes();
}

Header* header(const mx::array& kv) {
  return reinterpret_cast<Header*>(const_cast<uint32_t*>(kv.data<uint32_t>()));
}

}  // namespace

int64_t words(const Model& model, int64_t pages) {
  return (2 * kAlignment + pages * static_cast<int64_t>(page_bytes(model))) / kWord;
}

int64_t pages_of(const Model& model, const mx::array& kv) {
  const int64_t size = static_cast<int64_t>(kv.size());
  if (kv.dtype() != mx::uint32 || kv.ndim() != 1) throw std::invalid_argument("kv must be (words,) uint32");
  const int64_t pages = size ? (size * kWord - 2 * kAlignment) / static_cast<int64_t>(page_bytes(model)) : 0;
  if (size && (pages < 0 || words(model, pages) != size))
    throw std::invalid_argument("kv of " + std::to_string(size) + " words is not this model's; one page has " +
                                std::to_string(words(model, 1)));
  return pages;
}

KvPages view(const Model& model, const mx::array& kv) {
  const int64_t pages = pages_of(model, kv);
  if (pages == 0) return {};
  const bool whole = kv.flags().row_contiguous && kv.data_size() == kv.size();
  const int64_t start = whole ? header(kv)->start : 0;
  if (start < static_cast<int64_t>(sizeof(Header)) || start > 2 * kAlignment)
    throw std::invalid_argument("kv was not written by specfast; begin with an array of 0 words");
  return {reinterpret_cast<uint8_t*>(header(kv)) + start, pages};
}

void Append::copy() const noexcept {
  if (to.data == from.data) return;
  const size_t kept = static_cast<size_t>(std::min(from.count, to.count)) * page_bytes;
  if (kept) std::memcpy(to.data, from.data, kept);
  std::memset(to.data + kept, 0, static_cast<size_t>(to.count) * page_bytes - kept);  // padding lanes are read
}

Append append(const Model& model, const mx::array& in, mx::array& out, std::optional<int64_t> offset, int64_t rows) {
  const KvPages from = view(model, in);
  const int64_t end = offset ? *offset + rows : kUnknown;
  if (from.count && in.size() == out.size()) {
    const std::atomic_ref<int64_t> written(header(in)->end);
    if (in.is_donatable() || (offset && *offset >= written.load())) {
      out.copy_shared_buffer(in);
      written.store(end);
      return {from, from, page_bytes(model)};
    }
  }
  out.set_data(mx::allocator::malloc(out.nbytes()));
  const int64_t address = reinterpret_cast<int64_t>(header(out));
  *header(out) = {(address + kAlignment + kAlignment - 1) / kAlignment * kAlignment - address, end};
  return {from, view(model, out), page_bytes(model)};
}

std::optional<int64_t> known(const mx::array& offset) {
  if (!offset.is_available()) return std::nullopt;
  return *offset.data<int32_t>();
}

}  // namespace kv

namespace {

class WriteRows final : public Region {
 public:
  WriteRows(mx::Stream stream, GraphPtr graph, int64_t pages) : Region(stream, std::move(graph), 0), pages_(pages) {}
  const char* name() const override { return "SpecfastWriteRows"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return Region::is_equivalent(other) && pages_ == static_cast<const WriteRows&>(other).pages_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays&) override {
    return {{static_cast<int>(kv::words(model(), pages_))}};
  }
  void eval_cpu(const Arrays& in, Arrays& out) override {
    const int64_t n = in[1].shape(1);
    const kv::Append append = kv::append(model(), in[0], out[0], kv::known(in[3]), n);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [graph = graph_, append, n, k = in[1].data<float>(), v = in[2].data<float>(), offset = in[3].data<int32_t>()] {
          append.copy();
          graph->regions->write_rows(append.to, k, v, n, *offset);
        });
  }

 private:
  const int64_t pages_;
};

class ReadRows final : public Region {
 public:
  ReadRows(mx::Stream stream, GraphPtr graph, int64_t n) : Region(stream, std::move(graph), 0), n_(n) {}
  const char* name() const override { return "SpecfastReadRows"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    return Region::is_equivalent(other) && n_ == static_cast<const ReadRows&>(other).n_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays&) override {
    const mx::Shape shape{model().kv_heads, static_cast<int>(n_), model().head_dim};
    return {shape, shape};
  }
  void eval_cpu(const Arrays& in, Arrays& out) override {
    for (mx::array& rows : out) rows.set_data(mx::allocator::malloc(rows.nbytes()));
    mx::cpu::get_command_encoder(stream()).dispatch(
        [graph = graph_, pages = kv::view(model(), in[0]), n = n_, k = out[0].data<void>(), v = out[1].data<void>()] {
          graph->regions->read_rows(pages, n, k, v);
        });
  }

 private:
  const int64_t n_;
};

}  // namespace

mx::array write_rows(const GraphPtr& graph, const mx::array& kv, const mx::array& keys, const mx::array& values,
                     const mx::array& offset, int64_t pages, mx::Stream stream) {
  return mx::array(mx::Shape{static_cast<int>(kv::words(graph->model(), pages))}, mx::uint32,
                   std::make_shared<WriteRows>(stream, graph, pages), {kv, keys, values, offset});
}

std::pair<mx::array, mx::array> read_rows(const GraphPtr& graph, const mx::array& kv, int64_t n, mx::Stream stream) {
  const Model& model = graph->model();
  const mx::Shape shape{model.kv_heads, static_cast<int>(n), model.head_dim};
  const mx::Dtype dtype = model.kv_format == KvFormat::f32 ? mx::float32 : mx::bfloat16;
  const Arrays rows =
      mx::array::make_arrays({shape, shape}, {dtype, dtype}, std::make_shared<ReadRows>(stream, graph, n), {kv});
  return {rows[0], rows[1]};
}

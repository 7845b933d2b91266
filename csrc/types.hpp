// csrc holds framework-free kernels (the bindings live in src/); this file: the plain data every kernel is handed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace specfast {

/// Most rows one kernel call takes; more rows are cut into tiles of this many.
inline constexpr int kTileRows = 16;
/// Outputs a matmul kernel produces together.
inline constexpr int kPanel = 16;
/// Positions of a KV page.
inline constexpr int kPagePositions = 256;
/// The fixed absolute spans over which attention is split.
inline constexpr int kSpanPages = 4;
inline constexpr int kSpanPositions = kSpanPages * kPagePositions;
/// Positions stored side by side in the dimension-major K tiles, and dimensions side by side in the slices of V.
inline constexpr int kKeyTile = 64;
inline constexpr int kValueSlice = 64;
inline constexpr int kMaxHeadDim = 1024;
inline constexpr int kMaxHeads = 4096;

enum class Format : uint8_t { q4, q8, bf16, f16, f32 };

constexpr bool is_quantised(Format f) {
  return f == Format::q4 || f == Format::q8;
}

/// GGUF's quantised blocks: a row is a run of them, each with its own scales.
enum class BlockType : uint8_t { none, q4_0, q4_1, q8_0, q4_k, q5_k, q6_k };

/// How many inputs a block holds, and in how many bytes.
struct BlockSize {
  size_t inputs, bytes;
};
constexpr BlockSize block_size(BlockType blocks) {
  switch (blocks) {
    case BlockType::q4_0: return {32, 18};
    case BlockType::q4_1: return {32, 20};
    case BlockType::q8_0: return {32, 34};
    case BlockType::q4_k: return {256, 144};
    case BlockType::q5_k: return {256, 176};
    case BlockType::q6_k: return {256, 210};
    default: return {1, 0};
  }
}
/// What a panel of blocks is unpacked to: q4 or q8 in groups of 32, or f32.
constexpr Format unpacked_format(BlockType blocks) {
  switch (blocks) {
    case BlockType::q4_0:
    case BlockType::q4_1:
    case BlockType::q4_k: return Format::q4;
    case BlockType::q8_0:
    case BlockType::q5_k: return Format::q8;
    default: return Format::f32;
  }
}

/// One weight matrix (N, K), row major, owned by somebody else and used in place.
///
/// Quantised formats follow MLX's affine layout: packed little-endian uint32 words, lowest bits first, and
/// w = scale * q + bias with one scale and bias per row and group of `group` inputs. Rows of GGUF blocks are read where
/// they lie, too: a kernel unpacks the 16 rows of a panel into its scratch, weight for weight the same values, in the
/// layout that `format` and `group` name; scales and biases are then null.
struct Matrix {
  BlockType blocks = BlockType::none;
  Format format = Format::f32;
  Format scale_format = Format::f32;  // bf16, f16 or f32
  int32_t N = 0;
  int32_t K = 0;
  int32_t group = 0;
  const void* weight = nullptr;
  const void* scales = nullptr;  // (N, K / group)
  const void* biases = nullptr;  // (N, K / group)
  /// The same weights as panels of 16 rows, if the kernels want a copy of their own: 32-bit word j of the 16 rows side
  /// by side; where quantised, each group's words behind its 16 scales and 16 biases. 64-byte aligned; null means the
  /// rows are read in place.
  const uint8_t* packed = nullptr;

  size_t row_bytes() const {
    switch (format) {
      case Format::q4: return static_cast<size_t>(K) / 2;
      case Format::q8: return static_cast<size_t>(K);
      case Format::f32: return static_cast<size_t>(K) * 4;
      default: return static_cast<size_t>(K) * 2;
    }
  }
  /// Bytes between rows at `weight`.
  size_t stored_row_bytes() const {
    const BlockSize size = block_size(blocks);
    return blocks == BlockType::none ? row_bytes() : static_cast<size_t>(K) / size.inputs * size.bytes;
  }
  size_t scale_bytes() const { return scale_format == Format::f32 ? 4 : 2; }
  size_t groups() const { return group ? static_cast<size_t>(K) / static_cast<size_t>(group) : 0; }
  /// Bytes of one packed panel of 16 rows.
  size_t panel_bytes() const { return kPanel * (row_bytes() + 2 * groups() * scale_bytes()); }
  size_t panels() const { return (static_cast<size_t>(N) + kPanel - 1) / kPanel; }
  /// Bytes streamed from memory in one pass.
  size_t bytes() const {
    if (blocks != BlockType::none) return static_cast<size_t>(N) * stored_row_bytes();
    return static_cast<size_t>(N) * (row_bytes() + 2 * groups() * scale_bytes());
  }
};

/// The activation form a matrix is multiplied with.
enum class Activation : uint8_t { f32, bf16, int8 };

/// How int8 activations are laid out for the weights they meet: `block` inputs share a scale, and 4-bit weights want
/// the even inputs of a block before its odd ones (the two nibbles of a byte).
enum Int8Layout : uint8_t { kQ4Block32, kQ4Block64, kQ8Block32, kQ8Block64, kInt8Layouts };

constexpr int block_of(Int8Layout layout) {
  return layout == kQ4Block32 || layout == kQ8Block32 ? 32 : 64;
}
constexpr bool interleaved(Int8Layout layout) {
  return layout == kQ4Block32 || layout == kQ4Block64;
}
constexpr Int8Layout int8_layout(Format format, int group) {
  return format == Format::q4 ? (group == 32 ? kQ4Block32 : kQ4Block64) : (group == 32 ? kQ8Block32 : kQ8Block64);
}

/// M rows quantised to int8; block b of row m starts at q + (b * M + m) * block. A table may order the bytes of a block
/// of all rows in its own way: only its own kernels read what its quantise_int8 wrote.
struct Int8Rows {
  int8_t* q = nullptr;
  float* scale = nullptr;       // (K / block, M): x ~= scale * q
  float* scaled_sum = nullptr;  // (K / block, M): scale * sum(q), what the group's bias multiplies
  int32_t* sum = nullptr;       // (K / block, M): sum(q)
};

/// M input rows in every form the matrices of one region read; unneeded forms are null.
struct Rows {
  int32_t M = 0;
  int32_t K = 0;
  int32_t stride = 0;        // elements between rows of f32 and bf16
  float* f32 = nullptr;      // (M, stride), always present
  uint16_t* bf16 = nullptr;  // (M, stride), rounded to nearest even; 0 from K on
  Int8Rows int8[kInt8Layouts];
};

/// What a matmul adds to its result before storing it.
struct Epilogue {
  const float* bias = nullptr;  // (N,)
  bool accumulate = false;      // y += instead of y =
};

/// What keys and values are stored as; int8 has one scale for each vector of head_dim, affine MLX's 4 or 8 bit codes
/// with a scale and a bias for each group.
enum class KvFormat : uint8_t { bf16, f32, int8, affine };

/// Shape of what one position stores.
struct KvShape {
  int32_t layers = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  KvFormat format = KvFormat::bf16;
  int32_t bits = 0, group = 0;  // affine only: 4 or 8; 32, 64 or 128, of which head_dim is a multiple
  bool bf16_scales = false;     // affine only: rounded so

  int32_t padded_dim() const { return (head_dim + 15) / 16 * 16; }
  int32_t groups() const { return group ? head_dim / group : 0; }
  /// Not for affine.
  size_t element_bytes() const { return format == KvFormat::int8 ? 1 : format == KvFormat::bf16 ? 2 : 4; }
  size_t k_page_bytes() const { return page_bytes(head_dim); }
  size_t v_page_bytes() const { return page_bytes(padded_dim()); }
  /// Scales and biases of a page's keys, or of its values.
  size_t page_scales() const {
    return kPagePositions * (format == KvFormat::int8     ? 1
                             : format == KvFormat::affine ? 2 * static_cast<size_t>(groups())
                                                          : 0);
  }
  /// Of keys, values and scales of one kv head of one layer.
  size_t head_page_bytes() const { return k_page_bytes() + v_page_bytes() + 2 * page_scales() * sizeof(float); }
  /// Floats of a page's keys and values as float32.
  size_t wide_page_floats() const { return kPagePositions * static_cast<size_t>(head_dim + padded_dim()); }

 private:
  size_t page_bytes(int32_t dim) const {
    const size_t elements = kPagePositions * static_cast<size_t>(dim);
    return format == KvFormat::affine ? elements * static_cast<size_t>(bits) / 8 : elements * element_bytes();
  }
};

/// What a row attends to: `size` positions up to its own, 0 for all, and `sinks` first positions that never leave (Xiao
/// et al. 2023, Sec. 3.2, arXiv:2309.17453).
struct Window {
  int64_t size = 0;
  int64_t sinks = 0;

  bool operator==(const Window&) const = default;
  /// First position that the row at `position` attends to. Where it is not 0 it lies behind the sinks, which count
  /// besides.
  int64_t first(int64_t position) const {
    const int64_t start = position - size + 1;
    return size && start > sinks ? start : 0;
  }
};

/// Keys and values of one kv head in one page, in the order in which they are read. K lies in tiles of 64 positions and
/// there by dimension; V in slices of 64 dimensions (the last may be narrower) and there by position. In bf16 and int8
/// both are in pairs, as a dot takes them: K two dimensions of a position side by side, V two positions of a dimension.
/// Affine codes lie as float32 does; of 4 bits, a byte of K has dimension d low and d + 1 high, and a byte of V
/// dimension d of its slice low and the one half a slice after it high.
struct KvPage {
  void* k = nullptr;
  void* v = nullptr;
  float* k_scales = nullptr;  // int8: (256,); affine: (groups, 256), then biases alike
  float* v_scales = nullptr;  // int8: (256,); affine: (256, groups), then biases alike
  KvFormat format = KvFormat::bf16;
  int32_t bits = 0, group = 0;  // affine only, as in KvShape
  bool bf16_scales = false;

  struct Place {
    uint8_t* byte;
    int shift;  // of a 4-bit code
  };
  /// Where the affine code of dimension d of a position's key lies.
  Place key_code(int head_dim, int position, int d) const {
    uint8_t* tile = static_cast<uint8_t*>(k) + position / kKeyTile * kKeyTile * head_dim * bits / 8;
    const int i = position % kKeyTile;
    return bits == 8 ? Place{tile + d * kKeyTile + i, 0} : Place{tile + d / 2 * kKeyTile + i, d % 2 * 4};
  }
  /// The same of its value.
  Place value_code(int head_dim, int position, int d) const {
    const int first = d / kValueSlice * kValueSlice, left = head_dim - first;
    const int width = left < kValueSlice ? left : kValueSlice, half = width / 2, place = d - first;
    uint8_t* slice = static_cast<uint8_t*>(v) + (first * kPagePositions + position * width) * bits / 8;
    return bits == 8 ? Place{slice + place, 0} : Place{slice + place % half, place / half * 4};
  }
};

/// Attention of M rows times the `group` query heads of one kv head over one page, added to that of the pages of its
/// span before it.
struct AttendPage {
  KvPage kv;
  const void* next = nullptr;  // keys of the page that this thread reads next, fetched meanwhile; never read
  float* wide = nullptr;       // KvShape::wide_page_floats(), this call's alone; affine only
  const float* q = nullptr;    // row m, head g at q + m * q_stride + g * head_dim
  int64_t q_stride = 0;
  float* partial = nullptr;  // row m, head g at partial + m * partial_stride + g * (padded_dim + 2): max, sum, acc
  int64_t partial_stride = 0;
  bool first_page = true;  // of its span: `partial` holds nothing yet
  int32_t M = 0;
  int32_t group = 0;
  int32_t head_dim = 0;
  int32_t padded_dim = 0;
  int32_t first_valid = 0;  // row 0 sees keys of this page below it, if any; row m below first_valid + m
  int32_t window = 0;       // and not those `window` and more positions before that bound; 0: all
  int32_t sinks = 0;        // unless these begin at key `sinks` of this page (which may lie before it) or earlier
  bool sinks_done = false;  // `partial` holds those of the sinks where a row's window begins; otherwise nothing yet
  int32_t last_valid = kPagePositions;  // no row sees keys from it on
  float scale = 0;
};

/// Running maximum of a row of logits; `poison` stays 0 until a value that is not finite is seen.
struct RowMax {
  float value = 0;
  int32_t index = -1;
  float poison = 0;
};

}  // namespace specfast

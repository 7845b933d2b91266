"""MLX's own Metal kernels, unmodified, in our emulator: they compute what they should, and the byte counter shows how often they
read the weights and the cache. This is what the counts of our kernels are compared with.
"""

import sys
from functools import cache
from pathlib import Path

import metal_emulator
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "packaging" / "macos"))
import mlx_wheel

f32 = np.float32
# What MLX's utils.h gives these kernels, in the few forms they use; its other headers open Metal's own namespace.
PRELUDE = """
#include <metal_stdlib>
using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
template <typename U> struct Limits {
  static constexpr constant U max = numeric_limits<U>::max();
  static constexpr constant U finite_min = numeric_limits<U>::lowest();
};
template <typename I = int64_t>
METAL_FUNC I elem_to_loc(uint i, constant const int* shape, constant const int64_t* strides, int ndim) {
  I at = 0;
  for (int d = ndim - 1; d >= 0; d--) { at += I(i % shape[d]) * strides[d]; i /= shape[d]; }
  return at;
}
template <bool b, typename T, typename U> struct ConditionalType { typedef U type; };
template <typename T, typename U> struct ConditionalType<true, T, U> { typedef T type; };
struct complex64_t { float real, imag; };
template <int BM, typename... A> METAL_FUNC bool schedule_row_tile(thread A&&...) { return false; }
#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"
#include "mlx/backend/metal/kernels/quantized_utils.h"
#include "mlx/backend/metal/kernels/quantized.h"
#include "mlx/backend/metal/kernels/sdpa_vector.h"
"""
WIDE = """template [[host_name("wide_{v}")]] [[kernel]] decltype(affine_qmv_wide<float, 64, 4, {v}, 8, false>) affine_qmv_wide<float, 64, 4, {v}, 8, false>;
"""
OTHERS = """
template [[host_name("per_row")]] [[kernel]] decltype(affine_qmv_fast<float, 64, 4, false>) affine_qmv_fast<float, 64, 4, false>;
template [[host_name("matrix")]] [[kernel]] decltype(affine_qmm_t<float, 64, 4, true, false>) affine_qmm_t<float, 64, 4, true, false>;
template [[host_name("attention")]] [[kernel]] decltype(sdpa_vector<float, 64>) sdpa_vector<float, 64>;
"""
CONSTANTS = {**dict.fromkeys((200, 201, 202), True), **dict.fromkeys(range(20, 26), False), 26: 1}
N, K = 64, 1024


@cache
def mlx_kernels(mode: str) -> metal_emulator.Program:
    try:
        wheel = mlx_wheel.unpacked()
    except mlx_wheel.FetchError as missing:
        pytest.skip(str(missing))
    # This one header opens Metal's namespace, to define what our shim has.
    stub = Path(metal_emulator.build.DIRECTORY) / "mlx_headers"
    traits = stub / "mlx/backend/metal/kernels/steel/utils/type_traits.h"
    traits.parent.mkdir(parents=True, exist_ok=True)
    traits.write_text(
        "#pragma once\ntemplate <class T> struct pointer_element;\n"
        "template <class T> struct pointer_element<T*> { using type = remove_cv_t<T>; };\n"
        "template <class T> using pointer_element_t = typename pointer_element<remove_cv_t<T>>::type;\n"
    )
    text = PRELUDE + "".join(WIDE.format(v=v) for v in range(1, 6)) + OTHERS
    return metal_emulator.compile(text, mode=mode, include=[stub, wheel / "mlx/include"], constants=CONSTANTS)


@cache
def weights():
    rng = np.random.default_rng(5)
    q = rng.integers(0, 16, (N, K), dtype=np.uint32)
    packed = (q.reshape(N, K // 8, 8) << (4 * np.arange(8, dtype=np.uint32))).sum(2, dtype=np.uint32)
    scales, biases = rng.uniform(0.01, 0.02, (N, K // 64)).astype(f32), rng.normal(0, 0.1, (N, K // 64)).astype(f32)
    return packed, scales, biases, q * np.repeat(scales, 64, 1).astype(np.float64) + np.repeat(biases, 64, 1)


def matmul(kernel: str, M: int, mode: str = "count"):
    """Runs one of MLX's quantised products as MLX launches it; gives its counters."""
    packed, scales, biases, dense = weights()
    x = np.random.default_rng(M).normal(size=(M, K)).astype(f32)
    y = np.full((M, N), np.nan, f32)
    sizes = [np.array(n, np.int32) for n in (K, N)]
    rest = [
        np.zeros((), np.int32),
        np.zeros(1, np.int32),
        np.zeros(1, np.int64),
        np.zeros((), np.int32),
        np.zeros(1, np.int32),
    ]
    rest += [np.zeros(1, np.int64)] * 3
    rows, name, grid, threads = [np.array(M, np.int32)], kernel, (M, N // 8, 1), (32, 2, 1)
    if kernel == "per_row":
        rows = []
    elif kernel == "wide":
        tile = -(-M // -(-M // 5))
        name, grid = f"wide_{tile}", (-(-M // tile), N // 8, 1)
    else:
        grid, threads = (N // 32, -(-M // 32), 1), (32, 2, 2)
    counters = mlx_kernels(mode).run(
        name, grid, threads, [packed, scales, biases, x, y, *sizes, *rows, *rest], schedule=1
    )
    reference = x.astype(np.float64) @ dense.T
    assert np.abs(y - reference).max() < 2e-5 * np.abs(reference).max()
    return counters


@pytest.mark.parametrize("M", range(1, 10))
def test_the_wide_kernel_reads_the_weights_twice_from_six_rows_on(M):
    """affine_qmv_wide, which MLX runs on M3 and later: tiles of at most five rows."""
    packed, scales, *_ = weights()
    counters = matmul("wide", M)
    passes = 1 if M <= 5 else 2
    assert counters.unique_read_bytes[0] == packed.nbytes
    assert counters.read_bytes[0] == passes * packed.nbytes
    assert counters.read_bytes[1] == passes * scales.nbytes


@pytest.mark.parametrize("M", [1, 4])
def test_the_per_row_kernel_reads_the_weights_for_each_row(M):
    """affine_qmv_fast, which MLX runs on M1 and M2."""
    assert matmul("per_row", M).read_bytes[0] == M * weights()[0].nbytes


def test_the_matrix_kernel_reads_the_weights_once_for_32_rows():
    assert matmul("matrix", 9).read_bytes[0] == weights()[0].nbytes


@pytest.mark.parametrize("M", [1, 3])
def test_attention_reads_the_cache_for_each_row_and_query_head(M):
    heads, kv_heads, length, D = 8, 2, 77, 64
    rng = np.random.default_rng(M)
    q, k, v = (rng.normal(size=(h, n, D)).astype(f32) for h, n in ((heads, M), (kv_heads, length), (kv_heads, length)))
    out, none = np.zeros((heads, M, D), f32), np.zeros(1, f32)
    sizes = [np.array(n, np.int32) for n in (heads // kv_heads, length)]
    strides = [np.array(n, np.uint64) for n in (length * D, D, length * D, D)]
    zeros = [np.zeros((), np.int32)] * 3
    buffers = [q, k, v, out, *sizes, *strides, np.array(D**-0.5, f32), np.zeros(1, bool), none, *zeros, none, zeros[0]]
    counters = mlx_kernels("count").run("attention", (heads, M, 1), (1024, 1, 1), buffers)
    scores = q @ np.repeat(k, heads // kv_heads, 0).transpose(0, 2, 1).astype(np.float64) * D**-0.5
    p = np.exp(scores - scores.max(2, keepdims=True))
    reference = p / p.sum(2, keepdims=True) @ np.repeat(v, heads // kv_heads, 0)
    assert np.abs(out - reference).max() < 2e-6 * np.abs(reference).max()
    assert counters.read_bytes[1] == M * (heads // kv_heads) * k.nbytes
    assert counters.read_bytes[2] == M * (heads // kv_heads) * v.nbytes

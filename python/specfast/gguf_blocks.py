"""GGUF's quantised blocks in MLX's affine layout, weight for weight the same values.

Q4_0, Q4_1 and Q4_K become 4 bits, Q8_0 and Q5_K 8 bits, in groups of 32 with a scale and a bias: w = scale * q + bias. Scales and
biases are f16 where that holds them, else f32. Q6_K scales groups of 16, which the kernels do not have: it becomes f32.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .safetensors_file import TensorView

GROUP = 32
BITS: Mapping[str, int] = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_K": 8, "Q8_0": 8}
CHUNK_BYTES = 1 << 22

Bytes = npt.NDArray[np.uint8]
Affine = tuple[Bytes, npt.NDArray[np.float32], npt.NDArray[np.float32]]  # q (groups, 32), scales and biases (groups,)


def _f16(blocks: Bytes, at: int) -> npt.NDArray[np.float32]:
    """The f16 at a byte of every block, exactly."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0].astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """(n, b) bytes to (n, 2 b) values: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _q4_0(blocks: Bytes) -> Affine:
    # 18 bytes: f16 d; 16 bytes of nibbles. w = d (q - 8)
    d = _f16(blocks, 0)
    return _nibbles(blocks[:, 2:]), d, -8 * d


def _q4_1(blocks: Bytes) -> Affine:
    # 20 bytes: f16 d, f16 m; 16 bytes of nibbles. w = d q + m
    return _nibbles(blocks[:, 4:]), _f16(blocks, 0), _f16(blocks, 2)


def _q8_0(blocks: Bytes) -> Affine:
    # 34 bytes: f16 d; 32 int8. w = d q, with q + 128 as an unsigned byte
    d = _f16(blocks, 0)
    return blocks[:, 2:] ^ np.uint8(128), d, -128 * d


def _k_scales(blocks: Bytes) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scale and bias of the 8 groups of Q4_K and Q5_K: 6-bit factors of the block's d, and of its minimum, less."""
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    least = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    scales, biases = _f16(blocks, 0)[:, None] * scale, -_f16(blocks, 2)[:, None] * least
    return scales.reshape(-1).astype(np.float32), biases.reshape(-1).astype(np.float32)


def _k_nibbles(packed: Bytes) -> Bytes:
    """Nibbles of 256 weights, (n, 128) to (n, 256): 32 bytes hold 32 weights and the 32 after them."""
    chunks = packed.reshape(len(packed), 4, 1, 32)
    return np.concatenate([chunks & 15, chunks >> 4], axis=2).reshape(len(packed), 256)


def _q4_k(blocks: Bytes) -> Affine:
    # 144 bytes: f16 d, f16 dmin; 12 bytes of factors; 128 bytes of nibbles. w = d s q - dmin m
    return _k_nibbles(blocks[:, 16:]).reshape(-1, GROUP), *_k_scales(blocks)


def _q5_k(blocks: Bytes) -> Affine:
    # 176 bytes: as Q4_K, with 32 bytes of fifth bits before the nibbles: bit g of byte i is of weight i of group g
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    low = _k_nibbles(blocks[:, 48:]).reshape(len(blocks), 8, GROUP)
    return (low | high << np.uint8(4)).reshape(-1, GROUP), *_k_scales(blocks)


def _q6_k(blocks: Bytes) -> npt.NDArray[np.float32]:
    # 210 bytes: 128 of low nibbles, 64 of upper bit pairs, 16 int8 scales, f16 d. w = d s (q - 32)
    low = blocks[:, :128].reshape(-1, 2, 1, 64)  # of each half: 64 bytes hold 64 weights and the 64 after them
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    q = (low | high << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = _f16(blocks, 208)[:, None] * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return (scales.astype(np.float32)[:, :, None] * q).astype(np.float32)


_AFFINE: dict[str, tuple[int, Callable[[Bytes], Affine]]] = {
    "Q4_0": (18, _q4_0), "Q4_1": (20, _q4_1), "Q8_0": (34, _q8_0), "Q4_K": (144, _q4_k), "Q5_K": (176, _q5_k),
}  # fmt: skip
_Q6_K_BYTES = 210


def _fits_f16(values: npt.NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values, equal_nan=True))


def _pages(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """New memory in pages of its own, which the system has back as soon as it is let go."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    own = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(own, dtype).reshape(shape)


def _stored(dtype: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> TensorView:
    return TensorView(dtype, shape, array.view(np.uint8).reshape(-1))


def _narrowed(dtype: str, values: npt.NDArray[np.float32], shape: tuple[int, ...]) -> TensorView:
    out = _pages(shape, np.float16 if dtype == "F16" else np.float32)
    out[:] = values.reshape(shape)
    return _stored(dtype, out, shape)


def affine(tensor: TensorView) -> dict[str, TensorView]:
    """A quantised matrix (N, K) as "weight" (words), "scales" and "biases" of MLX's layout, in new memory.

    Args:
        tensor: of one of the types BITS names; K is a multiple of the type's block.
    """
    N, K = tensor.shape
    size, unpack = _AFFINE[tensor.dtype]
    bits, groups = BITS[tensor.dtype], N * K // GROUP
    blocks = tensor.data.reshape(-1, size)
    packed = _pages((groups, GROUP * bits // 8), np.uint8)
    scales, biases = np.empty(groups, np.float32), np.empty(groups, np.float32)
    step = CHUNK_BYTES // size
    per_block = groups // len(blocks)
    for first in range(0, len(blocks), step):
        with np.errstate(all="ignore"):  # values that are not finite are seen in the logits
            q, scale, bias = unpack(blocks[first : first + step])
        part = slice(first * per_block, first * per_block + len(q))
        packed[part] = q if bits == 8 else q[:, 0::2] | (q[:, 1::2] << 4)
        scales[part], biases[part] = scale, bias
    dtype = "F16" if _fits_f16(scales) and _fits_f16(biases) else "F32"
    return {
        "weight": _stored("U32", packed, (N, K * bits // 32)),
        "scales": _narrowed(dtype, scales, (N, K // GROUP)),
        "biases": _narrowed(dtype, biases, (N, K // GROUP)),
    }


def q6_k_as_f32(tensor: TensorView) -> TensorView:
    """A Q6_K matrix as float32, exactly: 11 bits of d, 7 of a scale and 6 of q are 24."""
    blocks = tensor.data.reshape(-1, _Q6_K_BYTES)
    values = _pages((len(blocks), 256), np.float32)
    step = CHUNK_BYTES // 1024
    for first in range(0, len(blocks), step):
        with np.errstate(all="ignore"):
            part = _q6_k(blocks[first : first + step])
        values[first : first + step] = part.reshape(len(part), 256)
    return _stored("F32", values, tensor.shape)

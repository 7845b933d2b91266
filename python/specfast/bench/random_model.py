"""Models with random weights of real shapes, made in memory: speed does not depend on what the weights are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import ConfigurationError
from .shapes import Shape

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]
QUANTS = ("q4g32", "q4g64", "q4g128", "q8g32", "q8g64", "q8g128", "bf16", "f16", "f32")
_POOL_BYTES = 1 << 24


def _bf16_bytes(values: npt.NDArray[np.float32]) -> Bytes:
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


class Maker:
    """Cuts matrices out of a pool of random bytes; every matrix gets its own memory."""

    def __init__(self, quant: str, seed: int) -> None:
        if quant not in QUANTS:
            raise ConfigurationError(f"quantisation {quant!r} is unknown; choose one of {', '.join(QUANTS)}")
        self.format, _, group = quant.partition("g")
        self.group = int(group or 0)
        self.random = np.random.default_rng(seed)
        self.pool = self.random.integers(0, 256, _POOL_BYTES + 8192, dtype=np.uint8)

    def bytes(self, size: int) -> Bytes:
        out = np.empty(size, dtype=np.uint8)
        for first in range(0, size, _POOL_BYTES):
            part = out[first : first + _POOL_BYTES]
            shift = int(self.random.integers(0, 8192))
            part[:] = self.pool[shift : shift + len(part)]
        return out

    def quantised(self, N: int, K: int) -> tuple[Bytes, Bytes, Bytes]:
        """Words, scales and biases (bf16) of a matrix whose products have about unit size."""
        bits = int(self.format[1])
        spread = 0.2 / np.sqrt(K)
        scales = (spread * self.random.uniform(0.7, 1.3, N * K // self.group) * 16 / 2**bits).astype(np.float32)
        biases = (-scales * np.float32(2**bits * 0.475)).astype(np.float32)
        return self.bytes(N * K * bits // 8), _bf16_bytes(scales), _bf16_bytes(biases)

    def matrix(self, N: int, K: int) -> _core.Matrix:
        if self.group:
            weight, scales, biases = self.quantised(N, K)
            return _core.Matrix(
                self.format, N, K, weight, group=self.group, scales=scales, biases=biases, scale_format="bf16"
            )
        spread = 0.2 / np.sqrt(K)
        tile = (self.random.standard_normal(1 << 20) * spread * 4).astype(np.float32)
        raw = {"bf16": _bf16_bytes(tile), "f16": tile.astype(np.float16).view(np.uint8), "f32": tile.view(np.uint8)}[
            self.format
        ]
        return _core.Matrix(self.format, N, K, np.resize(raw, N * K * (4 if self.format == "f32" else 2)))


def check_groups(shape: Shape, quant: str) -> None:
    """Refuses a quantisation whose groups do not divide a shape.

    Raises:
        ConfigurationError: names the sizes.
    """
    group = int(quant.partition("g")[2] or 0)
    columns = (shape.hidden, shape.intermediate, shape.heads * shape.head_dim)
    if group and any(k % group for k in columns):
        raise ConfigurationError(f"{shape.name} cannot be quantised in groups of {group}: its sizes are {columns}")


def random_model(
    shape: Shape,
    quant: str,
    *,
    max_context: int = 8192,
    seed: int = 0,
    isa: str | None = None,
    pack: bool = True,
    kv_bits: int = 16,
    progress: Progress | None = None,
) -> _core.Model:
    """A model of a shape whose logits are finite and whose weights are cold: each lies in memory of its own.

    Raises:
        ConfigurationError: an unknown quantisation, or one whose groups do not divide the shape.
    """
    make = Maker(quant, seed)
    check_groups(shape, quant)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ones = np.ones(shape.hidden, dtype=np.float32)
    layers: list[dict[str, Any]] = []
    for index in range(shape.layers):
        layer: dict[str, Any] = {
            "q": make.matrix(q, shape.hidden), "k": make.matrix(kv, shape.hidden), "v": make.matrix(kv, shape.hidden),
            "o": make.matrix(shape.hidden, q), "gate": make.matrix(shape.intermediate, shape.hidden),
            "up": make.matrix(shape.intermediate, shape.hidden), "down": make.matrix(shape.hidden, shape.intermediate),
            "input_norm": ones, "post_norm": ones,
        }  # fmt: skip
        if shape.qkv_bias:
            layer |= {
                "q_bias": np.zeros(q, np.float32),
                "k_bias": np.zeros(kv, np.float32),
                "v_bias": np.zeros(kv, np.float32),
            }
        layers.append(layer)
        if progress:
            progress(index + 1, shape.layers + 1)
    inv_freq = (500000.0 ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)).astype(np.float32)
    model = _core.Model(
        hidden=shape.hidden, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
        intermediate=shape.intermediate, vocab=shape.vocab, rms_eps=1e-5, rope_inv_freq=inv_freq, max_context=max_context,
        embed=make.matrix(shape.vocab, shape.hidden), head=None if shape.tied else make.matrix(shape.vocab, shape.hidden),
        norm=ones, layers=layers, precision="int8" if make.group else "f32" if make.format == "f32" else "bf16", isa=isa, pack=pack,
        kv_bits=kv_bits,
    )  # fmt: skip
    if progress:
        progress(shape.layers + 1, shape.layers + 1)
    return model

"""The table of kernels: which instantiation, grid, threadgroup and constants a shape takes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from ..errors import ShapeError

Activations = Literal["f16", "bf16", "f32"]
Epilogue = Literal["store", "bias", "residual", "silu_mul"]
Between = Literal["nothing", "bias", "qk_norm"]
Grid = tuple[int, int, int]

MAX_ROWS = 9  # of a tile
SPAN = 256  # positions of an attention span
HEAD_DIMS = (32, 64, 80, 96, 128, 256)

_TYPES = {"f16": "half", "bf16": "bfloat", "f32": "float"}
_OUTPUTS = 4  # weight rows of a simdgroup
_PAIR_OUTPUTS = 2  # of each of the two matrices of swiglu_rows
_NORM_SIMDGROUPS = 8
_IDS = 256  # vocabulary of a threadgroup of logits_rows
_LAW_IDS = 4096  # vocabulary of a threadgroup of the laws' kernels


@dataclass(frozen=True)
class Weights:
    """How a matrix is stored: MLX's affine layout at 4 or 8 bits, or, with bits 0, floats of the activations' type."""

    bits: int = 0
    group: int = 0

    def __post_init__(self) -> None:
        if (self.bits, self.group) != (0, 0) and (self.bits not in (4, 8) or self.group not in (32, 64, 128)):
            raise ShapeError(
                f"{self.bits} bits in groups of {self.group}; there are kernels for 4 and 8 bits at 32, 64 and 128"
            )

    def name(self, activations: Activations) -> str:
        return f"q{self.bits}g{self.group}" if self.bits else activations

    def type(self, activations: Activations) -> str:
        """The template argument."""
        T = _TYPES[activations]
        return f"Affine<{T}, {self.bits}, {self.group}>" if self.bits else f"Dense<{T}>"

    def check(self, K: int) -> None:
        """Raises ShapeError where rows of K inputs cannot be read in whole steps."""
        step = max(32, self.group) if self.bits else 8
        if K % step:
            raise ShapeError(f"K is {K}, but must be a multiple of {step} for these weights")


@dataclass(frozen=True)
class Kernel:
    """One instantiation of a kernel of metal/<stem>.metal.

    Attributes:
        stem: the file.
        function: the kernel in it.
        arguments: of the template; empty for a kernel that is none.
        name: the host name.
    """

    stem: str
    function: str
    arguments: tuple[str, ...] = ()
    name: str = ""

    @property
    def instantiation(self) -> str:
        """The line that gives the instantiation its host name; empty for a kernel that is no template."""
        if not self.arguments:
            return ""
        called = f"{self.function}<{', '.join(self.arguments)}>"
        return f'template [[host_name("{self.name}")]] [[kernel]] decltype({called}) {called};\n'


@dataclass(frozen=True)
class Launch:
    """A kernel on a shape.

    Attributes:
        kernel: which instantiation.
        grid: threadgroups.
        threadgroup: threads of each.
        dims: the kernel's last buffer, int32 constants; fewer than 8. Empty where it has none.
    """

    kernel: Kernel
    grid: Grid
    threadgroup: Grid
    dims: tuple[int, ...] = ()


def _kernel(stem: str, function: str, arguments: tuple[object, ...], *labels: str) -> Kernel:
    return Kernel(stem, function, tuple(map(str, arguments)), "_".join((function, *labels)))


def _plain(stem: str, function: str) -> Kernel:
    return Kernel(stem, function, (), function)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _bits(x: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", x))[0])


def _check_rows(M: int) -> None:
    if not 1 <= M <= MAX_ROWS:
        raise ShapeError(f"{M} rows; a kernel takes 1 to {MAX_ROWS}, more are cut into tiles")


def embed_rows(weights: Weights, activations: Activations, *, M: int, V: int, K: int, first: int = 0) -> Launch:
    """weight, scales, biases, tokens, y, dims."""
    weights.check(K)
    arguments = (_TYPES[activations], weights.type(activations))
    kernel = _kernel("embed_rows", "embed_rows", arguments, weights.name(activations), activations)
    return Launch(kernel, (_ceil(K, 256), M, 1), (32, 1, 1), (V, K, first))


def norm_rows(activations: Activations, *, M: int, K: int, eps: float) -> Launch:
    """x, weight, y, dims."""
    kernel = _kernel("norm_rows", "norm_rows", (_TYPES[activations], _NORM_SIMDGROUPS), activations)
    return Launch(kernel, (M, 1, 1), (32 * _NORM_SIMDGROUPS, 1, 1), (K, _bits(eps)))


def matmul_rows(
    weights: Weights, activations: Activations, *, M: int, N: int, K: int, epilogue: Epilogue = "store"
) -> Launch:
    """weight, scales, biases, x, operand, y, dims. Floats have no scales and biases: give any buffer."""
    _check_rows(M)
    weights.check(K)
    simdgroups = 2
    arguments = (_TYPES[activations], weights.type(activations), M, epilogue.upper(), _OUTPUTS, simdgroups)
    labels = (weights.name(activations), activations, f"m{M}", epilogue)
    kernel = _kernel("matmul_rows", "matmul_rows", arguments, *labels)
    return Launch(kernel, (_ceil(N, _OUTPUTS * simdgroups), 1, 1), (32 * simdgroups, 1, 1), (N, K))


def swiglu_rows(weights: Weights, activations: Activations, *, M: int, N: int, K: int) -> Launch:
    """gate_weight, gate_scales, gate_biases, up_weight, up_scales, up_biases, x, h, dims."""
    _check_rows(M)
    weights.check(K)
    simdgroups = 2
    arguments = (_TYPES[activations], weights.type(activations), M, _PAIR_OUTPUTS, simdgroups)
    kernel = _kernel("swiglu_rows", "swiglu_rows", arguments, weights.name(activations), activations, f"m{M}")
    return Launch(kernel, (_ceil(N, _PAIR_OUTPUTS * simdgroups), 1, 1), (32 * simdgroups, 1, 1), (N, K))


def qkv_rope_append(
    weights: Weights,
    activations: Activations,
    *,
    M: int,
    K: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    eps: float,
    ahead: int = 0,
    between: Between = "nothing",
) -> Launch:
    """q_weight, q_scales, q_biases, the same of k and v, x, inv_freq, bias, norms, state, q, keys, values, dims."""
    _check_rows(M)
    weights.check(K)
    check_heads(heads, kv_heads, head_dim)
    simdgroups = 8 if head_dim < 64 else 16  # there are few heads, so each threadgroup is large
    T = _TYPES[activations]
    arguments = (T, weights.type(activations), M, head_dim, between.upper(), _OUTPUTS, simdgroups)
    labels = (weights.name(activations), activations, f"m{M}", f"d{head_dim}", between)
    kernel = _kernel("qkv_rope_append", "qkv_rope_append", arguments, *labels)
    dims = (K, heads, kv_heads, capacity, ahead, _bits(eps))
    return Launch(kernel, (heads + 2 * kv_heads, 1, 1), (32 * simdgroups, 1, 1), dims)


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Raises ShapeError where there is no kernel for such heads."""
    if kv_heads < 1 or heads % kv_heads:
        raise ShapeError(f"{heads} heads share {kv_heads} kv heads; every kv head must serve as many")
    if head_dim not in HEAD_DIMS:
        raise ShapeError(f"head_dim is {head_dim}; there are kernels for {', '.join(map(str, HEAD_DIMS))}")


def attend_rows(
    activations: Activations,
    *,
    M: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    positions: int,
    ahead: int = 0,
) -> Launch:
    """q, keys, values, state, partial, dims. `positions` are at least those in the cache, the M new ones included.

    partial is (ceil(positions / SPAN), M, heads, head_dim + 2) float32.
    """
    _check_rows(M)
    check_heads(heads, kv_heads, head_dim)
    if activations == "f32" and head_dim > 128:
        raise ShapeError(f"head_dim {head_dim} in float32 does not fit threadgroup memory; use f16 or bf16")
    queries = M * (heads // kv_heads)
    most = 16 if head_dim <= 128 else 8  # simdgroups that hold their queries' sums in registers
    held = next((n for n in (1, 2, 4) if queries <= 8 * n), 8)  # queries of a simdgroup
    chunks = _ceil(queries, held * most)  # only these read keys again
    simdgroups = _ceil(_ceil(queries, chunks), held)
    arguments = (_TYPES[activations], head_dim, held)
    kernel = _kernel("attend_rows", "attend_rows", arguments, activations, f"d{head_dim}", f"q{held}")
    dims = (M, heads, kv_heads, capacity, ahead)
    return Launch(kernel, (kv_heads, _ceil(positions, SPAN), chunks), (32 * simdgroups, 1, 1), dims)


def attend_spans(activations: Activations, *, M: int, heads: int, head_dim: int, ahead: int = 0) -> Launch:
    """partial, state, out, dims."""
    kernel = _kernel("attend_rows", "attend_spans", (_TYPES[activations], head_dim), activations, f"d{head_dim}")
    return Launch(kernel, (heads, M, 1), (32, 1, 1), (M, heads, 0, 0, ahead))


def logits_rows(weights: Weights, activations: Activations, *, M: int, V: int, K: int, limit: int) -> Launch:
    """weight, scales, biases, x, logits, parts, dims. parts is (M, ceil(V / 256), 4) float32."""
    _check_rows(M)
    weights.check(K)
    simdgroups = 8
    arguments = (_TYPES[activations], weights.type(activations), M, _OUTPUTS, simdgroups)
    kernel = _kernel("logits_rows", "logits_rows", arguments, weights.name(activations), activations, f"m{M}")
    return Launch(kernel, (_ceil(V, _IDS), 1, 1), (32 * simdgroups, 1, 1), (V, K, limit))


def logits_best(*, M: int, V: int) -> Launch:
    """parts, best, dims. best is (M, 4) float32: maximum, id, poison, sum of exp(logit - maximum)."""
    return Launch(_plain("logits_rows", "logits_best"), (M, 1, 1), (32, 1, 1), (_ceil(V, _IDS),))


def law_weights(*, M: int, V: int, limit: int, temperature: float) -> Launch:
    """logits, best, weights, masses, dims. masses is (M, ceil(V / 256)) uint64."""
    dims = (V, limit, _bits(min(1.0 / temperature, 3.4028234663852886e38)))
    return Launch(_plain("law_rows", "law_weights"), (_ceil(V, _LAW_IDS), M, 1), (256, 1, 1), dims)


def law_scales(*, M: int, V: int, limit: int) -> Launch:
    """masses, scales, dims. scales is (M,) uint64."""
    return Launch(_plain("law_rows", "law_scales"), (M, 1, 1), (32, 1, 1), (V, limit))


def law_rows(*, M: int, V: int) -> Launch:
    """weights, scales, p, dims."""
    return Launch(_plain("law_rows", "law_rows"), (_ceil(V, 1024), M, 1), (256, 1, 1), (V,))


def verify_scan() -> Launch:
    """p, q, tokens, settings, prefixes. prefixes is (gamma + 1,) uint64."""
    return Launch(_plain("verify_tokens", "verify_scan"), (1, 1, 1), (32, 1, 1))


def verify_masses(*, gamma: int, V: int) -> Launch:
    """p, q, tokens, settings, prefixes, masses. masses is (gamma + 1, ceil(V / 256)) uint64."""
    return Launch(_plain("verify_tokens", "verify_masses"), (_ceil(V, _LAW_IDS), gamma + 1, 1), (256, 1, 1))


def verify_pick() -> Launch:
    """p, q, tokens, settings, prefixes, out, masses."""
    return Launch(_plain("verify_tokens", "verify_pick"), (1, 1, 1), (32, 1, 1))


def verify_greedy() -> Launch:
    """best, tokens, settings, out."""
    return Launch(_plain("verify_tokens", "verify_greedy"), (1, 1, 1), (32, 1, 1))


def couple_rows(*, M: int, V: int) -> Launch:
    """weights, state, settings, leaders. leaders is (M, ceil(V / 4096), 3) uint32."""
    return Launch(_plain("couple_tokens", "couple_rows"), (_ceil(V, _LAW_IDS), M, 1), (256, 1, 1))


def couple_pick() -> Launch:
    """leaders, tokens, settings, out."""
    return Launch(_plain("couple_tokens", "couple_pick"), (1, 1, 1), (32, 1, 1))


def commit_round() -> Launch:
    """verdict, tokens, state, text."""
    return Launch(_plain("kv_cache", "commit_round"), (1, 1, 1), (32, 1, 1))


def compact_path(
    activations: Activations, *, count: int, kv_heads: int, head_dim: int, capacity: int, to_cache: bool
) -> Launch:
    """path, state, scratch, keys, values, dims. Two launches: out of the cache to scratch, then back."""
    check_heads(kv_heads, kv_heads, head_dim)
    arguments = (_TYPES[activations], head_dim, int(to_cache))
    labels = (activations, f"d{head_dim}", "in" if to_cache else "out")
    kernel = _kernel("kv_cache", "compact_path", arguments, *labels)
    return Launch(kernel, (count, 2 * kv_heads, 1), (32, 1, 1), (kv_heads, capacity))

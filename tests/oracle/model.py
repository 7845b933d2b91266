"""A Llama, Mistral, Qwen2 or Qwen3 decoder in float64: the whole text is recomputed, there is no cache."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass
class Layer:
    """Weights (outputs, inputs); biases only in Qwen2, q_norm and k_norm (head_dim,) only in Qwen3.

    window: positions up to its own that a row attends to, and `sinks` first ones besides; None is all.
    """

    input_norm: Array
    q: Array
    k: Array
    v: Array
    o: Array
    post_norm: Array
    gate: Array
    up: Array
    down: Array
    q_bias: Array | None = None
    k_bias: Array | None = None
    v_bias: Array | None = None
    q_norm: Array | None = None
    k_norm: Array | None = None
    window: int | None = None
    sinks: int = 0


@dataclass
class Decoder:
    """embed and head: (V, hidden); head None means tied. inv_freq: (head_dim / 2,), rope scaling already applied.

    group_of: name of a matrix ("q", ..., "down", "head") to the size of its quantisation groups. The inputs of these
    matrices are rounded as int8 kernels round them; empty means exact activations.
    int8_kv: keys and values are rounded as an 8-bit cache rounds them.
    """

    heads: int
    kv_heads: int
    rms_eps: float
    inv_freq: Array
    embed: Array
    norm: Array
    layers: list[Layer]
    head: Array | None = None
    group_of: dict[str, int] = field(default_factory=dict)
    int8_kv: bool = False


def rmsnorm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x: Array, inv_freq: Array) -> Array:
    """RoPE of x (M, heads, head_dim) at positions 0..M-1: pairs (i, i + head_dim / 2), "rotate_half"."""
    angle = np.arange(len(x))[:, None, None] * inv_freq
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def attend(q: Array, k: Array, v: Array, window: int | None = None, sinks: int = 0) -> Array:
    """Causal attention. q: (M, heads, d); k, v: (M, kv_heads, d), each shared by heads / kv_heads neighbours.

    Row i sees key j if j <= i and, with a window, i - j < window (Jiang et al. 2023, Sec. 2, arXiv:2310.06825) or
    j < sinks (Xiao et al. 2023, Sec. 3.2, arXiv:2309.17453).
    """
    share = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, share, 1), np.repeat(v, share, 1)
    scores = np.einsum("mhd,nhd->hmn", q, k) / np.sqrt(q.shape[-1])
    scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
    if window is not None:
        left = np.tril(np.full(scores.shape[1:], -np.inf), -window)
        left[:, :sinks] = 0
        scores += left
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hmn,nhd->mhd", weights / weights.sum(-1, keepdims=True), v)


def round_to_int8(x: Array, group: int, most: int = 64) -> Array:
    """x (M, K) as int8 activations see it: per row and block of min(group, most), scale max|x| / 127, ties to even."""
    block = min(group, most)
    blocks = x.reshape(len(x), -1, block)
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.rint(blocks / np.where(scale > 0, scale, 1)) * scale).reshape(x.shape)


def round_vectors(x: Array) -> Array:
    """x (M, heads, d) as an 8-bit cache keeps it: per vector, scale max|x| / 127, ties to even."""
    return round_to_int8(x.reshape(len(x), -1), x.shape[-1], x.shape[-1]).reshape(x.shape)


def affine_groups(x: Array, bits: int, group: int) -> Array:
    """x (..., d) as MLX's affine codes keep it: per group, of the ends of its range the one further from 0 is exact and 0
    a whole number of steps away, ties to even. In the type of x: a code next to a tie depends on it."""
    groups = x.reshape(*x.shape[:-1], -1, group)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    far = np.where(-low > high, low, high)
    step = np.maximum((high - low) / (2**bits - 1), 1e-7)
    step = np.where(-low > high, step, -step)
    steps = np.rint(far / step)
    step = np.where(steps != 0, far / np.where(steps != 0, steps, 1), step)
    bias = np.where(steps != 0, far, 0 * far)
    codes = np.clip(np.rint((groups - bias) / step), 0, 2**bits - 1)
    return (codes * step + bias).reshape(x.shape)


def dequantise(packed: ArrayLike, scales: ArrayLike, biases: ArrayLike, bits: int, group: int) -> Array:
    """MLX's affine groups. packed: (N, K * bits / 32) uint32, lowest bits first; scales, biases: (N, K / group)."""
    words = np.asarray(packed, np.uint32)[..., None]
    q = (words >> (np.arange(0, 32, bits, dtype=np.uint32))) & np.uint32(2**bits - 1)
    q = q.reshape(len(q), -1).astype(np.float64)
    return q * np.repeat(scales, group, 1).astype(np.float64) + np.repeat(biases, group, 1).astype(np.float64)


def forward(model: Decoder, tokens: ArrayLike) -> Array:
    """Logits (M, V) after every one of the tokens (M,)."""

    def project(x: Array, w: Array, name: str, bias: Array | None = None) -> Array:
        group = model.group_of.get(name)
        y = (round_to_int8(x, group) if group else x) @ w.T
        return y if bias is None else y + bias

    x = model.embed[np.asarray(tokens)]
    M = len(x)
    for w in model.layers:
        h = rmsnorm(x, w.input_norm, model.rms_eps)
        q = project(h, w.q, "q", w.q_bias).reshape(M, model.heads, -1)
        k = project(h, w.k, "k", w.k_bias).reshape(M, model.kv_heads, -1)
        v = project(h, w.v, "v", w.v_bias).reshape(M, model.kv_heads, -1)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = rmsnorm(q, w.q_norm, model.rms_eps), rmsnorm(k, w.k_norm, model.rms_eps)
        q, k = rotate(q, model.inv_freq), rotate(k, model.inv_freq)
        if model.int8_kv:
            k, v = round_vectors(k), round_vectors(v)
        attended = attend(q, k, v, w.window, w.sinks)
        x = x + project(attended.reshape(M, -1), w.o, "o")
        h = rmsnorm(x, w.post_norm, model.rms_eps)
        gate = project(h, w.gate, "gate")
        x = x + project(gate / (1 + np.exp(-gate)) * project(h, w.up, "up"), w.down, "down")
    head = model.embed if model.head is None else model.head
    return project(rmsnorm(x, model.norm, model.rms_eps), head, "head")

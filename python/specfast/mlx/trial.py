"""Runs a model's Metal kernels on a few rows before anything relies on them: this GPU and its compiler may be new to them."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from .. import metal
from ..errors import KernelTrialError
from ..metal.trial import CUTS, ROWS, difference
from .metal import MetalForward

POSITIONS = metal.SPAN - 4  # in the caches before: the rows see one span of attention, or two


def run(forward: MetalForward, model: nn.Module) -> None:
    """Tries a model's kernels, or those of a range of its layers, against mlx-lm's layers and against themselves.

    Nine rows after random keys and values of 252 positions: in one pass, in passes of 4, 4 and 1, and through mlx-lm's layers.
    Where only launches that write the caches in place fail, a RuntimeWarning says so.

    Args:
        forward: to be tried. Its `in_place` is False afterwards where it passed only so.
        model: the same layers as mlx-lm's modules, not accelerated.

    Raises:
        KernelTrialError: MLX does not run the kernels, or they give values that are not finite, logits or hidden rows further
            from mlx-lm's than LIMITS, or a row other bits beside other rows.
    """
    refusal = _refusal(forward, model)
    if refusal and forward.in_place:
        forward.in_place = False
        in_place, refusal = refusal, _refusal(forward, model)
        if not refusal:
            warnings.warn(f"{in_place}; without specfast._mlx they passed, and run so", RuntimeWarning, stacklevel=3)
    if refusal:
        raise KernelTrialError(f"{refusal}; mlx-lm's layers run instead")


def _refusal(forward: MetalForward, model: nn.Module) -> str:
    """What was found; "" where the kernels can be relied on."""
    rows, held = _rows(forward), _keys_and_values(forward)
    expected = _by_modules(forward, model, rows, _caches(forward, held))
    mx.eval(expected)
    try:
        whole, parts = (_by_kernels(forward, rows, _caches(forward, held), cuts) for cuts in CUTS)
        mx.eval(whole, parts)
    except Exception as error:  # whatever it is, they do not run here
        said = " ".join(f"{type(error).__name__}: {error}".split())
        found = f"MLX did not run them ({said[:400]})"
    else:
        found = _difference(forward, expected, whole, parts)
    return f"specfast's Metal kernels failed their trial{_where()}: {found}" if found else ""


def _difference(forward: MetalForward, expected: mx.array, whole: mx.array, parts: mx.array) -> str:
    by_modules, in_one, in_parts = (np.array(each.astype(mx.float32)) for each in (expected, whole, parts))
    what = "logits" if forward.last else "values of hidden rows"
    return difference(by_modules, in_one, in_parts, forward.activations, host="mlx-lm's layers", what=what)


def _rows(forward: MetalForward) -> mx.array:
    """Inputs of the range: tokens from all over the vocabulary, or random hidden rows."""
    if forward.first:
        return mx.arange(ROWS)[None] * (forward.config.vocab // ROWS)
    return mx.random.normal((1, ROWS, forward.config.hidden), key=mx.random.key(0)).astype(forward.dtype)


def _keys_and_values(forward: MetalForward) -> tuple[mx.array, mx.array]:
    """Random ones, the same for all layers; MLX's own random state stays."""
    shape = (1, forward.config.kv_heads, POSITIONS, forward.config.head_dim)
    keys, values = (mx.random.normal(shape, key=mx.random.key(i)).astype(forward.dtype) for i in (1, 2))
    return keys, values


def _caches(forward: MetalForward, held: tuple[mx.array, mx.array]) -> list[Any]:
    caches = forward.new_caches()
    for cache in caches:
        (cache.keys, cache.values), cache.offset = held, POSITIONS
    return caches


def _by_kernels(forward: MetalForward, rows: mx.array, caches: list[Any], cuts: tuple[int, ...]) -> mx.array:
    passes = [forward(rows[:, first:end], caches) for first, end in itertools.pairwise(cuts)]
    return mx.concatenate(passes, axis=1)[0]


def _by_modules(forward: MetalForward, model: nn.Module, rows: mx.array, caches: list[Any]) -> mx.array:
    """What mlx-lm's layers make of the same rows: (9, vocab) or (9, hidden) float32."""
    inner: Any = model.model
    seen = mx.arange(POSITIONS + ROWS)[None] <= POSITIONS + mx.arange(ROWS)[:, None]
    mask = mx.where(seen, 0, -mx.inf).astype(forward.dtype)
    x = inner.embed_tokens(rows) if forward.first else rows
    for index, cache in zip(forward.range, caches, strict=True):
        x = inner.layers[index](x, mask, cache)
    if forward.last:
        x = inner.norm(x)
        x = model.lm_head(x) if "lm_head" in model else inner.embed_tokens.as_linear(x)
    return x[0].astype(mx.float32)


def _where() -> str:
    """The GPU's name, as MLX of this version gives it."""
    try:
        name = (getattr(mx, "device_info", None) or mx.metal.device_info)().get("device_name")
    except RuntimeError:  # no GPU
        name = None
    return f" on {name}" if name else ""

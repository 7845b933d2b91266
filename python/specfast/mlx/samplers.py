"""mlx-lm's samplers and logits processors: recognised where their law is known, and applied in MLX's graph."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm import sample_utils

from .. import _core
from ..errors import ShapeError

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]
_MAKER = "make_sampler.<locals>."


def recognised(sampler: Sampler) -> dict[str, Any] | None:
    """temp, top_p, min_p and top_k of a sampler that mlx-lm's `make_sampler` made; None where its law is not known.

    Not known are samplers of other origin, and of make_sampler those with XTC, with min_tokens_to_keep above 1, or of
    versions that truncate differently.
    """
    if sampler is getattr(sample_utils, "greedy_sampler", None):
        return {"temp": 0.0}
    if _name(sampler) == _MAKER + "<lambda>":
        return _old_style(sampler)
    if _name(sampler) != _MAKER + "sampler":
        return None
    closure = inspect.getclosurevars(sampler).nonlocals
    if set(closure) != {"sampling_methods", "temp"}:
        return None
    options = {"temp": float(closure["temp"])}
    for method in closure["sampling_methods"]:
        found = dict(inspect.getclosurevars(method).nonlocals) if _name(method) == _MAKER + "<lambda>" else {}
        if found.pop("min_tokens_to_keep", 1) != 1 or len(found) != 1 or not set(found) <= {"top_p", "min_p", "top_k"}:
            return None
        options |= found
    return options


def _name(function: Any) -> str:
    ours = getattr(function, "__module__", None) == sample_utils.__name__
    return getattr(function, "__qualname__", "") if ours else ""


def _old_style(sampler: Sampler) -> dict[str, Any] | None:
    """Earlier versions have one lambda for each kind; only arg max and the plain temperature are taken."""
    variables = inspect.getclosurevars(sampler)
    called = set(variables.globals) | set(variables.unbound)
    if not variables.nonlocals and "argmax" in called:
        return {"temp": 0.0}
    if set(variables.nonlocals) == {"temp"} and "categorical_sampling" in called:
        return {"temp": float(variables.nonlocals["temp"])}
    return None


def processed(
    processors: Sequence[Processor], tokens: Sequence[int], drafted: mx.array | None, logits: mx.array, at: int = 0
) -> mx.array:
    """Logits (M, V) after mlx-lm's processors, each row with the tokens before it: row m follows at + m drafted tokens.

    Raises:
        ShapeError: a processor gives no logits.
    """
    if not processors:
        return logits
    before = mx.array(tokens, mx.uint32)
    history = before if drafted is None else mx.concatenate([before, drafted.astype(mx.uint32)])
    rows = []
    for m in range(int(logits.shape[0])):
        row = logits[m : m + 1]
        for processor in processors:
            made = processor(history[: len(tokens) + at + m], row)
            if not isinstance(made, mx.array) or made.shape != row.shape:
                raise ShapeError(
                    f"a logits processor gave {_shown(made)}, but must give an array of the shape of its logits, {row.shape}"
                )
            row = made
        rows.append(row)
    return mx.concatenate(rows, axis=0)


def sampled(sampler: Sampler, scores: mx.array) -> mx.array:
    """The sampler's token (1,) for log-probabilities (1, V).

    Raises:
        ShapeError: it gives no token, or several.
    """
    token = sampler(scores)
    if not isinstance(token, mx.array) or token.size != 1 or not mx.issubdtype(token.dtype, mx.integer):
        raise ShapeError(
            f"the sampler gave {_shown(token)}, but must give one token, an array of an integer, for log-probabilities of "
            f"shape {scores.shape}"
        )
    return token.reshape(-1)


def _shown(value: Any) -> str:
    return f"an array of shape {value.shape} in {value.dtype}" if isinstance(value, mx.array) else repr(value)[:100]


def rows_law(logits: mx.array, law: _core.Law) -> mx.array:
    """Unnormalised log-probabilities of a law over logits (M, V) float32, in MLX's graph: truncated, then tempered.

    A draft's law: what is drawn from them is judged by the very same numbers, so that rounding does not matter.
    """
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    floor = mx.full((int(logits.shape[0]), 1), -math.inf)
    if law.top_p < 1 or law.top_k > 0:
        ordered = mx.sort(scores, axis=-1)  # ascending
    if law.top_p < 1:
        above = mx.cumsum(mx.exp(ordered), axis=-1, reverse=True, inclusive=False)
        floor = mx.maximum(floor, mx.min(mx.where(above < law.top_p, ordered, math.inf), axis=-1, keepdims=True))
    if law.top_k > 0:
        first = max(0, int(logits.shape[-1]) - law.top_k)
        floor = mx.maximum(floor, ordered[:, first : first + 1])
    if law.min_p > 0:
        floor = mx.maximum(floor, mx.max(scores, axis=-1, keepdims=True) + math.log(law.min_p))
    return mx.where(scores >= floor, scores, -math.inf) / law.temperature

"""How far an accelerated model's logits are from those of mlx-lm's own layers, measured on a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map

from ..checkpoint import PRECISIONS
from ..errors import ConfigurationError, UnsupportedModelError
from .accelerate import accelerate, report, restore

ROWS = 64  # of logits that are compared at a time


@dataclass(frozen=True)
class Difference:
    """One precision against mlx-lm's layers, over the rows of a text.

    Attributes:
        precision: of the activations on specfast's kernels.
        kl: mean KL divergence of a row's law from the stock one, in nats, at temperature 1.
        greedy_agreement: share of rows with the same likeliest token.
        max_error: the largest difference of a logit over the largest logit.
        rows: how many rows were compared.
    """

    precision: str
    kl: float
    greedy_agreement: float
    max_error: float
    rows: int


def compare(
    model: nn.Module, tokens: Sequence[int], precisions: Sequence[str] = PRECISIONS, *, dtype: mx.Dtype | None = None
) -> list[Difference]:
    """Runs a text through mlx-lm's own layers and through specfast's kernels at each precision, and compares all rows.

    "Lossless" is always relative to plain decoding at the same precision; this is what the precision itself changes.
    The model is as before when this returns, accelerated if it was.

    Args:
        model: from `mlx_lm.load`; of those that `accelerate` takes.
        tokens: of the text, at least two.
        precisions: "int8", "bf16" and "f32".
        dtype: of the stock layers' arithmetic; None is the model's own. On x86 mlx accumulates a product in the
            activations' type: give mx.float32 to see specfast's rounding without mlx's.

    Raises:
        ConfigurationError: fewer than two tokens, or an unknown precision.
        UnsupportedModelError: a model that cannot be accelerated.
    """
    if len(tokens) < 2:
        raise ConfigurationError(f"the text has {len(tokens)} tokens, but at least 2 are needed to compare")
    before = report(model)
    restore(model)
    try:
        stock = _stock_logits(model, tokens, dtype)
        return [_difference(precision, stock, _own_logits(model, tokens, precision)) for precision in precisions]
    finally:
        restore(model)
        if before.path == "metal":
            accelerate(model)
        elif before.path != "stock":
            accelerate(model, before.precision, before.path)


def _stock_logits(model: nn.Module, tokens: Sequence[int], dtype: mx.Dtype | None) -> Any:
    if dtype is None:
        return _logits(model, tokens)
    held = model.parameters()
    model.update(tree_map(lambda x: x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x, held))
    try:
        return _logits(model, tokens)
    finally:
        model.update(held)


def _own_logits(model: nn.Module, tokens: Sequence[int], precision: str) -> Any:
    accelerate(model, precision)
    found = report(model)
    if found.path == "stock":
        raise UnsupportedModelError(f"there is nothing to compare: {found.reason}")
    return _logits(model, tokens)


def _logits(model: nn.Module, tokens: Sequence[int]) -> Any:
    """(n, vocab) float32."""
    return np.array(model(mx.array([list(tokens)]))[0].astype(mx.float32))


def _difference(precision: str, stock: Any, own: Any) -> Difference:
    divergence, agreed = 0.0, 0
    for first in range(0, len(stock), ROWS):
        logp, logq = (_log_softmax(rows[first : first + ROWS]) for rows in (stock, own))
        divergence += float((np.exp(logp) * (logp - logq)).sum())
        agreed += int((logp.argmax(1) == logq.argmax(1)).sum())
    error = float(np.abs(own - stock).max() / np.abs(stock).max())
    return Difference(precision, max(0.0, divergence / len(stock)), agreed / len(stock), error, len(stock))


def _log_softmax(rows: Any) -> Any:
    rows = rows.astype(np.float64) - rows.max(1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(1, keepdims=True))

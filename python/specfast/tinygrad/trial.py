"""Runs a model's Metal kernels on a few rows before anything relies on them: this GPU and its compiler may be new to them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

from ..errors import KernelTrialError
from ..metal.trial import CUTS, ROWS, difference
from .metal import MetalPath


def run(path: MetalPath, model: Any) -> None:
    """Tries a model's kernels against tinygrad's own layers and against themselves: nine rows in one pass, and in passes of 4, 4, 1.

    Args:
        path: to be tried.
        model: tinygrad.llm's Transformer, not accelerated; its caches are as before afterwards.

    Raises:
        KernelTrialError: tinygrad does not run the kernels, or they give logits that are not finite, that are further from
            tinygrad's than rounding goes, or that have other bits beside other rows.
    """
    ids = np.arange(ROWS, dtype=np.int32) * (path.config.vocab // ROWS)
    expected = _by_layers(model, ids, path.device)
    try:
        whole, parts = (_by_kernels(path, ids, cuts) for cuts in CUTS)
    except Exception as error:  # whatever it is, they do not run here
        said = " ".join(f"{type(error).__name__}: {error}".split())
        found = f"tinygrad did not run them ({said[:400]})"
    else:
        found = difference(expected, whole, parts, path.activations, host="tinygrad's layers")
    path.calls = 0
    if found:
        raise KernelTrialError(
            f"specfast's Metal kernels failed their trial on {path.device}: {found}; tinygrad's layers run instead"
        )


def _by_kernels(path: MetalPath, ids: npt.NDArray[np.int32], cuts: Sequence[int]) -> npt.NDArray[np.float32]:
    passes = [
        path.logits(_tokens(ids[first:end], path.device), first, last=False).numpy()
        for first, end in itertools.pairwise(cuts)
    ]
    return np.concatenate(passes)


def _by_layers(model: Any, ids: npt.NDArray[np.int32], device: str) -> npt.NDArray[np.float32]:
    """Logits (9, vocab) of tinygrad's own layers."""
    held = [set(vars(block)) for block in model.blk]
    try:
        x = model.token_embd(_tokens(ids, device)).float()
        for block in model.blk:
            x = block(x, 0)
        logits: npt.NDArray[np.float32] = model.output(model.output_norm(x)).float().numpy()[0]
        return logits
    finally:
        for block, before in zip(model.blk, held, strict=True):
            for name in set(vars(block)) - before:  # keys and values for a whole context
                delattr(block, name)


def _tokens(ids: npt.NDArray[np.int32], device: str) -> Tensor:
    return Tensor(ids[None], device=device).clone().realize()

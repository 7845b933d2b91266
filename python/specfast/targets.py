"""Targets: who decides what a round keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from . import _core
from .context import Context
from .drafters import Progress, prefill


@runtime_checkable
class Target(Protocol):
    """Checks a proposal in one pass and follows what was kept."""

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        """Reads the prompt, all but its last token."""

    def verify(self, context: Context, proposal: _core.Proposal | None) -> _core.Verdict:
        """Decides how many proposed tokens stay and which token follows; without a proposal this is plain decoding."""

    def commit(self, kept: int) -> None:
        """Keeps the rows of the context's tokens after a round that kept `kept` of them."""


class NativeTarget:
    """A model run by the native decoder: one call per round. Its cache holds all of the context but the last token."""

    def __init__(self, model: _core.Model, law: _core.Law, lenience: float, seed: int, capacity: int) -> None:
        self._model, self._law, self._lenience, self._seed = model, law, lenience, seed
        self._cache = _core.Cache(model, capacity)

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        prefill(self._model, self._cache, tokens, progress)

    def verify(self, context: Context, proposal: _core.Proposal | None) -> _core.Verdict:
        pending = np.asarray(context.tokens[self._cache.length :], dtype=np.int32)
        return self._model.verify(self._cache, pending, proposal, self._law, self._lenience, self._seed, context.round)

    def commit(self, kept: int) -> None:
        self._cache.commit(kept)

"""Drafters: who proposes the tokens a round checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from . import _core
from .context import Context

PREFILL_CHUNK = 256
Progress = Callable[[int, int], None]


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens and follows what the target kept."""

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        """Reads the prompt, all but its last token."""

    def propose(self, context: Context, gamma: int) -> _core.Proposal | None:
        """Drafts up to gamma tokens after the context; None when it has nothing to offer."""

    def commit(self, kept: int) -> None:
        """Follows the context after a round that kept `kept` tokens."""


def prefill(model: _core.Model, cache: _core.Cache, tokens: Sequence[int], progress: Progress | None) -> None:
    """Runs tokens through a model into its cache, in chunks so that it can be watched and interrupted."""
    for first in range(0, len(tokens), PREFILL_CHUNK):
        model.prefill(cache, np.asarray(tokens[first : first + PREFILL_CHUNK], dtype=np.int32))
        if progress:
            progress(min(first + PREFILL_CHUNK, len(tokens)), len(tokens))


class ModelDrafter:
    """A smaller model that drafts from its own law, one native call per round.

    Its cache never holds the context's last token, and after a round in which everything was accepted lacks one more;
    whatever is missing is read at the start of the next round.
    """

    def __init__(self, model: _core.Model, law: _core.Law, seed: int, capacity: int) -> None:
        self._model, self._law, self._seed = model, law, seed
        self._cache = _core.Cache(model, min(capacity, model.max_context))
        self._proposal = _core.Proposal()

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        prefill(self._model, self._cache, tokens, progress)

    def propose(self, context: Context, gamma: int) -> _core.Proposal | None:
        pending = np.asarray(context.tokens[self._cache.length :], dtype=np.int32)
        self._model.draft(self._cache, pending, gamma, self._law, self._seed, context.round, self._proposal)
        return self._proposal

    def commit(self, kept: int) -> None:
        self._cache.commit(min(kept - 1, self._cache.provisional))

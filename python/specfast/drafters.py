"""Drafters: who proposes the tokens a round checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from . import _core
from .context import Context
from .early_exit import Exit, candidate_exits, choose_exit, measure_acceptance
from .sampling import follow
from .targets import NativeTarget, Progress, prefill


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens after a context and follows what was kept. One per request, with its state."""

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        """Reads the prompt, all but its last token."""

    def propose(self, context: Context, gamma: int) -> _core.Proposal | None:
        """Drafts up to gamma tokens after the context; None when it has nothing to offer, as with gamma 0."""

    def commit(self, kept: int) -> None:
        """Follows a round that kept `kept` tokens, of which the last is not yet in any cache."""


class ModelDrafter:
    """A smaller model that drafts from its own law, one native call per round.

    Its cache never holds the context's last token, lacks one more after a round in which everything was accepted, and
    all of the rounds it sat out; what is missing is read at the start of its next round.

    Args:
        model: the draft, over the target's tokens.
        law: the target's law, so that both are truncated alike.
        seed: of the random streams.
        capacity: most tokens of the request.
        rule: the target's; the coupled rule shares its noise.
        adjustments: the target's edits of the logits before the law.
    """

    def __init__(
        self,
        model: _core.Model,
        law: _core.Law,
        seed: int,
        capacity: int,
        rule: str = "token",
        adjustments: _core.Adjustments | None = None,
    ) -> None:
        self._adjustments = adjustments
        self._model, self._law, self._seed, self._rule = model, law, seed, rule
        self.cache = _core.Cache(model, min(capacity, model.max_context))
        self._proposal = _core.Proposal()

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        if len(tokens) < self.cache.capacity:
            prefill(self._model, self.cache, tokens, progress)

    def propose(self, context: Context, gamma: int) -> _core.Proposal | None:
        gamma = min(gamma, self.cache.capacity - len(context.tokens) + 1)
        if gamma < 1:
            return None
        pending = np.asarray(context.tokens[self.cache.length :], dtype=np.int32)
        follow(self._adjustments, context)
        draws = self._law, self._seed, context.round
        self._model.draft(self.cache, pending, gamma, *draws, self._proposal, self._rule, self._adjustments)
        return self._proposal

    def commit(self, kept: int) -> None:
        self.cache.commit(min(kept - 1, self.cache.provisional))


class EarlyExitDrafter:
    """The target's own first layers, with its final norm and head. Verifying goes on from what they computed.

    It has the target's cache, which the target commits: what was drafted and kept is never read again.

    Args:
        target: of this request.
        layers: how many draft, or "auto": chosen by the acceptance measured on the prompt, and by the bytes that drafting
            streams.
        gammas: what gamma is chosen from, with "auto".
        adapts: whether a controller chooses gamma by measuring, so that the one chosen here is no limit.
        on_choice: told what "auto" chose.
    """

    def __init__(
        self,
        target: NativeTarget,
        layers: int | Literal["auto"],
        *,
        gammas: Sequence[int] = (5,),
        adapts: bool = False,
        on_choice: Callable[[Exit], None] | None = None,
    ) -> None:
        self._target = target
        self._gammas, self._adapts, self._on_choice = gammas, adapts, on_choice
        self._layers = None if layers == "auto" else layers
        self._longest = max(gammas)
        self._proposal = _core.Proposal()

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        del progress  # nothing is read into the cache
        if self._layers is None and tokens:
            self._layers = self._choose(tokens)

    def propose(self, context: Context, gamma: int) -> _core.Proposal | None:
        if self._layers is None:
            self._layers = self._choose(context.tokens)
        gamma = min(gamma, self._longest)
        if gamma < 1:
            return None
        self._target.draft_early(context, gamma, self._layers, self._proposal)
        return self._proposal

    def commit(self, kept: int) -> None:
        pass

    def _choose(self, tokens: Sequence[int]) -> int:
        model = self._target.model
        acceptance = measure_acceptance(model, tokens, self._target.law, candidate_exits(model.layers))
        chosen = choose_exit(model, acceptance, self._gammas)
        if not self._adapts:
            self._longest = chosen.gamma
        if self._on_choice:
            self._on_choice(chosen)
        return chosen.layers


class NoDrafter:
    """Plain decoding."""

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        pass

    def propose(self, context: Context, gamma: int) -> _core.Proposal | None:
        pass

    def commit(self, kept: int) -> None:
        pass


class FallbackDrafter:
    """A drafter whose failure is not the request's: it is reported, and plain decoding goes on.

    Args:
        drafter: the one that may fail.
        on_failure: called once, with the exception.
    """

    def __init__(self, drafter: Drafter, on_failure: Callable[[Exception], None]) -> None:
        self._drafter, self._on_failure = drafter, on_failure

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        try:
            self._drafter.prefill(tokens, progress)
        except Exception as error:
            self._give_up(error)

    def propose(self, context: Context, gamma: int) -> _core.Proposal | None:
        try:
            return self._drafter.propose(context, gamma)
        except Exception as error:
            self._give_up(error)
            return None

    def commit(self, kept: int) -> None:
        try:
            self._drafter.commit(kept)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._drafter = NoDrafter()
        self._on_failure(error)

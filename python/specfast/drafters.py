"""Drafters: who proposes the tokens a round checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from . import _core
from .context import Context
from .early_exit import Exit, candidate_exits, choose_exit, measure_acceptance
from .sampling import follow
from .targets import NativeTarget, Progress, prefill

LONGEST_COPY = 64
PRIOR_OF_MODELS = 0.7
PRIORS_OF_MATCHES = (0.3, 0.5, 0.75, 0.85, 0.9, 0.95)  # of 1, 2 to 3, 4 to 7, ..., 32 and more tokens


class Offer(NamedTuple):
    """What a drafter could propose next, known from the context alone, before anything is drawn.

    Attributes:
        drafter: its name: "model", "suffix" or "prompt-lookup".
        kind: what shares an acceptance: the drafter's name, for copying drafters with a class of the match's length.
        prior: the chance that its tokens are accepted, where nothing is measured.
        longest: most tokens it can draft.
        unread: tokens of the context the drafter reads before it drafts.
    """

    drafter: str
    kind: str
    prior: float
    longest: int
    unread: int = 0


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens after a context and follows what was kept. One per request, with its state.

    What is proposed must depend on the context, and on draws from the q that is proposed with it, and on nothing else.
    Without q every token counts as certain (one-hot): it must then follow from the context alone.
    """

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        """Reads the prompt, all but its last token."""

    def offers(self, context: Context) -> Sequence[Offer]:
        """What could be drafted now, the best first where nothing is measured; empty when there is nothing."""

    def propose(self, context: Context, offer: Offer, gamma: int) -> _core.Proposal | None:
        """Drafts up to gamma tokens, 1 to offer.longest, as one of the context's offers says."""

    def commit(self, kept: int) -> None:
        """Follows a round it drafted: `kept` tokens were kept, of which the last is not yet in any cache. Rounds without a
        proposal are seen by their tokens in the next context only."""


class ModelDrafter:
    """A smaller model that drafts from its own law, one native call per round.

    Its cache never holds the context's last token, lacks one more after a round in which everything was accepted, and
    all of the rounds it sat out; what is missing is read, in tiles, at the start of its next round.

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

    def offers(self, context: Context) -> Sequence[Offer]:
        length = len(context.tokens)
        longest = self.cache.capacity - length + 1
        unread = length - self.cache.length
        return (Offer("model", "model", PRIOR_OF_MODELS, longest, unread),) if longest > 0 else ()

    def propose(self, context: Context, offer: Offer, gamma: int) -> _core.Proposal | None:
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
        gammas: what a round may draft, for "auto" to reckon with.
        on_choice: told what "auto" chose.
    """

    def __init__(
        self,
        target: NativeTarget,
        layers: int | Literal["auto"],
        *,
        gammas: Sequence[int] = (5,),
        on_choice: Callable[[Exit], None] | None = None,
    ) -> None:
        self._target, self._gammas, self._on_choice = target, gammas, on_choice
        self._layers = None if layers == "auto" else layers
        self._proposal = _core.Proposal()

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        del progress  # nothing is read into the cache
        if tokens:
            self._exit(tokens)

    def offers(self, context: Context) -> Sequence[Offer]:
        return (Offer("early-exit", f"early-exit/{self._exit(context.tokens)}", PRIOR_OF_MODELS, max(self._gammas)),)

    def propose(self, context: Context, offer: Offer, gamma: int) -> _core.Proposal | None:
        self._target.draft_early(context, gamma, self._exit(context.tokens), self._proposal)
        return self._proposal

    def commit(self, kept: int) -> None:
        pass

    def _exit(self, tokens: Sequence[int]) -> int:
        if self._layers is None:
            model = self._target.model
            acceptance = measure_acceptance(model, tokens, self._target.law, candidate_exits(model.layers))
            chosen = choose_exit(model, acceptance, self._gammas)
            if self._on_choice:
                self._on_choice(chosen)
            self._layers = chosen.layers
        return self._layers


class CopyDrafter:
    """Proposes what followed the context's end when it was seen before, in the prompt or in what was generated.

    Args:
        name: "suffix", the longest suffix seen before (suffix decoding, Hu et al. 2024, arXiv:2411.08294), or
            "prompt-lookup", the last 3 tokens, else 2, else 1 (Saxena 2023).
    """

    def __init__(self, name: str) -> None:
        self._text = _core.SuffixAutomaton() if name == "suffix" else _core.PromptLookup()
        self._read = self._match = 0
        self._proposal = _core.Proposal()
        classes = enumerate(PRIORS_OF_MATCHES, 1)
        self._offers = ((), *((Offer(name, f"{name}/{n}", prior, LONGEST_COPY),) for n, prior in classes))

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        self._follow(tokens)

    def offers(self, context: Context) -> Sequence[Offer]:
        self._follow(context.tokens)
        return self._offers[min(self._match.bit_length(), len(PRIORS_OF_MATCHES))]

    def propose(self, context: Context, offer: Offer, gamma: int) -> _core.Proposal | None:
        return self._proposal if self._text.propose(gamma, 1, self._proposal) else None

    def commit(self, kept: int) -> None:
        pass

    def _follow(self, tokens: Sequence[int]) -> None:
        length = len(tokens)
        if length - self._read > LONGEST_COPY:
            self._text.append(np.array(tokens[self._read :], dtype=np.int32))
            self._match = self._text.match_length
        else:
            for at in range(self._read, length):
                self._match = self._text.push(tokens[at])
        self._read = length


class CombinedDrafter:
    """Several drafters; who drafts is chosen from their offers. Where nothing is measured the highest prior comes first:
    copying goes before a model where at least 4 tokens match.

    Args:
        parts: the drafters by the names in their offers.
    """

    def __init__(self, parts: Mapping[str, Drafter]) -> None:
        self._parts = dict(parts)

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        for part in self._parts.values():
            part.prefill(tokens, progress)

    def offers(self, context: Context) -> Sequence[Offer]:
        offers: list[Offer] = []
        for part in self._parts.values():
            for offer in part.offers(context):
                first = not offers or offer.prior <= offers[0].prior
                offers.insert(len(offers) if first else 0, offer)
        return offers

    def propose(self, context: Context, offer: Offer, gamma: int) -> _core.Proposal | None:
        return self._parts[offer.drafter].propose(context, offer, gamma)

    def commit(self, kept: int) -> None:
        for part in self._parts.values():
            part.commit(kept)


class NoDrafter:
    """Plain decoding."""

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        pass

    def offers(self, context: Context) -> Sequence[Offer]:
        return ()

    def propose(self, context: Context, offer: Offer, gamma: int) -> _core.Proposal | None:
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

    def offers(self, context: Context) -> Sequence[Offer]:
        try:
            return self._drafter.offers(context)
        except Exception as error:
            self._give_up(error)
            return ()

    def propose(self, context: Context, offer: Offer, gamma: int) -> _core.Proposal | None:
        try:
            return self._drafter.propose(context, offer, gamma)
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

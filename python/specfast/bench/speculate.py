"""Speculation end to end on real shapes with a set acceptance, so that speed is measured without trained weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import _core
from ..context import Context
from ..controllers import FixedGamma
from ..drafters import ModelDrafter, NoDrafter, Offer
from ..errors import ConfigurationError, SpecfastError
from ..generation import rounds
from ..stats import SpeculationStats
from ..targets import NativeTarget

Progress = Callable[[int, int], None]
GREEDY = _core.Law(temperature=0.0)


@dataclass(frozen=True)
class SpeculationRun:
    """Plain against speculative decoding of the same tokens; seconds are of the speculative run, `overhead_seconds` its
    time that is neither draft nor verify."""

    tokens: int
    gamma: int
    set_acceptance: float
    acceptance: float
    tokens_per_target_pass: float
    plain_tok_s: float
    speculative_tok_s: float
    speedup: float
    draft_seconds: float
    verify_seconds: float
    overhead_seconds: float
    identical: bool


class _SetAcceptance(ModelDrafter):
    """A draft model that computes in full; then each of its tokens becomes the right one with a set probability."""

    def __init__(self, model: _core.Model, capacity: int, right: np.ndarray, acceptance: float, seed: int) -> None:
        super().__init__(model, GREEDY, seed, capacity)
        self._right, self._acceptance, self._vocab = right, acceptance, model.vocab
        self._random = np.random.default_rng(seed)

    def propose(self, context: Context, offer: Offer, gamma: int) -> _core.Proposal | None:
        proposal = super().propose(context, offer, gamma)
        if proposal:
            right = self._right[context.generated : context.generated + proposal.gamma]
            other = (right + 1 + self._random.integers(0, self._vocab - 1, len(right))) % self._vocab
            chosen = np.where(self._random.random(len(right)) < self._acceptance, right, other)
            proposal.set_tokens(chosen.astype(np.int32))
        return proposal


def check_terms(gamma: int, acceptance: float) -> None:
    """Refuses terms that no run has.

    Raises:
        ConfigurationError: gamma outside 1 to 20, or an acceptance that is no probability.
    """
    if not 0 <= acceptance <= 1:
        raise ConfigurationError(f"acceptance is {acceptance:g}, but must be in 0 to 1")
    if not 1 <= gamma <= 20:
        raise ConfigurationError(f"gamma is {gamma}, but must be in 1 to 20")


def positions_needed(context: int, tokens: int, gamma: int) -> int:
    """Positions of the caches: the recorded run is gamma tokens longer than the speculative one, so that every draft has its
    right token."""
    return context + tokens + gamma


def measure_speculation(
    target: _core.Model,
    draft: _core.Model,
    *,
    gamma: int = 6,
    acceptance: float = 0.8,
    tokens: int = 64,
    context: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> SpeculationRun:
    """Decodes plainly and records the tokens, then speculatively with drafts that are right with a set probability.

    The draft model computes in full; each of its tokens is then replaced by the recorded one with probability `acceptance`,
    else by another. The target verifies as always, so both runs give the same tokens.

    Raises:
        ConfigurationError: a value out of range, or vocabularies of different size.
        SpecfastError: the runs gave different tokens.
    """
    check_terms(gamma, acceptance)
    capacity = positions_needed(context, tokens, gamma)
    if context < 1 or tokens < 1 or capacity > min(target.max_context, draft.max_context):
        raise ConfigurationError(
            f"{context} tokens of context, {tokens} to decode and {gamma} drafted do not fit: each is at least 1, and their sum "
            f"at most the models' context, {min(target.max_context, draft.max_context)}"
        )
    if target.vocab != draft.vocab:
        raise ConfigurationError(
            f"the target has {target.vocab} tokens and the draft {draft.vocab}; choose shapes of one vocabulary"
        )
    prompt = np.random.default_rng(seed).integers(0, target.vocab, context).tolist()

    def decode(
        count: int, drafter: ModelDrafter | NoDrafter, gamma: int, done: int
    ) -> tuple[list[int], SpeculationStats]:
        request, stats = Context(list(prompt), count, capacity), SpeculationStats()
        native = NativeTarget(target, GREEDY, 1.0, seed, capacity)
        for follower in (native, drafter):
            follower.prefill(prompt[:-1], None)
        start = time.perf_counter()
        for _ in rounds(request, native, drafter, FixedGamma(gamma), stats):
            if progress:
                progress(done + request.generated, 2 * tokens + gamma)
        stats.total_seconds = time.perf_counter() - start
        return request.tokens[context:], stats

    recorded, plain = decode(tokens + gamma, NoDrafter(), 0, 0)
    right = np.asarray(recorded, dtype=np.int32)
    made, stats = decode(tokens, _SetAcceptance(draft, capacity, right, acceptance, seed), gamma, tokens + gamma)
    if made != recorded[: len(made)]:
        raise SpecfastError(
            "the speculative run gave other tokens than the plain run; this is a defect, please report it"
        )
    plain_tok_s, speculative_tok_s = plain.tok_s, stats.tok_s
    return SpeculationRun(
        len(made), gamma, acceptance, stats.acceptance_rate, stats.tokens_per_target_pass, plain_tok_s, speculative_tok_s,
        speculative_tok_s / plain_tok_s, stats.draft_seconds, stats.verify_seconds,
        stats.total_seconds - stats.draft_seconds - stats.verify_seconds, True,
    )  # fmt: skip

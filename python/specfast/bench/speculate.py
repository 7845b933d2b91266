"""Speculation end to end on real shapes with a set acceptance, so that speed is measured without trained weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import _core
from ..errors import ConfigurationError, SpecfastError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SpeculationRun:
    """Plain against speculative decoding of the same tokens; seconds are of the speculative run."""

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
    identical: bool


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
    if not 0 <= acceptance <= 1:
        raise ConfigurationError(f"acceptance is {acceptance:g}, but must be in 0 to 1")
    if not 1 <= gamma <= 20:
        raise ConfigurationError(f"gamma is {gamma}, but must be in 1 to 20")
    if target.vocab != draft.vocab:
        raise ConfigurationError(
            f"the target has {target.vocab} tokens and the draft {draft.vocab}; choose shapes of one vocabulary"
        )
    random = np.random.default_rng(seed)
    prompt = random.integers(0, target.vocab, context).astype(np.int32)
    greedy, capacity = _core.Law(temperature=0.0), context + tokens + gamma + 2

    recorded, plain_seconds = _plain(target, prompt, tokens + gamma + 1, greedy, capacity, progress)
    plain_seconds *= tokens / (tokens + gamma + 1)

    target_cache, draft_cache = _core.Cache(target, capacity), _core.Cache(draft, capacity)
    target.prefill(target_cache, prompt[:-1])
    draft.prefill(draft_cache, prompt[:-1])
    text = prompt.tolist()
    proposal = _core.Proposal()
    rounds = drafted = accepted = 0
    draft_seconds = verify_seconds = 0.0
    while len(text) - context < tokens:
        done = len(text) - context
        right = recorded[done : done + gamma]
        wrong = (right + 1 + random.integers(0, target.vocab - 1, gamma)) % target.vocab
        proposed = np.where(random.random(gamma) < acceptance, right, wrong).astype(np.int32)
        start = time.perf_counter()
        pending = np.asarray(text[draft_cache.length :], dtype=np.int32)
        draft.draft(draft_cache, pending, gamma, greedy, seed, rounds, proposal)
        proposal.set_tokens(proposed)
        middle = time.perf_counter()
        verdict = target.verify(
            target_cache, np.asarray(text[-1:], dtype=np.int32), proposal, greedy, 1.0, seed, rounds
        )
        end = time.perf_counter()
        target_cache.commit(verdict.tau + 1)
        draft_cache.commit(min(verdict.tau, gamma - 1))
        text += [*proposed[: verdict.tau].tolist(), verdict.next_token]
        rounds, drafted, accepted = rounds + 1, drafted + gamma, accepted + verdict.tau
        draft_seconds += middle - start
        verify_seconds += end - middle
        if progress:
            progress(tokens + min(len(text) - context, tokens), 2 * tokens)
    made = len(text) - context
    if text[context:] != recorded[:made].tolist():
        raise SpecfastError(
            "the speculative run gave other tokens than the plain run; this is a defect, please report it"
        )
    plain, speculative = tokens / plain_seconds, made / (draft_seconds + verify_seconds)
    return SpeculationRun(
        made, gamma, acceptance, accepted / drafted, made / rounds, plain, speculative, speculative / plain,
        draft_seconds, verify_seconds, True,
    )  # fmt: skip


def _plain(
    model: _core.Model, prompt: np.ndarray, tokens: int, greedy: _core.Law, capacity: int, progress: Progress | None
) -> tuple[np.ndarray, float]:
    cache = _core.Cache(model, capacity)
    model.prefill(cache, prompt[:-1])
    made, token = [], int(prompt[-1])
    start = time.perf_counter()
    for i in range(tokens):
        token = model.verify(cache, np.array([token], dtype=np.int32), None, greedy, 1.0, 0, 0).next_token
        cache.commit(1)
        made.append(token)
        if progress:
            progress(i, 2 * tokens)
    return np.asarray(made, dtype=np.int32), time.perf_counter() - start

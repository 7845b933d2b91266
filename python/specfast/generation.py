"""A generation: rounds of drafting, verifying and committing, and the request around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Literal

from .context import Chunk, Context, FinishReason
from .controllers import Controller
from .drafters import Drafter, FallbackDrafter
from .stats import Round, SpeculationStats
from .targets import Progress, Target


def rounds(
    context: Context, target: Target, drafter: Drafter, controller: Controller, stats: SpeculationStats
) -> Iterator[Chunk]:
    """Speculative decoding (Leviathan et al. 2022, Alg. 1, arXiv:2211.17192): yields what each round keeps.

    The context is the truth, the caches follow it: whatever of its tokens a cache lacks is read in the next round.

    A round drafts up to `room` tokens, one more than its own last token leaves room for: cut to room - 1, the last round would
    draw that token where a longer text checks a drafted one, and a seed's text would depend on max_tokens. Of a context
    of whole rounds max_tokens cuts none.
    """
    clock = time.perf_counter
    while not context.done:
        start, length = clock(), len(context.tokens)
        gamma, offer = controller.plan(context, drafter)
        planned = clock()
        proposal = drafter.propose(context, offer, gamma) if offer else None
        drafted = clock()
        verdict = target.verify(context, proposal)
        verified = clock()

        tokens = proposal.tokens.tolist() if proposal else []
        chunk = context.keep([*tokens[: verdict.tau], verdict.next_token])
        kept = len(chunk.token_ids)
        target.commit(kept)
        if tokens:
            drafter.commit(kept)

        times = (drafted - planned, verified - drafted, planned - start, clock() - verified)
        round_ = Round(len(tokens), verdict.tau, kept, *times, length, offer if tokens else None)
        stats.count(round_)
        controller.update(round_)
        yield chunk


@dataclass(frozen=True)
class Terms:
    """What a request is decoded under.

    Attributes:
        seed: of the random streams, given or drawn: with it the text can be had again.
        gamma: most tokens drafted a round, or "auto"; 0 is plain decoding.
        drafter: who drafts: "model", "suffix", "prompt-lookup", "combined" (suffix and model), or "none".
        lossless: whether the tokens follow the target's law at this precision.
        precision: of the target's activations.
        rule: how drafted tokens are accepted: "greedy", "token", "block", "coupled", or "equality" (with the target's own
            sample, where only samples of its law are known).
        path: whose bits the logits are: "native", another of specfast's ("primitives" or "metal" in MLX), or "host" (a host's
            own layers).
    """

    seed: int = 0
    gamma: int | Literal["auto"] = 0
    drafter: str = "none"
    lossless: bool = True
    precision: str = "unknown"
    rule: str = "unknown"
    path: str = "native"


@dataclass(frozen=True)
class Result:
    """A generation, finished or not.

    Attributes:
        text: the generated text, without the prompt.
        token_ids: the generated tokens, an end token included.
        prompt_tokens: tokens of the prompt.
        finish_reason: "eos" (an end token), "stop" (a stop string), "length" (max_tokens), "context" (it is full), or
            "interrupted".
        terms: what it was decoded under.
        stats: counters of this request.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason | Literal["interrupted"]
    terms: Terms
    stats: SpeculationStats

    @property
    def lossless(self) -> bool:
        """Whether the tokens follow the target's law at this precision."""
        return self.terms.lossless


class Generation:
    """An iterator over a request's chunks. `result()` tells what there is so far.

    Closing it, or an exception such as KeyboardInterrupt, leaves the engine ready for the next request.

    Args:
        context: the request, with its prompt's tokens.
        target, drafter, controller: this request's; a drafter that fails is replaced by plain decoding.
        progress: called with (done, total) while the target reads the prompt.
        terms: told in the result.
        on_draft_failure: called with a drafter's exception.
        on_end: called with the counters when the request ends, however it does.

    Raises:
        TypeError: target, drafter or controller lack a method of their protocol.
    """

    def __init__(
        self,
        context: Context,
        target: Target,
        drafter: Drafter,
        controller: Controller,
        *,
        progress: Progress | None = None,
        terms: Terms = Terms(),
        on_draft_failure: Callable[[Exception], None] | None = None,
        on_end: Callable[[SpeculationStats], None] | None = None,
    ) -> None:
        seams: list[tuple[object, type]] = [(target, Target), (drafter, Drafter), (controller, Controller)]
        for seam, protocol in seams:
            if not isinstance(seam, protocol):
                needed = sorted(name for name in dir(protocol) if not name.startswith("_"))
                lacking = [name for name in needed if not hasattr(seam, name)]
                raise TypeError(f"{type(seam).__name__} is not a {protocol.__name__}: it lacks {', '.join(lacking)}")
        self.context = context
        self.stats = SpeculationStats(requests=1, prompt_tokens=context.prompt_length)
        self.terms = terms
        self._target, self._controller = target, controller
        self._drafter = FallbackDrafter(drafter, self._draft_failed)
        self._progress, self._on_draft_failure, self._on_end = progress, on_draft_failure, on_end
        self._text: list[str] = []
        self._chunks = self._run()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """Ends the request."""
        self._chunks.close()

    def result(self) -> Result:
        """What was generated so far."""
        context = self.context
        return Result(
            text="".join(self._text),
            token_ids=context.tokens[context.prompt_length :],
            prompt_tokens=context.prompt_length,
            finish_reason=context.finish_reason or "interrupted",
            terms=self.terms,
            stats=self.stats,
        )

    def _draft_failed(self, error: Exception) -> None:
        self.stats.fallbacks += 1
        self.stats.fallback_reasons[f"{type(error).__name__}: {error}"] += 1
        if self._on_draft_failure:
            self._on_draft_failure(error)

    def _run(self) -> Generator[Chunk, None, None]:
        stats, context = self.stats, self.context
        start = time.perf_counter()
        away = 0.0
        try:
            self._target.prefill(context.tokens[:-1], self._progress)
            self._drafter.prefill(context.tokens[:-1], None)
            stats.prefill_seconds = time.perf_counter() - start
            for chunk in rounds(context, self._target, self._drafter, self._controller, stats):
                left = time.perf_counter()
                stats.first_token_seconds = stats.first_token_seconds or left - start
                stats.total_seconds = left - start - away
                self._text.append(chunk.text)
                yield chunk
                away += time.perf_counter() - left
        finally:
            if self._on_end:
                self._on_end(stats)

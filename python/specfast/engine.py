"""The engine: the round of drafting, verifying and committing, and requests around it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .config import ResolvedConfig, SpeculativeConfig
from .context import Context, FinishReason
from .controllers import AutoGamma, Controller, FixedGamma
from .drafters import Drafter, ModelDrafter, Progress
from .errors import ConfigurationError, ContextFullError, SpecfastError
from .models import ModelPair, Notify, print_notice
from .sampling import SamplingParams
from .stats import SpeculationStats
from .targets import NativeTarget, Target
from .tokenizer import StopStrings


@dataclass(frozen=True)
class Chunk:
    """What one round added: its text (complete characters only) and its token ids."""

    text: str
    token_ids: tuple[int, ...]


@dataclass
class Result:
    """A finished generation."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason | None
    stats: SpeculationStats
    lossless: bool
    precision: str


def rounds(
    context: Context,
    target: Target,
    drafter: Drafter | None,
    controller: Controller,
    stats: SpeculationStats,
    on_draft_failure: Callable[[SpecfastError], None],
) -> Iterator[list[int]]:
    """Speculative decoding (Leviathan et al. 2022, Alg. 1): yields the tokens each round keeps."""
    while not context.done:
        start = time.perf_counter()
        proposal = None
        gamma = min(controller.gamma, context.room - 1) if drafter else 0
        if drafter and gamma > 0:
            try:
                proposal = drafter.propose(context, gamma)
            except SpecfastError as error:
                on_draft_failure(error)
                drafter = None
        drafted = time.perf_counter()
        verdict = target.verify(context, proposal)
        verified = time.perf_counter()
        proposed = proposal.tokens.tolist() if proposal else []
        kept = context.keep([*proposed[: verdict.tau], verdict.next_token])
        target.commit(len(kept))
        if drafter and proposal:
            drafter.commit(len(kept))
        controller.update(len(proposed), verdict.tau, drafted - start, verified - drafted)
        stats.target_passes += 1
        stats.drafted += len(proposed)
        stats.accepted += min(verdict.tau, len(kept))
        stats.tokens += len(kept)
        stats.draft_seconds += drafted - start
        stats.verify_seconds += verified - drafted
        yield kept


@dataclass
class Engine:
    """Generates text with a target model and, where it fits, a draft. Models are loaded when first needed.

    One request at a time; every request has its own caches. Build one with `specfast.load`.
    """

    resolved: ResolvedConfig
    precision: str | None = None
    max_context: int | None = None
    isa: str | None = None
    notify: Notify = print_notice
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    _pair: ModelPair | None = None
    _said: set[str] = field(default_factory=set)

    @property
    def config(self) -> SpeculativeConfig:
        """The effective configuration."""
        return self.resolved.config

    @property
    def pair(self) -> ModelPair:
        """The loaded models."""
        if self._pair is None:
            self._pair = ModelPair.load(self.config, self.precision, self.max_context, self.isa, self.notify)
        return self._pair

    def set_models(self, target: str | None, draft: str | None = None) -> None:
        """Changes the models; applies to the next request.

        Raises:
            ConfigurationError: a name that is not one.
        """
        values = {name: getattr(self.config, name) for name in self.resolved.sources} | {
            "target_model": target,
            "draft_model": draft,
        }
        sources = {**self.resolved.sources, "target_model": "typed", "draft_model": "typed"}
        self.resolved = ResolvedConfig(SpeculativeConfig(**values), sources)
        self._pair = None

    def get_speculation_stats(self) -> dict[str, Any]:
        """Counters and rates since the engine was built; works before any model is loaded."""
        status = self._pair.compatibility if self._pair else "unknown"
        precision = self._pair.target.precision if self._pair else (self.precision or "unknown")
        return {
            "model_family_compatibility": status,
            "lossless": self.config.lossless,
            "precision": precision,
            "target_model": self.config.target_model,
            "draft_model": self.config.draft_model,
            **self.stats.as_dict(),
        }

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Result:
        """Generates to the end; takes what `stream` takes."""
        text: list[str] = []
        tokens: list[int] = []
        for chunk in (stream := self.stream(prompt, **options)):
            text.append(chunk.text)
            tokens += chunk.token_ids
        last = stream.request
        return Result(
            "".join(text),
            tokens,
            last.prompt_length,
            last.finish_reason,
            stream.stats,
            self.config.lossless,
            self.pair.target.precision,
        )

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
        system: str | None = None,
        speculate: bool = True,
        ignore_eos: bool = False,
        progress: Progress | None = None,
    ) -> Stream:
        """Generates chunk by chunk.

        Args:
            prompt: text (put through the model's chat template unless raw), or token ids taken as they are.
            max_tokens: most tokens to generate.
            temperature: overrides the configuration's; 0 is greedy.
            top_k, top_p, min_p: further truncation of the law.
            seed: of the random streams; None draws one.
            stop: strings that end the text and are not part of it.
            speculate: False decodes plainly.
            ignore_eos: go on after end tokens (for measurements).
            progress: called with (done, total) while the prompt is read.

        Raises:
            ConfigurationError, ContextFullError: bad options, an empty prompt, or one that does not fit.
            NumericalError: logits that are not finite.
        """
        if max_tokens < 1:
            raise ConfigurationError(f"max_tokens is {max_tokens}, but must be at least 1")
        pair, config = self.pair, self.config
        tokens = pair.encode(prompt, raw=raw, system=system) if isinstance(prompt, str) else [int(t) for t in prompt]
        capacity = pair.target.model.max_context
        if not tokens:
            raise ConfigurationError("the prompt has no tokens; give at least one")
        if any(not 0 <= token < pair.vocab for token in tokens):
            raise ConfigurationError(f"the prompt has token ids outside 0 to {pair.vocab - 1}")
        if len(tokens) >= capacity:
            raise ContextFullError(
                f"the prompt has {len(tokens)} tokens, but the context holds {capacity} and needs room for at least one more; shorten it"
            )
        sampling = SamplingParams(
            temperature=config.temperature if temperature is None else temperature,
            top_k_threshold=config.top_k_threshold,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=secrets.randbits(63) if seed is None else seed,
        )
        if config.lenience > 1.0 and sampling.temperature > 0 and pair.draft and speculate:
            self._say_once(
                f"lenience {config.lenience:g} is above 1: more drafts are accepted, and the output law is no longer exactly the "
                f"target's (no token gets more than {config.lenience:g} times its probability). Use lenience 1 to be exact."
            )
        limit = pair.vocab
        target = NativeTarget(
            pair.target.model, sampling.law(pair.target.model.vocab, limit), config.lenience, sampling.seed, capacity
        )
        drafter: Drafter | None = None
        if pair.draft and speculate and not config.disabled:
            # The threshold's share is of the target's vocabulary: both laws keep the same number of tokens.
            drafter = ModelDrafter(
                pair.draft.model, sampling.law(pair.target.model.vocab, limit), sampling.seed, capacity
            )
        context = Context(tokens, len(tokens), max_tokens, capacity, () if ignore_eos else pair.eos_ids)
        controller = self._controller(seeded=seed is not None and sampling.temperature > 0)
        return Stream(self, context, target, drafter, controller, StopStrings(stop), progress)

    def _controller(self, *, seeded: bool) -> Controller:
        ceiling = self.config.gamma
        automatic = ceiling == "auto" or self.resolved.sources["gamma"] == "family"
        if automatic and seeded:
            self._say_once("with a seed, gamma is fixed so that timing cannot change the text.")
        if automatic and not seeded:
            return AutoGamma(20 if ceiling == "auto" else ceiling)
        return FixedGamma(5 if ceiling == "auto" else ceiling)

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self.notify(message)

    def draft_failed(self, error: SpecfastError) -> None:
        """Notes that a request goes on without its draft."""
        self._say_once(f"drafting failed and plain decoding goes on: {error}")


class Stream:
    """An iterator over a request's chunks; `request` and `stats` can be read at any time.

    Closing it, or an exception, leaves the engine ready for the next request.
    """

    def __init__(
        self,
        engine: Engine,
        context: Context,
        target: Target,
        drafter: Drafter | None,
        controller: Controller,
        stops: StopStrings,
        progress: Progress | None,
    ) -> None:
        for seam, protocol in ((target, Target), (controller, Controller), *(((drafter, Drafter),) if drafter else ())):
            if not isinstance(seam, protocol):
                raise TypeError(f"{type(seam).__name__} is not a {protocol.__name__}")
        self.request, self.stats = context, SpeculationStats(prompt_tokens=context.prompt_length)
        self._engine, self._target, self._drafter, self._controller = engine, target, drafter, controller
        self._stops, self._progress = stops, progress
        self._chunks = self._run()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """Ends the request."""
        self._chunks.close()

    def _run(self) -> Generator[Chunk, None, None]:
        start = time.perf_counter()
        stats, context = self.stats, self.request
        decoder = self._engine.pair.tokenizer.stream(context.tokens)
        try:
            self._prefill(context.tokens[:-1])
            stats.prefill_seconds = time.perf_counter() - start
            for kept in rounds(context, self._target, self._drafter, self._controller, stats, self._on_draft_failure):
                if not stats.first_token_seconds:
                    stats.first_token_seconds = time.perf_counter() - start
                text = self._stops.push(decoder.push(kept))
                if self._stops.stopped:
                    context.finish_reason = "stop"
                elif context.done:
                    text += self._stops.push(decoder.flush())
                    text += "" if self._stops.stopped else self._stops.flush()
                stats.total_seconds = time.perf_counter() - start
                yield Chunk(text, tuple(kept))
        finally:
            stats.total_seconds = time.perf_counter() - start
            self._engine.stats.add(stats)

    def _prefill(self, tokens: list[int]) -> None:
        self._target.prefill(tokens, self._progress)
        if self._drafter:
            try:
                self._drafter.prefill(tokens, None)
            except SpecfastError as error:
                self._on_draft_failure(error)
                self._drafter = None

    def _on_draft_failure(self, error: SpecfastError) -> None:
        self.stats.fallbacks += 1
        self._engine.draft_failed(error)

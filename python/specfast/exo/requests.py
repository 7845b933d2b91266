"""A request under way in exo: its caches, its tokens, and its end."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..config import resolve_config
from ..engine import Engine
from ..errors import ConfigurationError
from ..generation import Generation
from ..sampling import SamplingParams
from ..stats import SpeculationStats

WITH_A_SEED = "a seed, and no drafter asked for (--speculative-drafter suffix)"
MOST_CACHED = 8
MOST_KNOWN = 256
_OPTIONS = ("temperature", "seed", "top_p", "top_k", "min_p")
_MAX_TOKENS = ("max_completion_tokens", "max_tokens")


@dataclass
class Caller:
    """Who asked: options of the request's body, and what becomes of it.

    Attributes:
        options: what `Engine.stream` takes.
        request_id: once exo has given it one.
        gone: the client does not wait any more.
        begun: tokens are on their way to who asked.
        error: what ended the request, if that was an error.
        watched: whether who asked looks at `error`; else an end token tells them that nothing more will come.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    request_id: str | None = None
    gone: bool = False
    begun: bool = False
    error: Exception | None = None
    watched: bool = False


CALLER: ContextVar[Caller | None] = ContextVar("specfast_exo_caller", default=None)
"""Set around a request by the chat API; exo itself passes a prompt and nothing else to its engine."""


def request_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a chat request that sampling knows, checked; absent and null keys are not options.

    Raises:
        ConfigurationError: a value outside its range.
    """
    options = {name: body[name] for name in _OPTIONS if body.get(name) is not None}
    resolve_config(request={name: options[name] for name in ("temperature",) if name in options})
    SamplingParams(**{name: value for name, value in options.items() if name != "temperature"})
    name = next((name for name in _MAX_TOKENS if body.get(name) is not None), None)
    if name is None:
        return options
    limit = body[name]
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"{name} is {limit!r}, but must be a whole number, at least 1")
    return {**options, "max_tokens": limit}


def why_plain(engine: Engine) -> str | None:
    """Why an engine decodes plainly; None when it speculates."""
    if engine.config.disabled:
        return "disabled"
    if engine.drafter != "none":
        return None
    return "incompatible draft" if engine.pair.compatibility == "incompatible" else "no draft"


class _Cancelled(Exception):  # noqa: N818 - not an error
    """Ends the reading of a prompt nobody waits for."""


class Request:
    """One request on a native engine: gives its tokens step by step, and can be put away and taken up again.

    Args:
        request_id: exo's.
        model: the model's id.
        engine: that generates.
        prompt: token ids.
        max_tokens: most tokens to generate.
        caller: who asked.
        singly: one token a step, for a host that takes no more.
        eos: the token by which such a host sees the end.

    Attributes:
        tokens: generated so far.
        given: how many tokens the host has had.
        ended: whether nothing more will be generated.
        stats, lossless, speculating, precision: of what was generated.
    """

    def __init__(
        self,
        request_id: str,
        model: str,
        engine: Engine,
        prompt: Sequence[int],
        max_tokens: int,
        caller: Caller,
        *,
        singly: bool = False,
        eos: int = 0,
    ) -> None:
        self.id, self.model, self.engine, self.caller = request_id, model, engine, caller
        options = dict(caller.options)
        self._max_tokens = min(max_tokens, options.pop("max_tokens", max_tokens))
        self._seed = options.pop("seed", None)
        self._options = options
        self._prompt, self.tokens = list(prompt), list[int]()
        self._singly, self.eos, self._queue = singly, eos, list[int]()
        self._generation: Generation | None = None
        self._round = 0
        self.ended, self.given = False, 0
        self.stats = SpeculationStats()
        self.lossless = True
        self.speculating = False
        self.precision = "unknown"

    @property
    def finished(self) -> bool:
        """Whether the last step gave the last token."""
        return self.ended and not self._queue

    def cancel(self) -> None:
        """Ends the request with its next step, or in the middle of its prompt; may be called from any thread."""
        self.caller.gone = True

    def step(self) -> list[int]:
        """The next tokens; none when the request was cancelled. Not for the event loop's thread: it computes.

        Raises:
            SpecfastError: what `Engine.stream` raises.
        """
        if self.caller.gone:
            self.close()
            self.ended, self._queue = True, []
            return [self.eos] if self._singly else []
        while not self._queue and not self.ended:
            self._queue = self._advance()
        many = len(self._queue) if not self._singly else 1
        tokens, self._queue = self._queue[:many] or [self.eos], self._queue[many:]
        self.given += len(tokens)
        return tokens

    def _advance(self) -> list[int]:
        try:
            chunk = next(self._begun(), None)
        except _Cancelled:
            chunk = None
        generation = self._generation
        self.ended = chunk is None or generation is None or generation.context.done
        tokens = [] if chunk is None else list(chunk.token_ids)
        self.tokens += tokens
        if self.ended:
            self.close()
        return tokens

    def _begun(self) -> Generation:
        if self._generation is None:
            self._generation = self.engine.stream(
                [*self._prompt, *self.tokens],
                max_tokens=self._max_tokens - len(self.tokens),
                seed=self._seed,
                progress=self._stop_if_cancelled,
                **self._options,
            )
            terms = self._generation.terms
            self._seed, self._generation.context.round = terms.seed, self._round  # the draws go on where they were
            self.lossless, self.speculating, self.precision = terms.lossless, terms.gamma != 0, terms.precision
        return self._generation

    def _stop_if_cancelled(self, _done: int, _total: int) -> None:
        if self.caller.gone:
            raise _Cancelled

    @property
    def cached(self) -> bool:
        """Whether it holds caches."""
        return self._generation is not None

    def close(self) -> None:
        """Gives the caches up; a later step reads prompt and tokens again."""
        if self._generation is not None:
            generation, self._generation = self._generation, None
            self._round = generation.context.round
            generation.close()
            self.stats.add(generation.stats)
            self.stats.requests = 1

    def summary(self) -> str:
        """One line for the log."""
        stats = self.stats
        if self.caller.error is not None:
            return f"request {self.id[:8]}: {self.model}, failed after {stats.tokens} tokens: {self.caller.error}"
        words = [f"request {self.id[:8]}: {self.model}, {stats.tokens} tokens in {stats.target_passes} target passes "
                 f"({stats.tokens_per_target_pass:.2f} a pass)"]  # fmt: skip
        words += [f"acceptance {stats.acceptance_rate:.2f}"] if stats.drafted else []
        words += ["lossless" if self.lossless else "not lossless (lenience above 1)", f"{self.precision} activations"]
        words += [f"{stats.tok_s:.1f} tok/s", f"fallback: {self.fallback or 'none'}"]
        return ", ".join([*words, *(["cancelled"] if self.caller.gone else [])])

    @property
    def fallback(self) -> str | None:
        """Why it was decoded plainly, if it was."""
        if self.stats.fallbacks:
            return "drafting failed"
        return None if self.speculating else (why_plain(self.engine) or WITH_A_SEED)


class Requests:
    """The requests under way. The caches of those not heard of for longest are given up when there are too many.

    Args:
        on_end: called with a request that ended.
    """

    def __init__(self, on_end: Callable[[Request], None]) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()
        self._on_end = on_end

    def __len__(self) -> int:
        return len(self._requests)

    def all(self) -> list[Request]:
        """All of them, the one heard of last at the end."""
        return list(self._requests.values())

    def get(self, request_id: str) -> Request | None:
        """A request, which is the one heard of last from now on."""
        request = self._requests.get(request_id)
        if request is not None:
            self._requests.move_to_end(request_id)
        return request

    def add(self, request: Request) -> None:
        """Takes a request in. Beyond MOST_KNOWN the oldest that have begun and lost their caches are forgotten."""
        self._requests[request.id] = request
        idle = [each for each in self.all() if each.given and not each.cached]
        for old in idle[: max(0, len(self._requests) - MOST_KNOWN)]:
            self.end(old.id)

    def make_room(self) -> None:
        """Leaves caches to the MOST_CACHED requests heard of last. On the thread that computes."""
        cached = [request for request in self.all() if request.cached]
        for request in cached[: max(0, len(cached) - MOST_CACHED)]:
            request.close()

    def cancel(self, request_id: str) -> None:
        """Ends a request with its next step."""
        if request := self._requests.get(request_id):
            request.cancel()

    def end(self, request_id: str) -> None:
        """Lets a request go."""
        if request := self._requests.pop(request_id, None):
            request.close()
            self._on_end(request)

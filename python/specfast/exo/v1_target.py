"""A target on an MLX model under a sampler of the host's: rows are drawn one after another, as plain decoding draws them."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .. import _core
from ..context import Context
from ..controllers import Controller
from ..drafters import Drafter
from ..generation import rounds
from ..stats import SpeculationStats
from ..targets import Progress

Processor = Callable[[Any, Any], Any]
_TRIMMABLE = ("KVCache", "QuantizedKVCache", "ConcatenateKVCache")


def can_roll_back(caches: Sequence[Any]) -> bool:
    """Whether every layer's cache can drop its last tokens, however many it holds."""
    return all(type(cache).__name__ in _TRIMMABLE and cache.is_trimmable() for cache in caches)


class SampledTarget:
    """An MLX model whose tokens a sampler draws; drafted tokens are kept as long as they are the ones drawn.

    One draw a token that is kept, in order, so that random streams of the host go on as in plain decoding.

    Args:
        model: of mlx-lm's interface.
        caches: its caches, which hold `read` tokens of the context.
        sampler: from log probabilities (1, V) to a token.
        processors: edits of logits (1, V), told the tokens since `read`.
        read: tokens of the context that the caches hold.
        one_draw: whether all rows may be drawn at once: the sampler is deterministic.
    """

    def __init__(
        self,
        model: Any,
        caches: Sequence[Any],
        sampler: Callable[[Any], Any],
        processors: Sequence[Processor],
        read: int,
        *,
        one_draw: bool = False,
    ) -> None:
        self._mx = importlib.import_module("mlx.core")
        self._stream = importlib.import_module("mlx_lm.generate").generation_stream
        self._model, self._caches, self._sampler, self._processors = model, caches, sampler, tuple(processors)
        self._first = self.length = read
        self._rows = self._pending = 0
        self._one_draw = one_draw and not processors
        self.log_probabilities: list[Any] = []

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        """The host has done it."""

    def verify(self, context: Context, proposal: _core.Proposal | None) -> _core.Verdict:
        """One pass over the unread and the drafted tokens; then draws, until one is not the drafted token."""
        mx = self._mx
        pending = context.tokens[self.length :]
        drafted = proposal.tokens.tolist() if proposal else []
        self._rows, self._pending = len(pending) + len(drafted), len(pending)
        with mx.stream(self._stream):
            logits = self._model(mx.array([[*pending, *drafted]]), cache=self._caches)[0, len(pending) - 1 :]
            self.log_probabilities = []
            if self._one_draw:
                rows = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                drawn = self._sampler(rows).tolist()
                self.log_probabilities = [rows[i] for i in range(len(drawn))]
                tau = next((i for i, token in enumerate(drafted) if drawn[i] != token), len(drafted))
                return _core.Verdict(tau, drawn[tau])
            for tau in range(len(drafted) + 1):
                row = logits[tau : tau + 1]
                if self._processors:
                    seen = mx.array([*context.tokens[self._first :], *drafted[:tau]])
                    for processor in self._processors:
                        row = processor(seen, row)
                row = row - mx.logsumexp(row, axis=-1, keepdims=True)
                token = int(self._sampler(row).item())
                self.log_probabilities.append(row[0])
                if tau == len(drafted) or token != drafted[tau]:
                    return _core.Verdict(tau, token)
        raise AssertionError("a verdict ends the loop")

    def commit(self, kept: int) -> None:
        """Drops what was not kept from the caches."""
        held = self._pending + kept - 1
        for cache in self._caches:
            cache.trim(self._rows - held)
        self.length += held


def decoded(
    context: Context,
    target: SampledTarget,
    drafter: Drafter,
    controller: Controller,
    stats: SpeculationStats,
    tokenizer: Any,
    prompt_tokens: int,
) -> Iterator[tuple[Any, int]]:
    """mlx-lm's responses to the tokens of rounds, each with how many of its round are still to come."""
    module = importlib.import_module("mlx_lm.generate")
    mx = importlib.import_module("mlx.core")
    detokenizer, started = tokenizer.detokenizer, time.perf_counter()
    count, prompt_speed = 0, 0.0
    for chunk in rounds(context, target, drafter, controller, stats):
        for i, token in enumerate(chunk.token_ids):
            if count == 0:
                prompt_speed = prompt_tokens / (time.perf_counter() - started)
                started = time.perf_counter()
            count += 1
            left = len(chunk.token_ids) - i - 1
            last = context.done and left == 0
            ends = token in context.eos_ids
            if not ends:
                detokenizer.add_token(token)
            if last:
                detokenizer.finalize()
            response = module.GenerationResponse(
                text=detokenizer.last_segment,
                token=token,
                logprobs=target.log_probabilities[i],
                from_draft=i < len(chunk.token_ids) - 1,
                prompt_tokens=prompt_tokens,
                prompt_tps=prompt_speed,
                generation_tokens=count,
                generation_tps=count / max(time.perf_counter() - started, 1e-9),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=("stop" if ends else "length") if last else None,
            )
            yield response, left

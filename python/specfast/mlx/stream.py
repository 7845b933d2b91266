"""mlx-lm's `stream_generate`, `generate_step` and `generate` on specfast's engine loop: drafts are judged by its law."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from mlx import nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..config import require_whole
from ..errors import ConfigurationError
from ..generation import Terms
from ..models import check_prompt
from .host import HostTarget
from .options import options_of
from .requests import Request, begin


@dataclass(frozen=True)
class GenerationResponse:
    """A token with mlx-lm's fields, and what was accepted.

    Attributes:
        text: the text that became complete; may be empty.
        token: the token's id.
        logprobs: log-probabilities (vocab,) before truncation and temperature, computed when they are looked at; None
            where a round was one native call, which never writes them out (ask for them with logprobs=True).
        from_draft: whether a drafter proposed the token.
        prompt_tokens, prompt_tps: tokens of the prompt, and tokens per second of reading it.
        generation_tokens, generation_tps: tokens generated so far, and per second.
        peak_memory: of MLX's arrays, in GB.
        finish_reason: "stop" (an end token) or "length" in the last response, else None.
        acceptance: accepted over drafted tokens so far; 0.0 before anything was drafted.
    """

    text: str
    token: int
    logprobs: mx.array | None
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: Literal["stop", "length"] | None = None
    acceptance: float = 0.0


class Stream(Iterator[GenerationResponse]):
    """The responses of a request. Closing it, as its end does, leaves the caller's caches with what was given out."""

    def __init__(self, request: Request, detokenizer: Any) -> None:
        self._request = request
        self._responses = _responses(request, detokenizer)

    def __next__(self) -> GenerationResponse:
        return next(self._responses)

    def close(self) -> None:
        """Ends the request."""
        self._responses.close()

    @property
    def terms(self) -> Terms:
        """What it is decoded under: path, precision, rule, drafter, gamma, seed."""
        return self._request.generation.terms

    @property
    def stats(self) -> dict[str, Any]:
        """Counters and rates so far, with path ("native", or "host" once a pass ran in mlx-lm's layers) and precision."""
        return self._request.stats()

    @property
    def decisions(self) -> list[str]:
        """For people: who drafted how many tokens how often, and what was accepted at each position."""
        return self._request.generation.stats.decision_lines()


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    **options: Any,
) -> Stream:
    """Generates token by token from any mlx-lm model, which it accelerates where the native decoder knows it.

    Where mlx-lm accepts a draft that equals the target's own sample, this is rejection sampling (Leviathan et al. 2022,
    arXiv:2211.17192, and its block form, Sun et al. 2024, arXiv:2403.10444): more is accepted, and the law is the
    target's all the same. A model without a native path runs in mlx-lm's own layers, with the same rules: `stats` says so.

    Args:
        model, draft_model: of one tokenizer.
        tokenizer: from `mlx_lm.load`.
        prompt: text, encoded as mlx-lm does, or token ids.
        max_tokens: most tokens to generate; -1 for no limit.
        **options: see Options; mlx-lm's `sampler`, `logits_processors`, `prompt_cache`, `kv_bits` and so on under its
            names, and num_draft_tokens, drafter, early_exit, temp, top_p, min_p, top_k, lenience, seed, logprobs.

    Raises:
        ConfigurationError: an option outside its range, or options that exclude each other.
        UnsupportedModelError: early exit on a model without a native path.
    """
    require_max_tokens(max_tokens)
    chosen = options_of("stream_generate", options)
    tokenizer = tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)
    tokens = _encode(tokenizer, prompt)
    ends = frozenset(tokenizer.eos_token_ids)
    return Stream(begin(model, draft_model, tokens, max_tokens, ends, chosen), tokenizer.detokenizer)


def generate(model: nn.Module, tokenizer: Any, prompt: Any, verbose: bool = False, **options: Any) -> str:
    """The whole text; verbose prints it as it comes, and what it took. Takes what `stream_generate` takes."""
    if verbose:
        print("=" * 10)
    text = []
    response = None
    stream = stream_generate(model, tokenizer, prompt, **options)
    for response in stream:
        text.append(response.text)
        if verbose:
            print(response.text, end="", flush=True)
    if verbose and response:
        print("\n" + "=" * 10)
        print(summary(stream, response))
    return "".join(text)


def summary(stream: Stream, last: GenerationResponse) -> str:
    """mlx-lm's figures after a generation, and specfast's."""
    stats = stream.stats
    return (
        f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {last.peak_memory:.3f} GB\n"
        f"Path: {stats['path']}, precision {stats['precision']}, drafter {stats['drafter']}, acceptance "
        f"{last.acceptance:.2f}, {stats['tokens_per_target_pass']:.2f} tokens per target pass"
    )


def generate_step(
    prompt: mx.array | Sequence[int],
    model: nn.Module,
    *,
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    input_embeddings: mx.array | None = None,
    **options: Any,
) -> Iterator[tuple[Any, ...]]:
    """mlx-lm's `generate_step`, and its `speculative_generate_step` where something drafts.

    Yields:
        (token, log-probabilities (vocab,)), and third whether it was drafted where a draft model, a drafter or an early
        exit was given. Log-probabilities are computed when they are looked at.

    Args:
        prompt: token ids (n,), at least one.
        max_tokens: -1 for no limit; 0 only reads the prompt into a prompt_cache.
        **options: see `stream_generate`.

    Raises:
        ConfigurationError: also for input_embeddings, which mlx_lm.generate_step takes.
    """
    if input_embeddings is not None:
        raise ConfigurationError("input_embeddings are not supported, only token ids; mlx_lm.generate_step takes them")
    require_max_tokens(max_tokens, least=0)
    drafted = draft_model is not None or options.get("drafter") is not None or options.get("early_exit") is not None
    chosen = options_of("generate_step", {"logprobs": options.get("early_exit") is None, **options})
    request = begin(model, draft_model, _token_ids(prompt), max_tokens, (), chosen)
    return _steps(request, drafted=drafted)


def _steps(request: Request, *, drafted: bool) -> Iterator[tuple[Any, ...]]:
    with closing(_tokens(request)) as steps:
        for token, logprobs, from_draft in steps:
            yield (token, logprobs, from_draft) if drafted else (token, logprobs)


def _tokens(request: Request) -> Generator[tuple[int, mx.array | None, bool], None, None]:
    """The tokens of a request one by one: token, log-probabilities, whether it was drafted."""
    context, stats, target = request.generation.context, request.generation.stats, request.target
    progress = request.progress or (lambda *_: None)
    given = total = context.prompt_length
    progress(0, total)
    accepted = 0
    try:
        for chunk in request.generation:
            if given == total:
                progress(total, total)
            drafted, accepted = stats.accepted - accepted, stats.accepted
            logits = target.logits if isinstance(target, HostTarget) else None
            for place, token in enumerate(chunk.token_ids):
                given += 1
                yield token, None if logits is None else _logprobs(logits, place), place < drafted
    except GeneratorExit:  # what is given out so far; after an error, or while Python ends, nothing more is computed
        if not sys.is_finalizing():
            request.end(context.tokens[:given])
        raise
    finally:
        request.generation.close()
    if given == total:
        progress(total, total)
    request.end(context.tokens[:given])


def _logprobs(logits: mx.array, place: int) -> mx.array:
    row = logits[place]
    return row - mx.logsumexp(row)


def require_max_tokens(max_tokens: Any, least: int = 1) -> None:
    """Checks that it is a number of tokens, or -1.

    Raises:
        ConfigurationError: it is neither.
    """
    if isinstance(max_tokens, float) or max_tokens != -1:
        require_whole("max_tokens", max_tokens, least, hint=", or -1 for no limit")


def _encode(tokenizer: Any, prompt: str | Sequence[int] | mx.array) -> list[int]:
    if isinstance(prompt, str):
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        prompt = tokenizer.encode(prompt, add_special_tokens=special)
    return _token_ids(prompt)


def _token_ids(prompt: Any) -> list[int]:
    tokens = check_prompt(prompt.tolist() if isinstance(prompt, mx.array) else prompt, "text or token ids")
    if isinstance(tokens, str) or not isinstance(tokens[0], int):
        raise ConfigurationError(f"the prompt is {prompt!r:.100}, but must be token ids here; encode it first")
    return [*map(int, tokens)]


def _responses(request: Request, detokenizer: Any) -> Generator[GenerationResponse, None, None]:
    context, stats = request.generation.context, request.generation.stats
    detokenizer.reset()
    begun, first = time.perf_counter(), 0.0
    with closing(_tokens(request)) as steps:
        for count, (token, logprobs, from_draft) in enumerate(steps, 1):
            first = first or time.perf_counter()
            last = context.done and context.prompt_length + count == len(context.tokens)
            if not (last and context.finish_reason == "eos"):
                detokenizer.add_token(token)
            if last:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=token,
                logprobs=logprobs,
                from_draft=from_draft,
                prompt_tokens=context.prompt_length,
                prompt_tps=context.prompt_length / (first - begun),
                generation_tokens=count,
                generation_tps=count / (time.perf_counter() - first),
                peak_memory=_peak_memory() / 1e9,
                finish_reason=None if not last else "stop" if context.finish_reason == "eos" else "length",
                acceptance=stats.acceptance_rate,
            )


def _peak_memory() -> int:
    return int((mx if hasattr(mx, "get_peak_memory") else mx.metal).get_peak_memory())

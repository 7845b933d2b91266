"""mlx-lm's `stream_generate` on specfast's engine loop: drafts are verified natively, by specfast's law."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from mlx import nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import _core
from ..context import Context
from ..controllers import AutoGamma, FixedGamma
from ..drafters import Drafter, ModelDrafter, NoDrafter
from ..errors import ConfigurationError, UnsupportedModelError
from ..generation import Generation
from ..sampling import SamplingParams
from ..targets import NativeTarget
from .accelerate import accelerate, native_model_of, report

MOST_DRAFTED = 20


@dataclass(frozen=True)
class GenerationResponse:
    """A token with mlx-lm's fields.

    Attributes:
        text: the text that became complete; may be empty.
        token: the token's id.
        logprobs: always None: the law is never written out.
        from_draft: whether the draft model proposed the token.
        prompt_tokens, prompt_tps: tokens of the prompt, and tokens per second of reading it.
        generation_tokens, generation_tps: tokens generated so far, and per second.
        peak_memory: of MLX's arrays, in GB.
        finish_reason: "stop" (an end token) or "length" in the last response, else None.
    """

    text: str
    token: int
    logprobs: None
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: Literal["stop", "length"] | None = None


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    *,
    num_draft_tokens: int | None = None,
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    top_k: int = 0,
    lenience: float = 1.0,
    seed: int | None = None,
) -> Iterator[GenerationResponse]:
    """Generates token by token from an mlx-lm model, which it accelerates if it is not yet.

    Where mlx-lm accepts a draft that equals the target's own sample, this is rejection sampling (Leviathan et al. 2022,
    arXiv:2211.17192, and its block form, Sun et al. 2024, arXiv:2403.10444): more is accepted, and the law is the
    target's all the same. The prompt's logits are never computed.

    Args:
        model, draft_model: of one tokenizer; see `accelerate` for what is supported.
        tokenizer: from `mlx_lm.load`.
        prompt: text, encoded as mlx-lm does, or token ids.
        max_tokens: most tokens to generate; -1 for no limit.
        num_draft_tokens: drafted per round, 1 to 20; None measures what pays, down to none.
        temp, top_p, min_p, top_k: as for mlx-lm's `make_sampler`; temp 0 is greedy.
        lenience: above 1 accepts more, and the law is no longer exactly the target's.
        seed: of the random streams; None draws one.

    Raises:
        UnsupportedModelError: a model that cannot be accelerated; mlx_lm.stream_generate runs it.
        ConfigurationError: an option outside its range.
    """
    if max_tokens == 0 or max_tokens < -1:
        raise ConfigurationError(f"max_tokens is {max_tokens}, but must be at least 1, or -1 for no limit")
    if num_draft_tokens is not None and not 1 <= num_draft_tokens <= MOST_DRAFTED:
        raise ConfigurationError(f"num_draft_tokens is {num_draft_tokens}, but must be in 1 to {MOST_DRAFTED}")
    if not 0.5 <= lenience <= 2:
        raise ConfigurationError(f"lenience is {lenience:g}, but must be in 0.5 to 2")
    tokenizer = tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)
    tokens = _encode(tokenizer, prompt)
    target = _native(model)
    context = Context(tokens, max_tokens if max_tokens > 0 else target.max_context, target.max_context)
    context.eos_ids = frozenset(tokenizer.eos_token_ids)
    sampling = SamplingParams(
        temperature=temp, top_k=top_k, top_p=top_p or 1.0, min_p=min_p, truncation="mlx",
        seed=secrets.randbits(53) if seed is None else seed,
    )  # fmt: skip
    law = sampling.law(target.vocab, target.vocab)
    rule = "block" if num_draft_tokens or seed is None else "coupled"  # timing must not change a seed's text
    if temp == 0 or lenience != 1:
        rule = "token"
    context.whole_rounds = seed is not None and rule == "block"
    timed = seed is None or temp == 0 or rule == "coupled"
    controller = AutoGamma(MOST_DRAFTED) if num_draft_tokens is None and timed else FixedGamma(num_draft_tokens or 5)
    drafter: Drafter = NoDrafter()
    if draft_model is not None:
        drafter = ModelDrafter(_native(draft_model), law, sampling.seed, target.max_context, rule)
    generation = Generation(
        context,
        NativeTarget(target, law, lenience, sampling.seed, target.max_context, rule),
        drafter,
        controller,
        on_draft_failure=_tell,
    )
    return _responses(generation, tokenizer.detokenizer)


def _encode(tokenizer: Any, prompt: str | Sequence[int] | mx.array) -> list[int]:
    if isinstance(prompt, str):
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        prompt = tokenizer.encode(prompt, add_special_tokens=special)
    tokens = [int(token) for token in (prompt.tolist() if isinstance(prompt, mx.array) else prompt)]
    if not tokens:
        raise ConfigurationError("the prompt has 0 tokens, but at least one is needed")
    return tokens


def _native(model: nn.Module) -> _core.Model:
    native = native_model_of(model) or native_model_of(accelerate(model))
    if native is None:
        raise UnsupportedModelError(f"{report(model).reason}; mlx_lm.stream_generate runs it with MLX's own layers")
    return native


def _tell(error: Exception) -> None:
    warnings.warn(
        f"drafting failed, and plain decoding goes on ({type(error).__name__}: {error})", RuntimeWarning, stacklevel=2
    )


def _responses(generation: Generation, detokenizer: Any) -> Iterator[GenerationResponse]:
    context, stats = generation.context, generation.stats
    detokenizer.reset()
    begun, first, count, accepted = time.perf_counter(), 0.0, 0, 0
    for chunk in generation:
        first = first or time.perf_counter()
        drafted, accepted = stats.accepted - accepted, stats.accepted
        for place, token in enumerate(chunk.token_ids):
            count += 1
            last = context.done and place + 1 == len(chunk.token_ids)
            if not (last and context.finish_reason == "eos"):
                detokenizer.add_token(token)
            if last:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=token,
                logprobs=None,
                from_draft=place < drafted,
                prompt_tokens=context.prompt_length,
                prompt_tps=context.prompt_length / (first - begun),
                generation_tokens=count,
                generation_tps=count / (time.perf_counter() - first),
                peak_memory=_peak_memory() / 1e9,
                finish_reason=None if not last else "stop" if context.finish_reason == "eos" else "length",
            )


def _peak_memory() -> int:
    return int((mx if hasattr(mx, "get_peak_memory") else mx.metal).get_peak_memory())

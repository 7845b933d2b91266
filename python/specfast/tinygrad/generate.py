"""Generation from tinygrad models on specfast's engine loop: drafts are verified in one pass, by specfast's law."""

from __future__ import annotations

import functools
import secrets
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from tinygrad import Tensor

from .. import _core
from ..context import Context
from ..controllers import AutoGamma, FixedGamma
from ..drafters import CombinedDrafter, CopyDrafter, Drafter, EarlyExitDrafter, ModelDrafter, NoDrafter
from ..early_exit import require_exit
from ..errors import ConfigurationError, ContextFullError, IncompatibleDraftError, UnsupportedModelError
from ..generation import Generation, Result, Terms
from ..gguf_file import open_gguf
from ..gguf_model import gguf_config
from ..models import check_prompt
from ..sampling import SamplingParams
from ..targets import NativeTarget, Target
from ..text import TextStream
from . import private
from .accelerate import accelerate, logits, native_model_of, report
from .host import Forward, HostTarget, own_forward

MOST_DRAFTED = 20
DRAFTERS = ("model", "suffix", "prompt-lookup", "combined", "early-exit", "none")


def load_gguf(path: str | Path, max_context: int | None = None) -> Any:
    """tinygrad.llm's Transformer of a GGUF file, whose bytes are checked before tinygrad reads them.

    Raises:
        ModelFormatError, UnsupportedModelError: a file that is damaged, or holds what specfast does not run.
        UnsupportedHostError: a tinygrad without tinygrad.llm.
    """
    gguf_config(open_gguf(Path(path)))
    if private.version() < private.GRAPHS_FROM:
        raise private.UnsupportedHostError(
            "GGUF models need tinygrad.llm of tinygrad 0.14; install it with: pip install 'tinygrad>=0.14,<0.15'"
        )
    return private.import_llm().Transformer.from_gguf(Path(path), max_context)[0]


def generate(
    model: Any, prompt: Sequence[int] | Tensor, max_tokens: int = 256, draft_model: Any = None, **options: Any
) -> Result:
    """Generates to the end; takes what `stream_generate` takes."""
    generation = stream_generate(model, prompt, max_tokens, draft_model, **options)
    for _ in generation:
        pass
    return generation.result()


def stream_generate(
    model: Any,
    prompt: Sequence[int] | Tensor,
    max_tokens: int = 256,
    draft_model: Any = None,
    *,
    drafter: str | None = None,
    early_exit: int | Literal["auto"] | None = None,
    num_draft_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    lenience: float = 1.0,
    seed: int | None = None,
    eos_ids: Collection[int] = (),
    text: TextStream | None = None,
    forward: Forward | None = None,
    vocab: int | None = None,
    max_context: int | None = None,
) -> Generation:
    """Generates from a tinygrad model, which is accelerated if it is not yet and can be; chunk by chunk.

    A model that the native decoder knows runs there, one call per round, on tinygrad's weights. Any other runs in tinygrad, as
    `forward` says, under one TinyJit for each number of rows, with the same law and rollback. Rejection sampling keeps the
    target's law (Leviathan et al. 2022, arXiv:2211.17192, and its block form, Sun et al. 2024, arXiv:2403.10444).

    Args:
        model, draft_model: of one vocabulary. The draft must be one that can be accelerated.
        prompt: token ids.
        max_tokens: most tokens to generate.
        drafter: "model", "suffix", "prompt-lookup", "combined" (suffix and model), "early-exit" or "none"; None takes the
            draft model, else the early exit, else "suffix".
        early_exit: how many of the target's first layers draft, or "auto".
        num_draft_tokens: drafted per round, 1 to 20; None measures what pays, down to none.
        temperature, top_k, top_p, min_p: see SamplingParams; temperature 0 is greedy.
        lenience: above 1 accepts more, and the law is no longer exactly the target's.
        seed: of the random streams; None draws one.
        eos_ids: tokens that end the text.
        text: makes text of tokens; without it chunks have none.
        forward: runs a model that is not known: logits (1, M, vocab) of token ids (1, M) at a start position.
        vocab, max_context: of such a model.

    Returns:
        An iterator of chunks; its `result()` has the tokens and the counters.

    Raises:
        UnsupportedModelError: a model that is not known, without `forward`; or such a draft model.
        IncompatibleDraftError: a draft of another vocabulary.
        ConfigurationError: an option outside its range, or a prompt of 0 tokens.
        ContextFullError: a prompt that leaves no room in the context.
    """
    tokens = _tokens(prompt)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ConfigurationError(f"max_tokens is {max_tokens!r}, but must be a whole number, at least 1")
    if num_draft_tokens is not None and not 1 <= num_draft_tokens <= MOST_DRAFTED:
        raise ConfigurationError(f"num_draft_tokens is {num_draft_tokens}, but must be in 1 to {MOST_DRAFTED}")
    if not 0.5 <= lenience <= 2:
        raise ConfigurationError(f"lenience is {lenience:g}, but must be in 0.5 to 2")
    name = _drafter_name(drafter, draft_model, early_exit)
    native = None if forward is not None else _native(model)
    if native is None and forward is None:
        forward, vocab, max_context = own_forward(model)
        if report(model).path == "graph":  # on an Apple GPU: no native model, but a graph of native launches
            forward = functools.partial(logits, model)
    size = native.vocab if native is not None else vocab
    capacity = native.max_context if native is not None else max_context
    if size is None or capacity is None:
        raise ConfigurationError("forward= needs vocab= and max_context= of its model beside it")
    if not 0 <= min(tokens) <= max(tokens) < size:
        raise ConfigurationError(
            f"the prompt has token ids from {min(tokens)} to {max(tokens)}, but the model's are 0 to {size - 1}"
        )
    if len(tokens) >= capacity:
        raise ContextFullError(
            f"the prompt has {len(tokens)} tokens, but the context holds {capacity} and one must be left to generate; shorten it"
        )
    sampling = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        seed=secrets.randbits(53) if seed is None else seed,
    )  # fmt: skip
    law = sampling.law(size, size)
    rule = "block" if num_draft_tokens or seed is None else "coupled"  # timing must not change a seed's text
    if law.temperature == 0 or lenience != 1:
        rule = "token"
    context = Context(tokens, max_tokens, capacity, frozenset(eos_ids), text)
    context.whole_rounds = seed is not None and rule == "block"
    timed = seed is None or law.temperature == 0 or rule == "coupled"
    gamma: int | Literal["auto"] = "auto" if num_draft_tokens is None and timed else num_draft_tokens or 5
    target: NativeTarget | HostTarget
    if native is not None:
        target = NativeTarget(native, law, lenience, sampling.seed, capacity, rule)
    else:
        assert forward is not None
        target = HostTarget(forward, size, law, lenience, sampling.seed, capacity, rule)
    exact = lenience <= 1 or law.temperature == 0 or name == "none"
    precision = native.precision if native is not None else "tinygrad's"
    checked: Target = target
    return Generation(
        context,
        checked,
        _drafter(name, target, draft_model, early_exit, size, gamma),
        AutoGamma(MOST_DRAFTED) if gamma == "auto" else FixedGamma(gamma),
        terms=Terms(sampling.seed, gamma if name != "none" else 0, name, exact, precision,
                    "greedy" if law.temperature == 0 else rule),
        on_draft_failure=_tell,
    )  # fmt: skip


def _tokens(prompt: Sequence[int] | Tensor) -> list[int]:
    checked = check_prompt(prompt.flatten().tolist() if isinstance(prompt, Tensor) else prompt)
    if isinstance(checked, str) or any(not isinstance(token, int) for token in checked):
        raise ConfigurationError("the prompt must be token ids here; encode it with the model's tokenizer")
    return [token for token in checked if isinstance(token, int)]


def _drafter_name(drafter: str | None, draft_model: Any, early_exit: int | str | None) -> str:
    if drafter is None:
        return "model" if draft_model is not None else "early-exit" if early_exit is not None else "suffix"
    if drafter not in DRAFTERS:
        raise ConfigurationError(f"drafter is {drafter!r}, but must be one of {', '.join(DRAFTERS)}")
    if drafter in ("model", "combined") and draft_model is None:
        raise ConfigurationError(f"the {drafter} drafter needs a draft_model; 'suffix' needs none")
    if drafter == "early-exit" and early_exit is None:
        raise ConfigurationError("the early-exit drafter needs early_exit, a number of layers or 'auto'")
    return drafter


def _native(model: Any) -> _core.Model | None:
    if report(model).path == "stock":
        accelerate(model)
    return native_model_of(model)


def _drafter(
    name: str, target: NativeTarget | HostTarget, draft_model: Any, early_exit: int | Literal["auto"] | None, vocab: int,
    gamma: int | Literal["auto"],
) -> Drafter:  # fmt: skip
    if name == "none":
        return NoDrafter()
    if name in ("suffix", "prompt-lookup"):
        return CopyDrafter(name)
    if name == "early-exit":
        if not isinstance(target, NativeTarget) or early_exit is None:
            raise UnsupportedModelError("early exit needs a target that runs natively; use a draft model, or 'suffix'")
        require_exit(early_exit, target.model.layers, "the model")
        return EarlyExitDrafter(target, early_exit, gammas=range(1, MOST_DRAFTED + 1) if gamma == "auto" else (gamma,))
    draft = _native(draft_model)
    if draft is None:
        raise UnsupportedModelError(f"the draft model cannot be accelerated: {report(draft_model).reason}")
    if draft.vocab != vocab:
        raise IncompatibleDraftError(
            f"the draft model has {draft.vocab} tokens and the target {vocab}; take one of the target's family"
        )
    capacity = target.cache.capacity if isinstance(target, NativeTarget) else target.capacity
    model = ModelDrafter(draft, target.law, target.seed, capacity, target.rule)
    return model if name == "model" else CombinedDrafter({"suffix": CopyDrafter("suffix"), "model": model})


def _tell(error: Exception) -> None:
    warnings.warn(
        f"drafting failed, and plain decoding goes on ({type(error).__name__}: {error})", RuntimeWarning, stacklevel=2
    )

"""Generation from tinygrad models on specfast's engine loop: drafts are verified in one pass, by specfast's law."""

from __future__ import annotations

import functools
import operator
import secrets
import warnings
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from tinygrad import Tensor

from .. import _core
from ..architecture import ModelConfig
from ..checkpoint import build_model
from ..compatibility import compare_models
from ..config import DRAFTERS, check_option, require_whole
from ..context import Context
from ..controllers import AutoGamma, FixedGamma
from ..drafters import CombinedDrafter, CopyDrafter, Drafter, EarlyExitDrafter, ModelDrafter, NoDrafter
from ..early_exit import require_exit
from ..errors import (
    ConfigurationError,
    ContextFullError,
    IncompatibleDraftError,
    ModelFormatError,
    UnsupportedModelError,
)
from ..generation import Generation, Result, Terms
from ..gguf_file import GgufFile, open_gguf
from ..gguf_model import gguf_config, gguf_weights, turns_pairs
from ..models import check_prompt
from ..sampling import SamplingParams
from ..targets import NativeTarget, Target
from ..text import TextStream
from . import private
from .accelerate import accelerate, logits, native_model_of, note, report
from .host import Forward, HostTarget, own_forward

MOST_DRAFTED = 20
_DRAFTERS = (*DRAFTERS, "early-exit")


_NEEDED = ("context_length", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base")
_files: weakref.WeakKeyDictionary[Any, Path] = weakref.WeakKeyDictionary()


def load_gguf(path: str | Path, max_context: int | None = None) -> Any:
    """tinygrad.llm's Transformer of a GGUF file, which is checked before tinygrad reads it: its bytes, its sizes, its tensors.

    tinygrad leaves factors for RoPE in a file (`rope_freqs.weight`) out; a warning and `report` say so.

    Args:
        path: the file.
        max_context: bounds the context below the file's.

    Raises:
        ModelFormatError, UnsupportedModelError: a file that is damaged or incomplete, or holds what specfast or tinygrad does not run.
        ConfigurationError: a context below 1, or a path that is none.
        UnsupportedHostError: a tinygrad without tinygrad.llm.
    """
    if max_context is not None:
        require_whole("max_context", max_context, 1, hint="; leave it out for the model's own")
    try:
        place = Path(path)
    except TypeError:
        raise ConfigurationError(f"path is {path!r:.100}, but must name a GGUF file") from None
    file = open_gguf(place)
    config = gguf_config(file)
    if private.version() < private.GRAPHS_FROM:
        raise private.UnsupportedHostError(
            "GGUF models need tinygrad.llm of tinygrad 0.14; install it with: pip install 'tinygrad>=0.14,<0.15'"
        )
    _require_whole_model(file, config)
    try:
        model = private.import_llm().Transformer.from_gguf(place, max_context)[0]
    except (LookupError, ValueError, TypeError, AssertionError, ArithmeticError) as error:
        raise ModelFormatError(
            f"{place}: tinygrad cannot build the model ({type(error).__name__}: {error}); download or convert it again"
        ) from error
    if len(model.blk) != config.layers:
        raise ModelFormatError(
            f"{place}: tinygrad builds {len(model.blk)} layers of the file's {config.layers}; convert the model again"
        )
    _files[model] = place
    if "rope_freqs.weight" in file.tensors:
        notice = (
            f"{place.name}: tinygrad leaves the file's factors for RoPE (rope_freqs.weight) out, so that long texts come out "
            "worse; `specfast generate` applies them"
        )
        note(model, notice)
        warnings.warn(notice, RuntimeWarning, stacklevel=2)
    return model


def _require_whole_model(file: GgufFile, config: ModelConfig) -> None:
    """Raises for what tinygrad's own loader would fail on, or would leave out."""
    name = config.model_type
    for key in (f"{name}.{each}" for each in _NEEDED):
        if file.metadata.get(key) is None:
            raise ModelFormatError(
                f"{file.path}: '{key}' is missing, which tinygrad needs; download or convert the model again, or run it with "
                "`specfast generate`"
            )
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or len(tokens) != config.vocab:
        count = f"has {len(tokens)} elements" if isinstance(tokens, list) else "is missing"
        raise ModelFormatError(
            f"{file.path}: 'tokenizer.ggml.tokens' {count}, but the embedding has {config.vocab} rows, and tinygrad needs as many; "
            "download or convert the model again"
        )
    scaling = file.metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none":
        raise UnsupportedModelError(
            f"{file.path}: RoPE scaling {scaling!r} ('{name}.rope.scaling.type') is not supported in tinygrad, which leaves it "
            "out; `specfast generate` applies it"
        )
    weights = gguf_weights(file, config, in_place=True)
    build_model(file.path, config, weights, rope_pairs=turns_pairs(config))


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
    num_draft_tokens: int | Literal["auto"] | None = None,
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
        model, draft_model: of one vocabulary; of other widths than each other where both are load_gguf's, and their files'
            tokens the same. The draft must be one that can be accelerated.
        prompt: token ids.
        max_tokens: most tokens to generate.
        drafter: "model", "suffix", "prompt-lookup", "combined" (suffix and model), "early-exit" or "none"; None takes the
            draft model, else the early exit, else "suffix".
        early_exit: how many of the target's first layers draft, or "auto".
        num_draft_tokens: drafted per round, 1 to 20; "auto" and None measure what pays, down to none.
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
        ConfigurationError: an option outside its range, two ways to draft, a prompt of 0 tokens, or a weight that was
            replaced since the model was accelerated.
        ContextFullError: a prompt that leaves no room in the context.
    """
    tokens = _tokens(prompt)
    require_whole("max_tokens", max_tokens, 1)
    if num_draft_tokens is not None and num_draft_tokens != "auto":
        require_whole("num_draft_tokens", num_draft_tokens, 1, MOST_DRAFTED, ", or 'auto'")
    fixed = None if num_draft_tokens == "auto" else num_draft_tokens
    lenience = check_option("lenience", lenience)
    name = drafter_name(drafter, check_option("early_exit", early_exit), draft=draft_model is not None)
    if text is not None and not isinstance(text, TextStream):
        raise ConfigurationError(
            f"text is {text!r:.100}, but must be a specfast.text.TextStream, which makes text of tokens"
        )
    _check_forward(forward, vocab, max_context)
    native = None if forward is not None else _native(model)
    if native is None and forward is None:
        forward, vocab, max_context = own_forward(model)
        if report(model).path == "graph":  # on an Apple GPU: no native model, but a graph of native launches
            forward = functools.partial(logits, model)
    size = native.vocab if native is not None else vocab
    capacity = native.max_context if native is not None else max_context
    assert size is not None
    assert capacity is not None
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
    draft = (
        _draft(model, draft_model, size, min(len(tokens) + max_tokens, capacity))
        if name in ("model", "combined")
        else None
    )
    law = sampling.law(size, min(size, draft.vocab) if draft else size)  # beyond the common width are no tokens
    rule = "block" if fixed or seed is None else "coupled"  # timing must not change a seed's text
    if law.temperature == 0 or lenience != 1:
        rule = "token"
    context = Context(tokens, max_tokens, capacity, _ends(eos_ids, size), text)
    context.whole_rounds = seed is not None and rule == "block"
    timed = seed is None or law.temperature == 0 or rule == "coupled"
    gamma: int | Literal["auto"] = "auto" if fixed is None and timed else fixed or 5
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
        _drafter(name, target, draft, early_exit, gamma, capacity),
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


def _check_forward(forward: Any, vocab: Any, max_context: Any) -> None:
    if forward is None:
        if vocab is not None or max_context is not None:
            raise ConfigurationError(
                "vocab= and max_context= are those of a model that forward= runs; give it, or neither"
            )
        return
    if not callable(forward):
        raise ConfigurationError(
            f"forward is {forward!r:.100}, but must be a function of token ids and a start position"
        )
    if vocab is None or max_context is None:
        raise ConfigurationError("forward= needs vocab= and max_context= of its model beside it")
    require_whole("vocab", vocab, 1)
    require_whole("max_context", max_context, 1)


def _ends(eos_ids: Any, vocab: int) -> frozenset[int]:
    try:
        ends = frozenset(operator.index(token) for token in eos_ids)
    except TypeError:
        raise ConfigurationError(f"eos_ids is {eos_ids!r:.100}, but must be a collection of token ids") from None
    outside = sorted(token for token in ends if not 0 <= token < vocab)
    if outside:
        raise ConfigurationError(f"eos_ids has token {outside[0]}, but the model's are 0 to {vocab - 1}")
    return ends


def drafter_name(drafter: str | None, early_exit: int | str | None, *, draft: bool) -> str:
    """Who drafts: the drafter that was named, else the draft model, else the early exit, else "suffix".

    Raises:
        ConfigurationError: an unknown one, one that lacks what it drafts with, or two ways to draft.
    """
    if drafter is not None and drafter not in _DRAFTERS:
        raise ConfigurationError(f"drafter is {drafter!r:.100}, but must be one of {', '.join(_DRAFTERS)}")
    if drafter in ("model", "combined") and not draft:
        raise ConfigurationError(f"the {drafter} drafter needs a draft model; 'suffix' needs none")
    if drafter == "early-exit" and early_exit is None:
        raise ConfigurationError("the early-exit drafter needs early_exit, a number of layers or 'auto'")
    if early_exit is not None and (draft or drafter not in (None, "early-exit")):
        other = f"drafter {drafter}" if drafter not in (None, "early-exit") else "a draft model"
        raise ConfigurationError(f"early_exit {early_exit} and {other} are two ways to draft; give one of them")
    if draft and drafter not in (None, "model", "combined"):
        raise ConfigurationError(f"a draft model and drafter {drafter} are two ways to draft; give one of them")
    return drafter or ("model" if draft else "early-exit" if early_exit is not None else "suffix")


def _native(model: Any) -> _core.Model | None:
    if report(model).path == "stock":
        accelerate(model)
    return native_model_of(model)


def _draft(model: Any, draft_model: Any, vocab: int, longest: int) -> _core.Model:
    """The native model behind a draft that fits a target of `vocab` tokens. `longest`: tokens that the text may have."""
    draft = _native(draft_model)
    if draft is None:
        raise UnsupportedModelError(f"the draft model cannot be accelerated: {report(draft_model).reason}")
    if draft.vocab != vocab:
        _require_same_tokens(model, draft_model, vocab, draft.vocab)
    if draft.max_context < longest:
        warnings.warn(
            f"the draft model's context holds {draft.max_context} tokens, and the text may have {longest}: beyond its own it "
            "drafts nothing; load it with as much, or ask for fewer tokens",
            RuntimeWarning,
            stacklevel=3,
        )
    return draft


def _drafter(
    name: str, target: NativeTarget | HostTarget, draft: _core.Model | None, early_exit: int | Literal["auto"] | None,
    gamma: int | Literal["auto"], capacity: int,
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
    assert draft is not None
    drafting = ModelDrafter(draft, target.law, target.seed, capacity, target.rule)
    return drafting if name == "model" else CombinedDrafter({"suffix": CopyDrafter("suffix"), "model": drafting})


def _require_same_tokens(model: Any, draft_model: Any, vocab: int, drafts: int) -> None:
    """Logits of two widths are padded ones of the same tokens, or those of other tokens: the files tell."""
    files = _files.get(model), _files.get(draft_model)
    if files[0] is None or files[1] is None:
        raise IncompatibleDraftError(
            f"the draft model has {drafts} tokens and the target {vocab}, and where either is not load_gguf's, whether these are "
            "the same and padding is not known; load both with load_gguf, or take a draft of the target's family"
        )
    if not compare_models(files[0], files[1]).tokens_match:
        raise IncompatibleDraftError(
            f"the tokens of {files[1]} ({drafts}) are not those of {files[0]} ({vocab}); take a draft of the target's family"
        )


def _tell(error: Exception) -> None:
    warnings.warn(
        f"drafting failed, and plain decoding goes on ({type(error).__name__}: {error})", RuntimeWarning, stacklevel=2
    )

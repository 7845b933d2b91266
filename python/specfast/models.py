"""The pair of models an engine runs: found, compared, loaded, with the tokenizer they share."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from . import embedded
from .chat import chat_template, render_chat
from .checkpoint import LoadedModel, load_model, model_config
from .compatibility import Status, compare_models
from .config import NO_DRAFT, EarlyExit, SpeculativeConfig
from .early_exit import require_exit
from .errors import ConfigurationError, ModelFormatError, SpecfastError
from .families import explain_suggestion, parameters, ranked_drafts, suggested_drafts
from .tokenizer import Tokenizer

Notify = Callable[[str], None]
LoadModel = Callable[..., LoadedModel]
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
EMPTY_PROMPT = "the prompt has 0 tokens; give some text, or at least one token id"


class Resolve(Protocol):
    """Finds a model's directory by its name, and has it fetched if need be, as `hub.resolve` does."""

    def __call__(self, name: str, *, metadata_only: bool = False) -> Path:
        """The directory, with weights unless metadata_only."""


def check_prompt(
    prompt: Prompt, wanted: str = "text, token ids, or messages with role and content"
) -> str | list[int] | list[Mapping[str, Any]]:
    """A prompt that is text, messages, or token ids (any sequence or array of integers).

    Args:
        wanted: of these, in words.

    Raises:
        ConfigurationError: it is none of these, or has 0 tokens.
    """
    unordered = isinstance(prompt, bytes | bytearray | Mapping | Set)
    if unordered or not isinstance(prompt, Iterable) or not isinstance(prompt, Sized):
        raise ConfigurationError(f"the prompt is of type {type(prompt).__name__}, but must be {wanted}")
    if len(prompt) == 0:
        raise ConfigurationError(EMPTY_PROMPT)
    if isinstance(prompt, str):
        return prompt
    messages = [item for item in prompt if isinstance(item, Mapping)]
    if messages and len(messages) == len(prompt):
        return messages
    tokens: list[int] = []
    for item in prompt:
        try:
            if isinstance(item, bool):
                raise TypeError
            tokens.append(operator.index(item))  # type: ignore[arg-type]
        except TypeError:
            raise ConfigurationError(f"the prompt holds {item!r:.100}, but must be {wanted}") from None
    return tokens


def print_notice(message: str) -> None:
    """The default way to tell people something: a line on stderr."""
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class DraftChoice:
    """A draft directory, or none, and why."""

    status: Status = "unknown"
    directory: Path | None = None
    name: str | None = None


@dataclass(frozen=True)
class ModelPair:
    """A target, its draft if there is one that fits, and their tokenizer.

    Attributes:
        target, draft: the native models; without a draft, drafting is copying, or early exit.
        early_exit: how many of the target's first layers draft, or "auto"; there is no draft then.
        target_name, draft_name: what people call them.
        template: the target's chat template, if any.
        compatibility: "compatible", "incompatible" (then there is no draft) or "unknown" (nothing to compare).
        vocab: ids from here on are padding of the target's logits; it does not depend on the draft.
        eos_ids: tokens that end a text.
    """

    target: LoadedModel
    draft: LoadedModel | None
    early_exit: EarlyExit
    target_name: str
    draft_name: str | None
    tokenizer: Tokenizer
    template: str | None
    compatibility: Status
    vocab: int
    eos_ids: tuple[int, ...]

    @classmethod
    def load(
        cls,
        config: SpeculativeConfig,
        precision: str | None,
        max_context: int | None,
        isa: str | None,
        notify: Notify,
        resolve: Resolve,
        kv_bits: int | None = None,
        layers: range | None = None,
        load_target: LoadModel = load_model,
        load_draft: LoadModel = load_model,
    ) -> ModelPair:
        """Finds and loads what a configuration names; a draft that does not fit is refused with a warning.

        The draft's weights are fetched only once its tokens are known to be the target's. With `layers` the target is a
        range of its layers. `load_target` and `load_draft` take what `load_model` does.

        Raises:
            ModelFormatError, UnsupportedModelError, DownloadError: a model that cannot be had.
            ConfigurationError: an early exit the target does not have.
        """
        directory = embedded.path("target") if config.target_model is None else resolve(config.target_model)
        early_exit = None if config.disabled else config.early_exit
        if early_exit is not None:
            require_exit(early_exit, model_config(directory).layers, _target_name(config))
        target = load_target(
            directory, precision=precision, isa=isa, max_context=max_context, kv_bits=kv_bits, layers=layers
        )
        tokenizer = Tokenizer(directory)
        choice = choose_draft(config, directory, notify, resolve)
        draft = None
        if choice.directory:
            draft = load_draft(choice.directory, isa=isa, precision=_draft_precision(precision), kv_bits=kv_bits)
            if layers is None and draft.model.weight_bytes >= target.model.weight_bytes:
                notify(
                    f"check that the draft model is actually smaller: {choice.name} has {draft.model.weight_bytes / 1e6:.0f} MB "
                    f"of weights, {_target_name(config)} {target.model.weight_bytes / 1e6:.0f} MB; expect no speed-up"
                )
        end = tokenizer.token_id(tokenizer.special_text("eos_token"))
        if end is not None and end >= target.config.vocab:
            raise ModelFormatError(
                f"{directory}: the tokenizer's end token is {end}, but the model's tokens are 0 to {target.config.vocab - 1}, so "
                "that no text would end there; take the tokenizer that belongs to the weights"
            )
        return cls(
            target=target,
            draft=draft,
            early_exit=early_exit,
            target_name=_target_name(config),
            draft_name=choice.name if early_exit is None else f"early exit {early_exit}",
            tokenizer=tokenizer,
            template=chat_template(directory, tokenizer),
            compatibility=choice.status if early_exit is None else "compatible",
            vocab=min(tokenizer.vocab, target.config.vocab),
            eos_ids=tuple(sorted({*target.config.eos_ids, *(() if end is None else (end,))})),
        )

    def require_unchanged(self) -> None:
        """Looks at the files both models run from.

        Raises:
            ModelFormatError: one was written in place since it was loaded.
        """
        for loaded in (self.target, self.draft):
            if loaded:
                loaded.require_unchanged()

    def encode(self, prompt: Prompt, *, raw: bool = False, system: str | None = None) -> list[int]:
        """Tokens of a prompt: text and messages go through the chat template (text not if raw), ids are checked.

        Raises:
            ConfigurationError: a prompt that is none of these or has 0 tokens, ids outside the vocabulary, or a message
                without a template.
        """
        chat = not raw and self.template is not None
        if system and self.template is None:
            raise ConfigurationError(
                "the model has no chat template, which a system message needs; put it in the prompt"
            )
        checked = check_prompt(prompt)
        if isinstance(checked, str):
            if chat:
                first = [{"role": "system", "content": system}] if system else []
                tokens = self._encode_chat([*first, {"role": "user", "content": checked}])
            else:
                tokens = self.tokenizer.encode(checked)
        else:
            messages = [item for item in checked if isinstance(item, Mapping)]
            tokens = self._encode_chat(messages) if messages else [t for t in checked if isinstance(t, int)]
        if not tokens:
            raise ConfigurationError(EMPTY_PROMPT)
        if not 0 <= min(tokens) <= max(tokens) < self.target.config.vocab:
            raise ConfigurationError(
                f"the prompt has token ids from {min(tokens)} to {max(tokens)}, but the model's are 0 to "
                f"{self.target.config.vocab - 1}; encode it with the model's own tokenizer"
            )
        return tokens

    def _encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if self.template is None:
            raise ConfigurationError("the model has no chat template; pass the prompt as text")
        return self.tokenizer.encode(render_chat(self.template, messages, self.tokenizer), special=False)


def _target_name(config: SpeculativeConfig) -> str:
    return "embedded" if config.target_model is None else config.target_model


def _draft_precision(precision: str | None) -> str | None:
    """The draft's own best, except on the reference path: a draft's rounding never changes the law."""
    return precision if precision == "f32" else None


def choose_draft(config: SpeculativeConfig, target: Path, notify: Notify, resolve: Resolve) -> DraftChoice:
    """The draft a configuration names or its family suggests, compared with the target's directory; says why there is none."""
    without = config.early_exit is not None or config.drafter in ("suffix", "prompt-lookup", "none")
    if config.disabled or config.draft_model == NO_DRAFT or without:
        return DraftChoice()
    if config.target_model is None and config.draft_model is None:
        return DraftChoice("compatible", embedded.path("draft"), "embedded")
    name = _target_name(config)
    typed = DraftChoice()
    if config.draft_model is not None:
        typed = _try_draft(name, target, config.draft_model, notify, resolve)
        if typed.directory or not config.auto_config:
            return typed
    if not config.auto_config:
        drafts = ", ".join(suggested_drafts(name))
        hint = (
            f"--speculative-auto-config takes one of its family ({drafts})"
            if drafts
            else "name one with --speculative-draft-model"
        )
        notify(f"{name} has no draft: its own text so far is copied where that pays (the suffix drafter); {hint}")
        return typed
    free = free_bytes()
    for candidate in ranked_drafts(name):
        needed = 0.6e9 * (parameters(candidate) or 0.0)  # 4 bit weights with scales
        if needed > free:
            notify(
                f"the suggested draft {candidate} needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            )
            continue
        try:
            choice = _try_draft(name, target, candidate, notify, resolve)
        except SpecfastError as error:
            notify(f"the suggested draft {candidate} cannot be used: {error}")
            continue
        if choice.directory:
            return choice
    notify(f"no draft is known to fit {name}: suffix drafter" if ranked_drafts(name) else explain_suggestion(name))
    return typed


def free_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory that can still be had, as far as the system, and the container's limit, tell."""
    free = math.inf
    if meminfo.is_file():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            free = 1024.0 * int(fields["MemAvailable"].split()[0])
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        files = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = int(files.get("inactive_file", 0))  # given back when memory is short
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(0.0, int(limit) - used + cached))


def _try_draft(target_name: str, target: Path, name: str, notify: Notify, resolve: Resolve) -> DraftChoice:
    """Compares a draft with the target; its directory is given only if they fit."""
    verdict = compare_models(target, resolve(name, metadata_only=True))
    if verdict.status == "compatible":
        return DraftChoice("compatible", resolve(name), name)
    if verdict.status == "unknown":
        notify(f"{name} has no tokenizer.json to compare with the target's: plain decoding")
    else:
        notify(verdict.warning(target_name, name))
    return DraftChoice(verdict.status)

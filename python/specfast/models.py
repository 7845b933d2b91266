"""The pair of models an engine runs: found, compared, loaded, with the tokenizer they share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import embedded, hub
from .chat import chat_template, render_chat
from .checkpoint import LoadedModel, load_model
from .compatibility import Compatibility, Status, compare_models
from .config import SpeculativeConfig
from .errors import SpecfastError
from .families import suggested_drafts
from .tokenizer import Tokenizer

Notify = Callable[[str], None]


def print_notice(message: str) -> None:
    """The default way to tell people something: a line on stderr."""
    print(message, file=sys.stderr, flush=True)


@dataclass
class ModelPair:
    """A target, its draft if there is one that fits, and their tokenizer."""

    target: LoadedModel
    draft: LoadedModel | None
    tokenizer: Tokenizer
    template: str | None
    compatibility: Status
    vocab: int
    eos_ids: tuple[int, ...]

    @classmethod
    def load(
        cls, config: SpeculativeConfig, precision: str | None, max_context: int | None, isa: str | None, notify: Notify
    ) -> ModelPair:
        """Finds and loads what a configuration names; a draft that does not fit is refused with a warning.

        Raises:
            ModelFormatError, UnsupportedModelError, DownloadError: the target cannot be used, or the draft's files cannot.
        """
        directory = embedded.path("target") if config.target_model is None else hub.resolve(config.target_model)
        target = load_model(directory, precision=precision, isa=isa, max_context=max_context)
        tokenizer = Tokenizer(directory)
        draft_directory, verdict = _choose_draft(config, directory, notify)
        draft = None
        if draft_directory:
            draft = load_model(draft_directory, isa=isa, precision=_draft_precision(precision))
            if draft.model.weight_bytes >= target.model.weight_bytes and draft_directory != directory:
                notify(f"the draft {draft.name} is not smaller than the target {target.name}; expect no speed-up")
        known = min(tokenizer.vocab, target.config.vocab)
        eos_token = tokenizer.token_id(tokenizer.special_text("eos_token"))
        eos_ids = tuple(sorted({*target.config.eos_ids, *((eos_token,) if eos_token is not None else ())}))
        return cls(
            target=target,
            draft=draft,
            tokenizer=tokenizer,
            template=chat_template(directory, tokenizer),
            compatibility=verdict.status if verdict else "unknown",
            vocab=min(known, verdict.vocab) if draft and verdict else known,
            eos_ids=eos_ids,
        )

    def encode(self, prompt: str, *, raw: bool, system: str | None) -> list[int]:
        """Tokens of a prompt, through the chat template when there is one and raw is not set."""
        if raw or self.template is None:
            return self.tokenizer.encode(prompt)
        messages = [{"role": "system", "content": system}] if system else []
        text = render_chat(self.template, [*messages, {"role": "user", "content": prompt}], self.tokenizer)
        return self.tokenizer.encode(text, special=False)


def _draft_precision(precision: str | None) -> str | None:
    """The draft's own best, except for the exact reference path: a draft's rounding never changes the law."""
    return precision if precision == "f32" else None


def _choose_draft(config: SpeculativeConfig, target: Path, notify: Notify) -> tuple[Path | None, Compatibility | None]:
    """The draft's directory and how it compares; its weights are fetched only once its tokens fit."""
    if config.disabled:
        return None, None
    if config.target_model is None and config.draft_model is None:
        return embedded.path("draft"), compare_models(target, embedded.path("draft"))
    target_name = config.target_model or "the embedded target"
    verdict: Compatibility | None = None
    if config.draft_model is not None:
        verdict = compare_models(target, hub.resolve(config.draft_model, metadata_only=True))
        if verdict.status == "compatible":
            return hub.resolve(config.draft_model), verdict
        notify(verdict.warning(target_name, config.draft_model))
    if config.auto_config:
        for name in suggested_drafts(target_name):
            try:
                candidate = compare_models(target, hub.resolve(name, metadata_only=True))
                if candidate.status == "compatible":
                    return hub.resolve(name), candidate
                notify(candidate.warning(target_name, name))
            except SpecfastError as error:
                notify(f"the suggested draft {name} cannot be used: {error}")
        notify(f"no draft for {target_name}: plain decoding")
    elif config.draft_model is not None:
        notify("plain decoding, without a draft")
    return None, verdict

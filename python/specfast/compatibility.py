"""Whether a draft's tokens are the target's, decided from tokenizer.json and config.json, or a GGUF file's start, alone."""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .architecture import read_json
from .errors import ModelFormatError
from .gguf_file import is_gguf, open_gguf
from .gguf_model import gguf_config
from .gguf_tokenizer import gguf_tokens, has_tokens

Status = Literal["compatible", "incompatible", "unknown"]


@dataclass(frozen=True)
class Compatibility:
    """The verdict on a pair of models.

    Attributes:
        status: "compatible" when every token means the same in both, "unknown" when a tokenizer.json is not there.
        tokens_match: the token maps are equal.
        vocab_match: the models' logits have the same width.
        vocab: the common width: ids from here on are padding in one of them.
    """

    status: Status
    tokens_match: bool
    vocab_match: bool
    vocab: int

    def warning(self, target: str, draft: str) -> str:
        """What people see when a pair does not fit."""
        return (
            "Warning: Models may be incompatible for speculative decoding:\n"
            f"  Target: {target}, Draft: {draft}\n"
            f"  Tokens match: {self.tokens_match}, Vocab match: {self.vocab_match}"
        )


def token_map(path: Path) -> dict[str, int]:
    """Every token of a tokenizer.json with its id, added tokens included.

    Raises:
        ModelFormatError: the file is damaged.
    """
    values: dict[str, Any] = read_json(path)
    model = values.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # unigram: [[token, score], ...] in id order
        vocab = {entry[0]: i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    if not isinstance(vocab, dict):
        raise ModelFormatError(f"{path}: has no vocabulary; download it again")
    added = values.get("added_tokens") or []
    return {**vocab, **{t["content"]: t["id"] for t in added if isinstance(t, dict) and "content" in t and "id" in t}}


def vocab_size(model: Path) -> int:
    """The width of a model's logits.

    Raises:
        ModelFormatError: config.json, or the GGUF file, is missing or does not say.
    """
    if is_gguf(model):
        return gguf_config(open_gguf(model)).vocab
    size = read_json(model / "config.json").get("vocab_size")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ModelFormatError(f"{model / 'config.json'}: 'vocab_size' is {size!r}, but must be a positive integer")
    return size


def _tokens(model: Path) -> dict[str, int] | None:
    """Every token of a model with its id; None where there is nothing to read them from."""
    if is_gguf(model):
        file = open_gguf(model)
        return gguf_tokens(file) if has_tokens(file) else None
    path = model / "tokenizer.json"
    return token_map(path) if path.is_file() else None


def _same_file(target: Path, draft: Path) -> bool:
    files = target / "tokenizer.json", draft / "tokenizer.json"
    return all(file.is_file() for file in files) and filecmp.cmp(*files, shallow=False)


def compare_models(target: Path, draft: Path) -> Compatibility:
    """Compares two models, directories or GGUF files; reads no weights.

    Equal token maps are compatible, also when the models pad their logits to different widths. Anything else is not.

    Raises:
        ModelFormatError: config.json is missing, or a file is damaged.
    """
    widths = vocab_size(target), vocab_size(draft)
    width = min(widths)
    same = _same_file(target, draft)
    if not same:
        tokens = _tokens(target), _tokens(draft)
        if tokens[0] is None or tokens[1] is None:
            return Compatibility("unknown", False, widths[0] == widths[1], width)
        same = tokens[0] == tokens[1]
    return Compatibility("compatible" if same else "incompatible", same, widths[0] == widths[1], width)

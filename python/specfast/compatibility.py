"""Whether a draft's tokens are the target's, decided from tokenizer.json and config.json alone."""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .architecture import read_json
from .errors import ModelFormatError

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


def vocab_size(directory: Path) -> int:
    """The width of a model's logits.

    Raises:
        ModelFormatError: config.json is missing or does not say.
    """
    size = read_json(directory / "config.json").get("vocab_size")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ModelFormatError(f"{directory / 'config.json'}: 'vocab_size' is {size!r}, but must be a positive integer")
    return size


def compare_models(target: Path, draft: Path) -> Compatibility:
    """Compares two model directories; reads no weights.

    Equal token maps are compatible, also when the models pad their logits to different widths. Anything else is not.

    Raises:
        ModelFormatError: config.json is missing, or a file is damaged.
    """
    widths = vocab_size(target), vocab_size(draft)
    files = target / "tokenizer.json", draft / "tokenizer.json"
    if not all(file.is_file() for file in files):
        return Compatibility("unknown", False, widths[0] == widths[1], min(widths))
    same = filecmp.cmp(*files, shallow=False) or token_map(files[0]) == token_map(files[1])
    return Compatibility("compatible" if same else "incompatible", same, widths[0] == widths[1], min(widths))

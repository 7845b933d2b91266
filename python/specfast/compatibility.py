"""Whether a draft's tokens are the target's, decided from tokenizer.json and config.json alone."""

from __future__ import annotations

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
        status: "compatible" when every token means the same in both.
        tokens_match: the token maps are equal.
        vocab_match: the models' logits have the same width.
        vocab: ids both models know; drafting and verifying are bounded by it.
    """

    status: Status
    tokens_match: bool
    vocab_match: bool
    vocab: int

    def warning(self, target: str, draft: str) -> str:
        """What users see when a pair does not fit."""
        return (
            "Warning: Models may be incompatible for speculative decoding:\n"
            f"  Target: {target}, Draft: {draft}\n"
            f"  Tokens match: {self.tokens_match}, Vocab match: {self.vocab_match}"
        )


def token_map(directory: Path) -> dict[str, int]:
    """Every token of a tokenizer.json with its id, added tokens included."""
    path = directory / "tokenizer.json"
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
    """The width of a model's logits."""
    size = read_json(directory / "config.json").get("vocab_size")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ModelFormatError(f"{directory / 'config.json'}: 'vocab_size' is {size!r}, but must be a positive integer")
    return size


def compare_models(target: Path, draft: Path) -> Compatibility:
    """Compares two model directories; reads no weights.

    Equal token maps are compatible, also when the models pad their logits to different widths. Anything else is not.

    Raises:
        ModelFormatError: a file is missing or damaged.
    """
    target_tokens, draft_tokens = token_map(target), token_map(draft)
    target_vocab, draft_vocab = vocab_size(target), vocab_size(draft)
    tokens_match = target_tokens == draft_tokens
    known = max(target_tokens.values(), default=-1) + 1
    return Compatibility(
        status="compatible" if tokens_match else "incompatible",
        tokens_match=tokens_match,
        vocab_match=target_vocab == draft_vocab,
        vocab=min(known, target_vocab, draft_vocab),
    )

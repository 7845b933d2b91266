"""The tokenizer a GGUF file carries in its metadata, rebuilt as a `tokenizers.Tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from .errors import ModelFormatError, UnsupportedModelError
from .gguf_file import GgufFile

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_LONGEST_PIECE = 256
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "gpt2": "gpt-2"}
PRE_TOKENIZERS = (*_PATTERNS, "gpt-2", "smollm")
_SPACE = "\u2581"


@dataclass(frozen=True)
class _Reader:
    """Typed metadata of a tokenizer, with errors that name the file."""

    file: GgufFile

    def get(self, name: str) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{name}")

    def array(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        values = self.get(name)
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ModelFormatError(
                f"{self.file.path}: 'tokenizer.ggml.{name}' is not an array of {kind.__name__}; convert the model again"
            )
        if length is not None and len(values) != length:
            raise ModelFormatError(
                f"{self.file.path}: 'tokenizer.ggml.{name}' has {len(values)} elements, but there are {length} tokens; the file "
                "is damaged, download or convert it again"
            )
        return values

    def tokens(self) -> list[str]:
        tokens = self.array("tokens", str)
        if len(set(tokens)) != len(tokens):
            raise ModelFormatError(f"{self.file.path}: a token occurs twice; convert the model again")
        return tokens

    def types(self, length: int) -> list[int]:
        return self.array("token_type", int, length) if self.get("token_type") is not None else [_NORMAL] * length

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise ModelFormatError(f"{self.file.path}: 'tokenizer.ggml.{name}' is {value!r}, but must be true or false")
        return default if value is None else value

    def special(self, name: str, tokens: list[str]) -> str | None:
        """The text of a special token, such as `bos`."""
        token = self.get(f"{name}_token_id")
        if token is None:
            return None
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(tokens):
            raise ModelFormatError(
                f"{self.file.path}: 'tokenizer.ggml.{name}_token_id' is {token!r}, but tokens are 0 to {len(tokens) - 1}; "
                "convert the model again"
            )
        return tokens[token]


def gguf_tokens(file: GgufFile) -> dict[str, int]:
    """Every token with its id; those that only pad the vocabulary are left out (older converters gave them another type).

    Raises:
        ModelFormatError: there are none, or they are damaged.
    """
    reader = _Reader(file)
    tokens = reader.tokens()
    kinds = reader.types(len(tokens))
    named = enumerate(zip(tokens, kinds, strict=True))
    return {token: i for i, (token, kind) in named if kind != _UNUSED and token != f"[PAD{i}]"}


def has_tokens(file: GgufFile) -> bool:
    """Whether the file has a vocabulary at all."""
    return "tokenizer.ggml.tokens" in file.metadata


def gguf_tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """What tokenizer_config.json would say: start and end tokens and the chat template."""
    reader = _Reader(file)
    tokens = reader.tokens()
    found = {f"{name}_token": reader.special(name, tokens) for name in ("bos", "eos")}
    return {key: text for key, text in found.items() if text} | {
        "chat_template": file.metadata.get("tokenizer.chat_template")
    }


def _merges(reader: _Reader, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for text in reader.array("merges", str):
        left, _, right = text.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelFormatError(
                f"{reader.file.path}: the merge {text[:80]!r} is not of two tokens into one; convert the model again"
            )
        merges.append((left, right))
    return merges


def _merges_by_score(vocab: dict[str, int], scores: list[float], pieces: set[str]) -> list[tuple[str, str]]:
    """SentencePiece's BPE as merges: whatever two pieces join into a third, better scores first."""
    found = [
        (-scores[vocab[piece]], vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _byte_level(reader: _Reader, vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    """GPT-2's kind of BPE, and whether a text begins with a start token by default."""
    name = reader.get("pre")
    name = _ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{reader.file.path}: the pre-tokenizer {name!r} ('tokenizer.ggml.pre') is not known; known: "
            f"{', '.join(PRE_TOKENIZERS)}. Put the model's tokenizer.json beside the file"
        )
    merges = _merges(reader, vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name == "llama-bpe"))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if name in _PATTERNS:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(_PATTERNS[name]), "isolated"))
    if name == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in _PATTERNS))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, name == "llama-bpe"


def _sentencepiece(reader: _Reader, vocab: dict[str, int], kinds: list[int]) -> tokenizers.Tokenizer:
    """Llama 2's kind: scored pieces, with bytes for what they do not spell."""
    scores = reader.array("scores", float, len(kinds))
    tokens = reader.tokens()
    pieces = {token for token, i in vocab.items() if kinds[i] == _NORMAL and len(token) <= _LONGEST_PIECE}
    unknown = reader.special("unknown", tokens) or tokens[0]
    merges = _merges_by_score(vocab, scores, pieces)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = reader.flag("add_space_prefix", True)
    first = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def gguf_tokenizer(file: GgufFile) -> tokenizers.Tokenizer:
    """Rebuilds the tokenizer: byte-level BPE ("gpt2") of the known pre-tokenizers, or SentencePiece's BPE ("llama").

    Raises:
        ModelFormatError: tokens, merges or scores that do not fit together.
        UnsupportedModelError: another kind, or a pre-tokenizer that is not known.
    """
    reader = _Reader(file)
    kind = reader.get("model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"{file.path}: the tokenizer {kind!r} ('tokenizer.ggml.model') is not supported; supported: gpt2 and llama. Put the "
            "model's tokenizer.json beside the file"
        )
    tokens = reader.tokens()
    kinds = reader.types(len(tokens))
    vocab = gguf_tokens(file)
    start = reader.special("bos", tokens)
    try:
        if kind == "gpt2":
            tokenizer, starts = _byte_level(reader, vocab)
        else:
            tokenizer, starts = _sentencepiece(reader, vocab, kinds), True
        for special, number in ((True, _CONTROL), (False, _USER_DEFINED)):
            texts = [token for token, i in vocab.items() if kinds[i] == number and token]
            tokenizer.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False) for text in texts])
        if start and reader.flag("add_bos_token", starts):
            tokenizer.post_processor = processors.TemplateProcessing(
                single=["<start>", "$A"], special_tokens=[{"id": "<start>", "ids": [vocab[start]], "tokens": [start]}]
            )
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ModelFormatError(
            f"{file.path}: the tokenizer cannot be rebuilt ({error}); put the model's tokenizer.json beside the file"
        ) from None
    return tokenizer

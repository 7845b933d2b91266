"""A model's tokenizer: text to tokens, and the bytes each token stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers

from .architecture import read_json
from .errors import ConfigurationError, ModelFormatError, UnsupportedModelError
from .gguf_file import is_gguf, open_gguf
from .gguf_tokenizer import gguf_tokenizer, gguf_tokenizer_config, gguf_tokens

Spelling = Literal["byte-level", "pieces", "pieces and bytes", "other"]
LeadingSpace = Literal["keep", "strip one", "strip first token"]
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest is moved to 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(moved)}


_BYTE_OF = _byte_of_character()


class Tokenizer:
    """A model directory's tokenizer.json, and its tokenizer_config.json if there is one; or what a GGUF file has of both.

    Attributes:
        config: tokenizer_config.json, or empty.
        vocab: one more than the largest token id, added tokens included.
        spelling: how tokens spell text, by the decoder of tokenizer.json: "byte-level" (GPT-2 characters for bytes),
            "pieces" (sentencepiece: a lower one eighth block for a space), "pieces and bytes" (<0xNN> is a byte) or
            "other".
        leading_space: what the decoder does with a space at the start of a whole text.

    Raises:
        ModelFormatError: the file is missing or not a tokenizer.
        UnsupportedModelError: a GGUF file whose tokenizer is of another kind, without a tokenizer.json beside it.
    """

    config: dict[str, Any]

    def __init__(self, model: Path) -> None:
        self._tokenizer, self.config = _from_gguf(model) if is_gguf(model) else _from_directory(model)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab = max(ids, default=-1) + 1
        self._special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._bytes: dict[int, bytes] = {}
        self.spelling: Spelling
        self.leading_space: LeadingSpace
        self.spelling, self.leading_space = _describe_decoder(self._tokenizer)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer puts around one (a start token, usually).

        Raises:
            ConfigurationError: lone surrogates, which are not text.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        except (UnicodeEncodeError, TypeError):
            raise ConfigurationError("the text holds lone surrogates; pass valid Unicode") from None

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a whole token sequence, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes one token adds to a text: a character may be spread over several tokens; empty for special ones.

        Not for the spelling "other".
        """
        if token not in self._bytes:
            self._bytes[token] = self._spell(token)
        return self._bytes[token]

    def _spell(self, token: int) -> bytes:
        text = None if token in self._special else self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self.spelling == "byte-level":
            spelled = [_BYTE_OF.get(character, -1) for character in text]
            return text.encode() if -1 in spelled else bytes(spelled)
        byte = _BYTE_TOKEN.fullmatch(text) if self.spelling == "pieces and bytes" else None
        return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()

    def special_text(self, key: str) -> str:
        """A special token's text from tokenizer_config.json, such as `bos_token`; empty if there is none."""
        value = self.config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else ""

    def token_id(self, token: str) -> int | None:
        """The id of one token's text."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelFormatError(f"{path}: not a tokenizer ({error}); download it again") from None


def _from_directory(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    path, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not path.is_file():
        raise ModelFormatError(
            f"{directory}: tokenizer.json is missing; a model with only tokenizer.model must be converted first"
        )
    return _read_tokenizer(path), read_json(config) if config.is_file() else {}


def _from_gguf(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer in the file; where it cannot be rebuilt, the tokenizer.json beside it, if that has the same tokens."""
    file = open_gguf(path)
    try:
        return gguf_tokenizer(file), gguf_tokenizer_config(file)
    except UnsupportedModelError:
        beside = path.with_name("tokenizer.json")
        if not beside.is_file():
            raise
    tokenizer = _read_tokenizer(beside)
    tokens = tokenizer.get_vocab(with_added_tokens=True)
    if tokens != gguf_tokens(file):
        raise ModelFormatError(
            f"{beside}: has {len(tokens)} tokens that are not those of {path.name}; put the model's own tokenizer.json there"
        )
    return tokenizer, gguf_tokenizer_config(file)


def _describe_decoder(tokenizer: tokenizers.Tokenizer) -> tuple[Spelling, LeadingSpace]:
    """How a tokenizer's decoder spells text; anything but the two common forms is "other"."""
    state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b"{}"
    decoder = json.loads(state)
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte-level", "keep"
    if kinds == ["Metaspace"] and steps[0].get("replacement") == "\u2581":
        always = steps[0].get("prepend_scheme", "always") != "never"
        return "pieces", "strip first token" if always else "keep"
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        replaces = steps[0].get("pattern") == {"String": "\u2581"} and steps[0].get("content") == " "
        strip = steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
        if replaces and strip.get("content") == " " and strip.get("start") in (0, 1) and strip.get("stop") == 0:
            return "pieces and bytes", "strip one" if strip["start"] else "keep"
    return "other", "keep"

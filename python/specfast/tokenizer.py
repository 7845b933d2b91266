"""Text to tokens and back: encoding, incremental detokenisation that never takes a character back, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from .architecture import read_json
from .errors import ConfigurationError, ModelFormatError

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A model directory's tokenizer.json (and tokenizer_config.json, if any).

    Raises:
        ModelFormatError: the file is missing or not a tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelFormatError(
                f"{directory}: tokenizer.json is missing; models with only tokenizer.model must be converted first"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelFormatError(f"{path}: not a tokenizer ({error}); download it again") from None
        config = directory / "tokenizer_config.json"
        self.config: dict[str, Any] = read_json(config) if config.is_file() else {}
        self.vocab = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer puts around one (a start token, usually)."""
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        except UnicodeEncodeError:
            raise ConfigurationError(
                "the prompt holds lone surrogates, which are not text; pass valid Unicode"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of whole token sequences, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def special_text(self, key: str) -> str:
        """A special token's text from tokenizer_config.json, such as `bos_token`; empty if there is none."""
        value = self.config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else ""

    def token_id(self, token: str) -> int | None:
        """The id of one token's text."""
        return self._tokenizer.token_to_id(token)

    def stream(self, prefix: Sequence[int] = ()) -> StreamDecoder:
        """A decoder for tokens that follow `prefix`."""
        return StreamDecoder(self, prefix)


class StreamDecoder:
    """Turns tokens into text as they arrive; the pieces joined are the decoded whole.

    Text is given out once it can no longer change: characters spread over several tokens are held back until complete.
    Each step decodes only a short window of tokens, so the cost per token does not grow.
    """

    def __init__(self, tokenizer: Tokenizer, prefix: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers drop a leading space at the start of a text: decoding always begins a few tokens earlier.
        self._window: list[int] = list(prefix[-4:])
        self._shown = self._tokenizer.decode(self._window)

    def push(self, tokens: Sequence[int]) -> str:
        """The new text after more tokens; may be empty."""
        pieces = []
        for token in tokens:
            self._window.append(token)
            text = self._tokenizer.decode(self._window)
            # A character has at most four bytes, so at most three trailing replacements can still become one.
            open_bytes = min(3, len(text) - len(text.rstrip(_REPLACEMENT)))
            pieces.append(self._advance(text[: len(text) - open_bytes]))
            if not open_bytes and len(self._window) >= 32:
                self._window = self._window[-8:]
                self._shown = self._tokenizer.decode(self._window)
        return "".join(pieces)

    def flush(self) -> str:
        """What was held back, an incomplete character as U+FFFD."""
        return self._advance(self._tokenizer.decode(self._window))

    def _advance(self, text: str) -> str:
        new = text[len(self._shown) :]
        if new:
            self._shown = text
        return new


class StopStrings:
    """Cuts text at the first stop string and holds back what may become one.

    Raises:
        ConfigurationError: an empty stop string, or more than 16.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops) or len(stops) > 16:
            raise ConfigurationError(f"{len(stops)} stop strings, some may be empty: give up to 16, none of them empty")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is safe to show; after a stop string nothing more is given out."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

"""Text as it grows: incremental detokenisation that never takes a character back, and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from .errors import ConfigurationError
from .tokenizer import Tokenizer

MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 1000
_REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Turns tokens into text as they arrive, at constant cost a token; the pieces joined are the whole text.

    A character spread over several tokens is given out once complete, and bytes that cannot become one as U+FFFD: what
    was given out never changes. With "other" spellings text is decoded in windows by the tokenizer's own decoder.

    Args:
        tokenizer: of the model.
        continues: whether the tokens continue a text (a prompt), so that a space they begin with is kept.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = "keep" if continues else tokenizer.leading_space
        self._window = _Window(tokenizer) if tokenizer.spelling == "other" else None

    def push(self, tokens: Sequence[int]) -> str:
        """The text that more tokens complete; may be empty."""
        if self._window:
            return "".join(self._window.push(token) for token in tokens)
        return self._utf8.decode(b"".join(self._bytes(token) for token in tokens))

    def flush(self) -> str:
        """What was held back, an incomplete character as U+FFFD."""
        return self._window.flush() if self._window else self._utf8.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        data = self._tokenizer.bytes_of(token)
        if self._strip != "keep" and data:
            data = data[1:] if self._strip == "strip one" and data[:1] == b" " else data
            data = data.replace(b" ", b"") if self._strip == "strip first token" else data
            self._strip = "keep"
        return data


class _Window:
    """Decodes a short run of tokens again with each token; the run is cut where both sides decode on their own."""

    LONGEST, KEPT = 32, 8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(_REPLACEMENT) and len(self._tokens) <= 2 * self.LONGEST:
            return ""
        new, self._shown = text[len(self._shown) :], text
        if len(self._tokens) >= self.LONGEST:
            head, tail = self._tokens[: -self.KEPT], self._tokens[-self.KEPT :]
            rest = self._tokenizer.decode(tail)
            if (rest and self._tokenizer.decode(head) + rest == text) or len(self._tokens) > 4 * self.LONGEST:
                self._tokens, self._shown = tail, rest
        return new

    def flush(self) -> str:
        text = self._tokenizer.decode(self._tokens)
        new, self._shown = text[len(self._shown) :], text
        return new


class StopStrings:
    """Cuts a growing text at the stop string that ends first, and holds back what may yet become one.

    The result does not depend on how the text is split into pieces. Of stop strings that end at the same character the
    longest counts.

    Raises:
        ConfigurationError: an empty stop string, more than 16 of them, or one of more than 1000 characters.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if not isinstance(stops, Iterable):
            raise ConfigurationError(f"stop is {stops!r}, but must be a string, or several")
        stops = [stops] if isinstance(stops, str) else list(stops)
        if len(stops) > MAX_STOP_STRINGS:
            raise ConfigurationError(f"{len(stops)} stop strings are more than {MAX_STOP_STRINGS}; give fewer")
        for stop in stops:
            if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
                raise ConfigurationError(
                    f"a stop string has 1 to {MAX_STOP_CHARACTERS} characters, not {len(stop) if isinstance(stop, str) else stop!r}"
                )
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to show; nothing after a stop string."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """The text of a generation, token by token: decoded, and cut at a stop string."""

    def __init__(self, decoder: StreamDecoder, stops: StopStrings) -> None:
        self._decoder, self._stops = decoder, stops

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """The text a token makes safe to show."""
        return self._stops.push(self._decoder.push([token]))

    def flush(self) -> str:
        """What is left when no token follows."""
        text = self._stops.push(self._decoder.flush())
        return text if self.stopped else text + self._stops.flush()

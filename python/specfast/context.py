"""One request's tokens: what was read, what was kept, when it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "context"]


@dataclass
class Context:
    """The accepted tokens of a request and the limits on them.

    Attributes:
        tokens: prompt and generated tokens; grows by what each round keeps.
        prompt_length: how many of them are the prompt.
        max_tokens: most tokens to generate.
        capacity: most tokens altogether.
        eos_ids: tokens that end the text; they are kept as the last token and have no text.
        round: rounds so far; keys the random streams.
    """

    tokens: list[int]
    prompt_length: int
    max_tokens: int
    capacity: int
    eos_ids: Collection[int] = ()
    round: int = 0
    finish_reason: FinishReason | None = None
    _eos: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._eos = frozenset(self.eos_ids)
        self._check_room()

    @property
    def done(self) -> bool:
        """Whether the text has ended."""
        return self.finish_reason is not None

    @property
    def room(self) -> int:
        """Tokens that may still be generated."""
        generated = len(self.tokens) - self.prompt_length
        return min(self.max_tokens - generated, self.capacity - len(self.tokens))

    def keep(self, tokens: Sequence[int]) -> list[int]:
        """Appends a round's tokens up to an end token or the room there is; returns those kept."""
        kept = list(tokens[: self.room])
        for i, token in enumerate(kept):
            if token in self._eos:
                kept, self.finish_reason = kept[: i + 1], "stop"
                break
        self.tokens += kept
        self.round += 1
        if not self.done:
            self._check_room()
        return kept

    def _check_room(self) -> None:
        if self.room <= 0:
            self.finish_reason = "context" if len(self.tokens) >= self.capacity else "length"

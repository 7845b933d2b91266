"""One request's tokens: what was read, what was kept, when it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .text import TextStream

FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class Chunk:
    """What one round added: the text that became complete, and its token ids."""

    text: str
    token_ids: tuple[int, ...]


@dataclass
class Context:
    """The accepted tokens of a request, their text, and the limits on them.

    Attributes:
        tokens: prompt and generated tokens; grows by what each round keeps.
        max_tokens: most tokens to generate.
        capacity: most tokens altogether.
        eos_ids: tokens that end the text; such a token is kept as the last one and has no text.
        whole_rounds: draft past max_tokens, as the block rule must for a seed: what it keeps depends on how many are drafted.
        text: turns kept tokens into text and ends it at stop strings; None for tokens only.
        prompt_length: how many tokens are the prompt.
        round: rounds so far; keys the random streams.
        finish_reason: "eos" (an end token), "stop" (a stop string), "length" (max_tokens), "context" (capacity), or
            None while the request runs.
    """

    tokens: list[int]
    max_tokens: int
    capacity: int
    eos_ids: Collection[int] = ()
    text: TextStream | None = None
    whole_rounds: bool = False
    prompt_length: int = field(init=False)
    round: int = 0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        self._check_room()

    @property
    def done(self) -> bool:
        """Whether the text has ended."""
        return self.finish_reason is not None

    @property
    def room(self) -> int:
        """Tokens that may still be generated."""
        return min(self.max_tokens - self.generated, self.capacity - len(self.tokens))

    @property
    def draft_room(self) -> int:
        """Tokens that a round may draft."""
        return self.capacity - len(self.tokens) if self.whole_rounds else self.room

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    def keep(self, tokens: Sequence[int]) -> Chunk:
        """Appends a round's tokens up to the one that ends the text; returns those kept, with their text."""
        kept, text = 0, ""
        for token in tokens[: self.room]:
            self.tokens.append(token)
            kept += 1
            if token in self.eos_ids:
                self.finish_reason = "eos"
                break
            if self.text:
                text += self.text.push(token)
                if self.text.stopped:
                    self.finish_reason = "stop"
                    break
        self.round += 1
        if not self.done:
            self._check_room()
        if self.done and self.text:
            text += self.text.flush()
        return Chunk(text, tuple(tokens[:kept]))

    def _check_room(self) -> None:
        if self.room <= 0:
            self.finish_reason = "context" if len(self.tokens) >= self.capacity else "length"

"""Counters of a generation: what was drafted, kept and spent."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Tokens a round gives when each drafted token is accepted with this probability (Leviathan et al. 2022, Eq. 1, arXiv:2211.17192)."""
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {acceptance:g}, but must be in 0 to 1")
    return sum(acceptance**i for i in range(gamma + 1))


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        gamma: tokens drafted.
        tau: drafted tokens the target accepted.
        kept: tokens the text grew by: tau + 1, or fewer when it ended inside the round.
        draft_seconds, verify_seconds: wall-clock time.
    """

    gamma: int
    tau: int
    kept: int
    draft_seconds: float
    verify_seconds: float


@dataclass
class SpeculationStats:
    """Counts and seconds, of one request or added up over an engine's life.

    Attributes:
        requests: requests begun.
        prompt_tokens, tokens: tokens read, and tokens generated.
        target_passes: passes of the target that generated tokens, one per round.
        rounds: those that checked drafted tokens.
        drafted, accepted: drafted tokens that were checked, and those of them in the text.
        fallbacks: times a draft failed and plain decoding went on.
        prefill_seconds, draft_seconds, verify_seconds, total_seconds: wall-clock time; the total has detokenising in it,
            but not what the caller does between chunks.
        first_token_seconds: from the request to its first token.
    """

    requests: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    target_passes: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    fallbacks: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    total_seconds: float = 0.0
    first_token_seconds: float = 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0.0 before anything was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_target_pass(self) -> float:
        """Generated tokens per pass of the target; 0.0 before the first."""
        return self.tokens / self.target_passes if self.target_passes else 0.0

    @property
    def tok_s(self) -> float:
        """Generated tokens per second, without the prompt's time."""
        seconds = self.total_seconds - self.prefill_seconds
        return self.tokens / seconds if seconds > 0 else 0.0

    @property
    def prompt_tok_s(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    def count(self, round_: Round) -> None:
        """Adds a round."""
        self.target_passes += 1
        self.rounds += round_.gamma > 0
        self.drafted += round_.gamma
        self.accepted += min(round_.tau, round_.kept)
        self.tokens += round_.kept
        self.draft_seconds += round_.draft_seconds
        self.verify_seconds += round_.verify_seconds

    def add(self, other: SpeculationStats) -> None:
        """Adds another request's counts."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def as_dict(self) -> dict[str, Any]:
        """All counters and rates."""
        counters = {field.name: getattr(self, field.name) for field in fields(self)}
        return counters | {
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_target_pass": self.tokens_per_target_pass,
            "tok_s": self.tok_s,
            "prompt_tok_s": self.prompt_tok_s,
        }

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.tokens} tokens, {self.tok_s:.1f} tok/s, acceptance {self.acceptance_rate:.2f}, "
            f"{self.tokens_per_target_pass:.2f} tokens per target pass"
        )

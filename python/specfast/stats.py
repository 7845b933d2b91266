"""Counters of a generation: what was drafted, kept and spent."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .drafters import Offer


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Tokens a round gives when each drafted token is accepted with this probability (Leviathan et al. 2022, Eq. 1, arXiv:2211.17192)."""
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {acceptance:g}, but must be in 0 to 1")
    return sum(acceptance**i for i in range(gamma + 1))


def wilson_interval(accepted: int, tested: int) -> tuple[float, float]:
    """The 95 percent interval of a share (Wilson 1927); 0 to 1 before anything was tested."""
    if not tested:
        return 0.0, 1.0
    z = 1.959964
    share, z2 = accepted / tested, z * z / tested
    middle = (share + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(share * (1 - share) / tested + z2 / (4 * tested))
    return max(0.0, middle - half), min(1.0, middle + half)


class Round(NamedTuple):
    """What one round did.

    Attributes:
        gamma: tokens drafted.
        tau: drafted tokens the target accepted.
        kept: tokens the text grew by: tau + 1, or fewer when it ended inside the round.
        draft_seconds, verify_seconds: wall-clock time of drafting and of the target's pass.
        plan_seconds, keep_seconds: of choosing what to draft, and of keeping tokens and turning them into text.
        length: tokens of the context before it.
        offer: what was drafted from; None in a plain round.
    """

    gamma: int
    tau: int
    kept: int
    draft_seconds: float
    verify_seconds: float
    plan_seconds: float = 0.0
    keep_seconds: float = 0.0
    length: int = 0
    offer: Offer | None = None


@dataclass
class SpeculationStats:
    """Counts and seconds, of one request or added up over an engine's life.

    Attributes:
        requests: requests begun.
        prompt_tokens, tokens: tokens read, and tokens generated.
        target_passes: passes of the target that generated tokens, one per round, and those that only read tokens again.
        reread_tokens: kept tokens that the target read again, because a host's cache could only be put back to before them.
        rounds: those that checked drafted tokens.
        drafted, accepted: drafted tokens that were checked, and those of them in the text.
        fallbacks: times a draft failed and plain decoding went on.
        fallback_reasons: how often, by what happened.
        decisions: rounds, by drafter ("none" in a plain one) and gamma.
        tested, accepted_at: drafted tokens whose predecessors in the round are in the text, and those of them that are
            too, by drafter and position from 0; one after the text's end is not tested.
        prefill_seconds, draft_seconds, verify_seconds, total_seconds: wall-clock time; the total has detokenising in it,
            but not what the caller does between chunks.
        first_token_seconds: from the request to its first token.
    """

    requests: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    target_passes: int = 0
    reread_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    fallbacks: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    total_seconds: float = 0.0
    first_token_seconds: float = 0.0
    fallback_reasons: Counter[str] = field(default_factory=Counter)
    decisions: Counter[tuple[str, int]] = field(default_factory=Counter)
    tested: Counter[tuple[str, int]] = field(default_factory=Counter)
    accepted_at: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0.0 before anything was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_target_pass(self) -> float:
        """Generated tokens per pass of the target; 0.0 before the first."""
        return self.tokens / self.target_passes if self.target_passes else 0.0

    @property
    def overhead_seconds(self) -> float:
        """Time that is none of prompt, drafting and verifying: choosing what to draft, keeping tokens, and their text."""
        return max(0.0, self.total_seconds - self.prefill_seconds - self.draft_seconds - self.verify_seconds)

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
        gamma, tau, kept, draft_seconds, verify_seconds, _, _, _, offer = round_
        self.target_passes += 1
        self.tokens += kept
        self.draft_seconds += draft_seconds
        self.verify_seconds += verify_seconds
        drafter = offer.drafter if offer else "none"
        self.decisions[drafter, gamma] += 1
        if gamma:
            self.rounds += 1
            self.drafted += gamma
            self.accepted += min(tau, kept)
            for i in range(min(tau + 1, kept, gamma)):  # a text that ends inside the round leaves the others out
                self.tested[drafter, i] += 1
                self.accepted_at[drafter, i] += int(i < tau)

    def add(self, other: SpeculationStats) -> None:
        """Adds another request's counts."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def by_drafter(self) -> dict[str, dict[str, Any]]:
        """For each drafter, "none" among them: rounds, drafted and accepted tokens, acceptance_rate, rounds by gamma, and
        by position how many tokens were tested and accepted, with the share's 95 percent interval (Wilson)."""
        made: dict[str, dict[str, Any]] = {}
        for drafter in sorted({drafter for drafter, _ in self.decisions}):
            gammas = {gamma: n for (name, gamma), n in sorted(self.decisions.items()) if name == drafter}
            positions = []
            for position in sorted(position for name, position in self.tested if name == drafter):
                tested, accepted = self.tested[drafter, position], self.accepted_at[drafter, position]
                low, high = wilson_interval(accepted, tested)
                share = {"acceptance_rate": accepted / tested, "low": low, "high": high}
                positions.append({"tested": tested, "accepted": accepted, **share})
            drafted = sum(gamma * n for gamma, n in gammas.items())
            accepted = sum(n for (name, _), n in self.accepted_at.items() if name == drafter)
            made[drafter] = {
                "rounds": sum(gammas.values()),
                "drafted": drafted,
                "accepted": accepted,
                "acceptance_rate": accepted / drafted if drafted else 0.0,
                "gammas": {str(gamma): n for gamma, n in gammas.items()},
                "positions": positions,
            }
        return made

    def decision_lines(self) -> list[str]:
        """For people: who drafted how many tokens how often, what was accepted at each position, and what failed."""
        lines = []
        for drafter, made in self.by_drafter().items():
            if drafter == "none":
                lines.append(f"plain: {made['rounds']} rounds")
                continue
            gammas = ", ".join(f"{gamma} x{n}" for gamma, n in made["gammas"].items())
            shares = ", ".join(
                f"{one['acceptance_rate']:.2f} ({one['low']:.2f} to {one['high']:.2f})" for one in made["positions"]
            )
            lines.append(f"{drafter}: {made['rounds']} rounds, gamma {gammas}")
            lines.append(f"{drafter}: accepted by position {shares}")
        return lines + [f"fallback: {reason} (x{n})" for reason, n in self.fallback_reasons.items()]

    def as_dict(self) -> dict[str, Any]:
        """All counters and rates, as JSON takes them."""
        counters = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _BY_DRAFTER}
        return counters | {
            "fallback_reasons": dict(self.fallback_reasons),
            "overhead_seconds": self.overhead_seconds,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_target_pass": self.tokens_per_target_pass,
            "tok_s": self.tok_s,
            "prompt_tok_s": self.prompt_tok_s,
            "drafters": self.by_drafter(),
        }

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.tokens} tokens, {self.tok_s:.1f} tok/s, acceptance {self.acceptance_rate:.2f}, "
            f"{self.tokens_per_target_pass:.2f} tokens per target pass"
        )


_BY_DRAFTER = ("decisions", "tested", "accepted_at")

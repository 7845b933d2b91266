"""The speed of speculation computed from measured times of passes: the law's expected tokens over the round's time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from specfast.stats import expected_tokens


@dataclass(frozen=True)
class Speed:
    """Tokens per second with gamma drafted tokens a round; gamma 0 is plain decoding."""

    gamma: int
    tokens_per_round: float
    round_ms: float
    tok_s: float


def speeds(draft_ms: float, target_ms: Mapping[int, float], acceptance: float) -> list[Speed]:
    """A speed for every gamma whose target pass of gamma + 1 rows was measured, from 0 on.

    A round is gamma draft passes of one row and one target pass: sampling, rejection, roll-back and the draft's own catching up
    are taken to cost nothing.
    """
    found = []
    for rows in sorted(target_ms):
        tokens, milliseconds = expected_tokens(acceptance, rows - 1), (rows - 1) * draft_ms + target_ms[rows]
        found.append(Speed(rows - 1, tokens, milliseconds, 1e3 * tokens / milliseconds))
    return found


def best(found: list[Speed]) -> Speed:
    """The fastest that speculates."""
    return max((speed for speed in found if speed.gamma), key=lambda speed: speed.tok_s)

"""Controllers: how many tokens the next round drafts. They look at the past only, never at a drawn token."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Controller(Protocol):
    """Chooses gamma before anything is drawn; 0 is plain decoding."""

    @property
    def gamma(self) -> int:
        """Tokens to draft next."""

    def update(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Learns from a finished round."""


class FixedGamma:
    """Always the same gamma."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma

    @property
    def gamma(self) -> int:
        return self._gamma

    def update(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        pass


class AutoGamma:
    """The gamma with the most tokens per second, from measured acceptance and times (Leviathan et al. 2022, section 3.3).

    Args:
        ceiling: largest gamma.
        probe_every: plain rounds after which one speculative round looks whether it pays again.
    """

    def __init__(self, ceiling: int = 20, probe_every: int = 32) -> None:
        self._ceiling, self._probe_every = ceiling, probe_every
        self._acceptance = 0.7
        self._draft_seconds: float | None = None
        self._verify_seconds: dict[int, float] = {}  # by rows checked
        self._gamma, self._plain_rounds = min(4, ceiling), 0

    @property
    def gamma(self) -> int:
        return self._gamma

    def update(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        rows = drafted + 1
        self._verify_seconds[rows] = 0.8 * self._verify_seconds.get(rows, verify_seconds) + 0.2 * verify_seconds
        if drafted:
            each = draft_seconds / drafted
            self._draft_seconds = each if self._draft_seconds is None else 0.8 * self._draft_seconds + 0.2 * each
            tested = min(accepted + 1, drafted)
            self._acceptance += min(1.0, 0.1 * tested) * (accepted / tested - self._acceptance)
            self._plain_rounds = 0
        else:
            self._plain_rounds += 1
        self._gamma = self._choose()

    def _choose(self) -> int:
        if 1 not in self._verify_seconds:  # the price of plain decoding is needed once
            return 0
        if self._draft_seconds is None or self._plain_rounds >= self._probe_every:
            return min(4, self._ceiling)
        return max(range(self._ceiling + 1), key=self._tokens_per_second)

    def _tokens_per_second(self, gamma: int) -> float:
        a = min(self._acceptance, 0.999)
        expected = (1 - a ** (gamma + 1)) / (1 - a)
        return expected / (gamma * (self._draft_seconds or 0.0) + self._rows_seconds(gamma + 1))

    def _rows_seconds(self, rows: int) -> float:
        """Measured, else on the line through the nearest smaller and larger measurement (flat outside them, rising per row)."""
        known = self._verify_seconds
        if rows in known:
            return known[rows]
        low, high = max(r for r in known if r < rows), min((r for r in known if r > rows), default=None)
        if high is None:
            slope = max(0.0, (known[low] - known[1]) / (low - 1)) if low > 1 else 0.05 * known[1]
            return known[low] + slope * (rows - low)
        return known[low] + (known[high] - known[low]) * (rows - low) / (high - low)

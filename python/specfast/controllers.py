"""Controllers: how many tokens the next round drafts. They look at past rounds only, never at a drawn token."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from .stats import Round, expected_tokens


@runtime_checkable
class Controller(Protocol):
    """Chooses gamma before anything is drawn; 0 is plain decoding."""

    @property
    def gamma(self) -> int:
        """Tokens to draft next."""

    def update(self, round_: Round) -> None:
        """Learns from a finished round."""


class FixedGamma:
    """Always the same gamma."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma

    @property
    def gamma(self) -> int:
        return self._gamma

    def update(self, round_: Round) -> None:
        pass


class _Seconds:
    """A measured duration: the least of the first three samples (they are cold), then a moving average."""

    def __init__(self) -> None:
        self.value, self._samples = 0.0, 0

    def add(self, seconds: float) -> None:
        self._samples += 1
        if self._samples == 1 or (self._samples <= 3 and seconds < self.value):
            self.value = seconds
        elif self._samples > 3:
            self.value += 0.2 * (seconds - self.value)


class AutoGamma:
    """The gamma with the most tokens per second, from measured acceptance and seconds; 0 where plain decoding is faster.

    With a the share of drafted tokens that is accepted, a round of gamma gives E = (1 - a^(gamma + 1)) / (1 - a) tokens
    (Leviathan et al. 2022, Eq. 1, arXiv:2211.17192) and costs gamma draft steps and one check of gamma + 1 rows. Checks of
    row counts not yet seen are taken from the line through their neighbours.

    What is not in use is measured again now and then: plain decoding every 64 rounds; speculation for two rounds (in the
    first the draft reads what it sat out, so only the second says what drafting costs), as long as all time lost by
    looking stays below 2 percent.

    Args:
        ceiling: largest gamma.
    """

    LOOKING, PATIENCE, PLAIN_EVERY = 0.02, 16, 64

    def __init__(self, ceiling: int = 20) -> None:
        self._ceiling = ceiling
        self._first = min(4, ceiling)
        self._acceptance = 0.8
        self._draft = _Seconds()
        self._verify: dict[int, _Seconds] = {}  # by gamma
        self._catch_up = 0.0  # seconds per token the draft sat out
        self._elapsed = self._lost = 0.0
        self._since_plain = self._since_speculation = 0
        self._queue = [self._first, 0, self._first, 0, self._first]
        self._gamma = self._queue.pop(0)

    @property
    def gamma(self) -> int:
        return self._gamma

    def update(self, round_: Round) -> None:
        seconds = round_.draft_seconds + round_.verify_seconds
        self._elapsed += seconds
        self._verify.setdefault(round_.gamma, _Seconds()).add(round_.verify_seconds)
        if round_.gamma:
            self._learn(round_)
            if 0 in self._verify:
                self._lost = max(0.0, self._lost + seconds - round_.kept * self._verify[0].value)
        self._since_plain = self._since_plain + 1 if round_.gamma else 0
        self._since_speculation = 0 if round_.gamma else self._since_speculation + 1
        self._gamma = self._queue.pop(0) if self._queue else self._choose()

    def _learn(self, round_: Round) -> None:
        tested = min(round_.tau + 1, round_.gamma)
        self._acceptance += (1 - 0.97**tested) * (round_.tau / tested - self._acceptance)
        if self._since_speculation > 1:
            reading = round_.draft_seconds - round_.gamma * self._draft.value
            self._catch_up = max(0.0, reading / self._since_speculation)
        else:
            self._draft.add(round_.draft_seconds / round_.gamma)

    def _choose(self) -> int:
        if self._since_plain >= self.PLAIN_EVERY:
            return 0
        best = max(range(self._ceiling + 1), key=self._tokens_per_second)
        reading = self._lost + self._since_speculation * self._catch_up
        if best == 0 and self._since_speculation >= self.PATIENCE and reading < self.LOOKING * self._elapsed:
            self._queue = [self._first]
            return self._first
        if best and self._since_speculation > 1:
            self._queue = [best]
        return best

    def _tokens_per_second(self, gamma: int) -> float:
        expected = expected_tokens(min(self._acceptance, 0.999), gamma)
        return expected / (gamma * self._draft.value + self._verify_seconds(gamma))

    def _verify_seconds(self, gamma: int) -> float:
        if gamma in self._verify:
            return self._verify[gamma].value
        known = sorted(self._verify)
        if len(known) == 1:
            return self._verify[known[0]].value
        above = next((i for i, seen in enumerate(known) if seen > gamma), len(known) - 1)
        low, high = (known[0], known[-1]) if gamma > known[-1] else (known[above - 1], known[above])
        base, slope = self._verify[low].value, (self._verify[high].value - self._verify[low].value) / (high - low)
        return base + max(0.0, slope) * (gamma - low)

"""What a controller has measured: seconds of passes and drafts, and acceptance by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .drafters import Offer

FEW = 4  # tokens a model reads in the pass that drafts anyhow


class CostTable:
    """Seconds by a whole number; between and beyond measured numbers on the line through the neighbours.

    A cell is the least of its first COLD samples, then the mean of more until there are SETTLED, then follows them slowly.
    """

    COLD, SETTLED, FOLLOWING, FARTHEST = 3, 10, 0.05, 2.0

    def __init__(self, cells: Mapping[int, float] | None = None) -> None:
        self.cells: dict[int, float] = dict(cells or {})
        self._samples = dict.fromkeys(self.cells, self.SETTLED)

    def add(self, number: int, seconds: float) -> float:
        """Adds a sample; returns how far it is from what was expected, once that is settled, as a factor from 1 / FARTHEST
        to FARTHEST: one interruption says nothing about the next pass."""
        samples, value = self._samples.get(number, 0), self.cells.get(number, seconds)
        if samples < self.SETTLED or value <= 0:
            self._samples[number] = samples + 1
            warm = samples + 1 - self.COLD
            self.cells[number] = (
                min(seconds, value) if warm < 1 else value + (min(seconds, 3 * value) - value) / (warm + 1)
            )
            return 1.0
        factor = min(max(seconds / value, 1 / self.FARTHEST), self.FARTHEST)
        self.cells[number] = float(value * factor**self.FOLLOWING)
        return factor

    def at(self, number: int) -> float:
        """Seconds of a number; needs at least one cell. They do not fall as the number grows beyond a measured one."""
        if number in self.cells:
            return self.cells[number]
        known = sorted(self.cells)
        if len(known) == 1 or number < known[0]:
            return self.cells[known[0]]
        above = next((i for i, seen in enumerate(known) if seen > number), len(known) - 1)
        low, high = (known[0], known[-1]) if number > known[-1] else (known[above - 1], known[above])
        slope = max(0.0, (self.cells[high] - self.cells[low]) / (high - low))
        return max(0.0, self.cells[low] + slope * (number - low))


class Acceptance:
    """The chance that a drafted token is accepted once those before it are, by position; recent rounds count most.

    A position's chance is drawn towards the one before it, as if that had been seen PULL times, and the first one's
    towards the prior.
    """

    FORGETTING, PULL = 0.97, 4.0

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self.tested: list[float] = []
        self.accepted: list[float] = []

    def add(self, gamma: int, tau: int) -> None:
        """Adds a round of gamma drafted tokens, of which tau were accepted."""
        tested = min(tau + 1, gamma)
        while len(self.tested) < tested:
            self.tested.append(0.0)
            self.accepted.append(0.0)
        for i in range(tested):
            self.tested[i] = self.FORGETTING * self.tested[i] + 1
            self.accepted[i] = self.FORGETTING * self.accepted[i] + (i < tau)

    def expected_tokens(self, ceiling: int) -> list[float]:
        """Expected tokens of a round, the target's own included, for gamma = 0 to ceiling."""
        expected, reached, chance = [1.0], 1.0, self.prior
        for i in range(ceiling):
            if i < len(self.tested):
                chance = (self.accepted[i] + self.PULL * chance) / (self.tested[i] + self.PULL)
            reached *= min(chance, 0.999)
            expected.append(expected[-1] + reached)
        return expected


class Measurements:
    """Costs and acceptances of a pair of models on this machine. Shared by the requests of an engine.

    A machine is faster in one second and slower in the next, for all passes alike: tables hold seconds at its usual pace,
    and every pass tells something about the present one.
    """

    PACING = 0.15

    def __init__(self) -> None:
        self.pace = 1.0  # seconds now over those in the tables
        self.verify: dict[int, CostTable] = {}  # by class of context length, then by rows
        self.draft: dict[str, CostTable] = {}  # by drafter, then by gamma
        self.reading: dict[str, float] = {}  # seconds per token of the context a drafter had not read
        self.acceptance: dict[str, Acceptance] = {}  # by kind of offer

    @staticmethod
    def context_class(length: int) -> int:
        """Contexts of up to 255 tokens, of 256 to 511, of 512 to 1023 and so on share their costs."""
        return (length >> 8).bit_length()

    def acceptance_of(self, offer: Offer) -> Acceptance:
        """What is known of offers of this kind."""
        found = self.acceptance.get(offer.kind)
        if found is None:
            found = self.acceptance[offer.kind] = Acceptance(offer.prior)
        return found

    def add_verify(self, rows: int, length: int, seconds: float) -> None:
        """Adds the time of a pass of the target over a number of rows after a context of this length."""
        table = self.verify.setdefault(self.context_class(length), CostTable())
        self.pace *= float(table.add(rows, seconds / self.pace) ** self.PACING)

    def verify_seconds(self, rows: int, length: int) -> float:
        """What a pass costs; where nothing was measured at such contexts, as at the nearest, in proportion to what was measured here."""
        wanted = self.context_class(length)
        table = self.verify.get(wanted)
        others = [known for known in self.verify if known != wanted]
        if table and (not others or rows in table.cells or (1 in table.cells and len(table.cells) > 1)):
            return self.pace * table.at(rows)
        nearest = self.verify[max(others, key=lambda known: (1 in self.verify[known].cells, -abs(known - wanted)))]
        cells = table.cells if table else {}
        ratios = [seconds / max(nearest.at(number), 1e-9) for number, seconds in cells.items()]
        return self.pace * nearest.at(rows) * (sum(ratios) / len(ratios) if ratios else 1.0)

    def add_draft(self, offer: Offer, gamma: int, seconds: float) -> None:
        """Adds the time of drafting; where much had to be read first, what is beyond drafting is reading."""
        seconds /= self.pace
        table = self.draft.setdefault(offer.drafter, CostTable({0: 0.0}))
        if offer.unread <= FEW or len(table.cells) == 1:
            table.add(gamma, seconds)
            return
        each = max(0.0, seconds - table.at(gamma)) / offer.unread
        known = self.reading.get(offer.drafter, each)
        self.reading[offer.drafter] = known + 0.3 * (each - known)

    def draft_seconds(self, offer: Offer, gamma: int) -> float:
        """What drafting costs once the context is read; 0 until it was measured."""
        table = self.draft.get(offer.drafter)
        return self.pace * table.at(gamma) if table else 0.0

    def reading_seconds(self, offer: Offer) -> float:
        """What the offer's drafter needs to read the context first."""
        return self.pace * self.reading.get(offer.drafter, 0.0) * offer.unread if offer.unread > FEW else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything at the usual pace, as JSON takes it."""
        return {
            "verify": {str(known): _texts(table) for known, table in self.verify.items()},
            "draft": {name: _texts(table) for name, table in self.draft.items()},
            "reading": dict(self.reading),
            "acceptance": {kind: [one.prior, one.tested, one.accepted] for kind, one in self.acceptance.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurements:
        """What as_dict gave.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is something else.
        """
        made = cls()
        made.verify = {int(known): _table(cells) for known, cells in values["verify"].items()}
        made.draft = {str(name): _table(cells) for name, cells in values["draft"].items()}
        made.reading = {str(name): _positive(seconds) for name, seconds in values["reading"].items()}
        for kind, (prior, tested, accepted) in values["acceptance"].items():
            one = made.acceptance[str(kind)] = Acceptance(_positive(prior))
            one.tested, one.accepted = [_positive(x) for x in tested], [_positive(x) for x in accepted]
            pairs = zip(one.accepted, one.tested, strict=True)  # a ValueError where lengths differ
            if any(accepted > tested for accepted, tested in pairs):
                raise ValueError("more accepted than tested")
        return made


def _texts(table: CostTable) -> dict[str, float]:
    return {str(number): seconds for number, seconds in table.cells.items()}


def _table(cells: Mapping[str, Any]) -> CostTable:
    if not cells:
        raise ValueError("a table without cells")
    return CostTable({int(number): _positive(seconds) for number, seconds in cells.items()})


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ValueError(f"{value!r} is not a number of at least 0")
    return float(value)

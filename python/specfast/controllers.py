"""Controllers: who drafts the next round and how many tokens. They look at past rounds and the context only, never at
a drawn token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from .context import Context
from .drafters import Drafter, Offer
from .measurements import FEW, Measurements
from .stats import Round


class Plan(NamedTuple):
    """What the next round drafts: gamma tokens of an offer, or nothing."""

    gamma: int = 0
    offer: Offer | None = None


PLAIN = Plan()
LEARNT = 8  # tested tokens at the first position


@runtime_checkable
class Controller(Protocol):
    """Chooses drafter and gamma before anything is drawn; gamma 0 is plain decoding."""

    def plan(self, context: Context, drafter: Drafter) -> Plan:
        """What to draft next, of what the drafter offers: at most context.draft_room tokens."""

    def update(self, round_: Round) -> None:
        """Learns from a finished round."""


class FixedGamma:
    """Always the same gamma, of the first offer."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma

    def plan(self, context: Context, drafter: Drafter) -> Plan:
        offers = drafter.offers(context) if self._gamma else ()
        gamma = min(self._gamma, context.draft_room, offers[0].longest) if offers else 0
        return Plan(gamma, offers[0]) if gamma > 0 else PLAIN

    def update(self, round_: Round) -> None:
        pass


@dataclass(slots=True)
class _Choice:
    """The best gamma above 0 of a kind of offer: expected tokens, seconds, and how often it may still be relied on."""

    gamma: int
    tokens: float
    seconds: float
    uses: int


class AutoGamma:
    """The drafter and gamma with the most tokens per second by measurement; plain decoding where that is faster.

    A round of gamma tokens gives E = 1 + a_1 + a_1 a_2 + ... tokens, with a_i the measured acceptance at position i for
    offers of this kind, and costs reading, drafting and a pass over gamma + 1 rows, as measured (`Measurements`).

    Every kind of offer has a balance: GRANT plain passes at the request's start, and what its rounds gain over plain
    decoding or lose, at most BALANCE. Once that is used up the kind is left alone, whatever it promises. At most EARNED
    of all time goes into trying such offers, and those that promise little, again: after PATIENCE plain rounds, twice as
    many whenever it was in vain, and further while they gain. Plain decoding is measured again every PLAIN_EVERY rounds, and every STRETCH-th round drafts one token more.

    Seconds are those of whole rounds, and speculation has to win by MARGIN. Choosing takes time too: it may take
    THINKING of all time and THINKING_OF_GAINS of what speculation gains. Where a pass is so short that this does not
    pay for a choice a round, the controller rests in between, and keeps what it computed for a while.

    Args:
        ceiling: largest gamma.
        measured: what is known already; it is added to.
    """

    GRANT, BALANCE, EARNED, PLAIN_EVERY, STRETCH = 1.5, 4.0, 0.01, 64, 24
    PATIENCE = (16, 512)
    MARGIN, THINKING, THINKING_OF_GAINS, MOST_THOUGHT, CHOOSING_SECONDS = 0.02, 0.002, 0.3, 64, 15e-6
    AMORTISED = 64  # tokens over which reading what was sat out is to pay

    def __init__(self, ceiling: int = 20, measured: Measurements | None = None) -> None:
        self.measured = measured or Measurements()
        self._ceiling = ceiling
        self._plain = 0.0  # seconds of a plain pass here
        self._plain_left = 1 if self.measured.verify else 3  # plain rounds to measure first
        self._balances: dict[str, float] = {}  # seconds, by kind of offer
        self._pool = 0.0  # seconds for trying
        self._patience = self.PATIENCE[0]
        self._since_plain = self._since_look = self._speculated = 0
        self._looking = self._gains = False
        self._rest = self._rested = 0
        self._planning = self._thought = 0.0  # seconds of a choice, and what may be spent on choosing
        self._choices: dict[str, _Choice] = {}

    def plan(self, context: Context, drafter: Drafter) -> Plan:
        if self._rest:
            self._rest -= 1
            self._rested += 1
            return PLAIN
        self._looking = False
        if self._plain_left or self._since_plain >= self.PLAIN_EVERY:
            return PLAIN
        room = context.room - 1
        offers = drafter.offers(context) if room > 0 else ()
        best, best_seconds, look, look_seconds = PLAIN, (1 - self.MARGIN) * self._plain, PLAIN, math.inf
        for offer in offers:
            choice = self._choices.get(offer.kind)
            if choice is None or not choice.uses:
                choice = self._choose(offer, len(context.tokens))
            choice.uses -= 1
            seconds, reading = choice.seconds / choice.tokens, 0.0
            if offer.unread > FEW:
                reading = self.measured.reading_seconds(offer)
                seconds += reading / max(1, min(max(self.AMORTISED, offer.unread), room))
            if seconds < best_seconds and self._balance(offer.kind) > 0:
                best, best_seconds = Plan(min(choice.gamma, offer.longest, room), offer), seconds
            elif seconds < look_seconds and choice.seconds + reading - self._plain <= self._pool:
                look, look_seconds = Plan(min(choice.gamma, offer.longest, room), offer), seconds
        if best.offer:
            return self._stretched(best, room)
        if look.offer and (self._gains or self._since_look >= self._patience):
            self._looking = True
            return look
        self._thought -= self._planning
        if self._thought < 0:
            self._rest = int(-self._thought / (self.THINKING * self._plain))
        return PLAIN

    def update(self, round_: Round) -> None:
        gamma, length = round_.gamma, round_.length
        if not self._rested:
            self._planning += 0.1 * (round_.plan_seconds - self._planning)
        if self._rest:
            self._rested += not self._rested  # the round that began the rest
            return
        passing = round_.verify_seconds + round_.keep_seconds + (round_.plan_seconds if gamma else 0.0)
        seconds = round_.draft_seconds + passing
        self.measured.add_verify(gamma + 1, length, passing)
        plainly = seconds + self._rested * self._plain
        self._pool += self.EARNED * plainly
        self._thought = min(self._thought + self.THINKING * plainly, self.MOST_THOUGHT * self._planning)
        if gamma and round_.offer:
            self._learn(round_, round_.offer, seconds)
        else:
            self._plain_left = max(0, self._plain_left - 1)
            self._since_plain = 0
            self._since_look += 1 + self._rested
            self._rested = 0
        self._plain = self.measured.verify_seconds(1, length)

    def _learn(self, round_: Round, offer: Offer, seconds: float) -> None:
        kind = offer.kind
        self.measured.add_draft(offer, round_.gamma, round_.draft_seconds)
        acceptance = self.measured.acceptance_of(offer)
        acceptance.add(round_.gamma, round_.tau)
        if acceptance.tested[0] < LEARNT:
            self._choices.pop(kind, None)
        self._since_plain += 1
        self._speculated += 1
        self._since_look = 0
        gained = round_.kept * self._plain - seconds
        self._thought += self.THINKING_OF_GAINS * max(0.0, gained)
        self._gains = gained > 0 and (self._looking or self._gains)
        if self._looking:
            self._patience = self.PATIENCE[0] if gained > 0 else min(2 * self._patience, self.PATIENCE[1])
        if self._looking and gained < 0:
            self._pool += gained
        else:
            self._balances[kind] = min(max(0.0, self._balance(kind) + gained), self.BALANCE * self._plain)

    def _balance(self, kind: str) -> float:
        return self._balances.setdefault(kind, self.GRANT * self._plain)

    def _choose(self, offer: Offer, length: int) -> _Choice:
        acceptance = self.measured.acceptance_of(offer)
        tested = len(acceptance.tested)
        most = max(1, min(self._ceiling, offer.longest, 1 + 2 * tested))
        tokens = acceptance.expected_tokens(most)
        costs = [
            self.measured.draft_seconds(offer, gamma) + self.measured.verify_seconds(gamma + 1, length)
            for gamma in range(1, most + 1)
        ]
        gamma = min(range(1, most + 1), key=lambda gamma: costs[gamma - 1] / tokens[gamma])
        uses = 1 + int(self.CHOOSING_SECONDS / (self.THINKING * self._plain))
        choice = self._choices[offer.kind] = _Choice(gamma, tokens[gamma], costs[gamma - 1], uses)
        return choice

    def _stretched(self, plan: Plan, room: int) -> Plan:
        assert plan.offer
        if self._speculated % self.STRETCH == self.STRETCH - 1:
            return plan._replace(gamma=min(plan.gamma + 1, self._ceiling, plan.offer.longest, room))
        return plan

"""What the nodes of a ring tell each other: greetings, laps and what comes of them, as JSON in exo's own messages.

A greeting is an opaque status, which a node without specfast ignores. A lap is exo's tensor between shards with a state
that says what to do with it; it goes to nodes that have greeted only, because foreign state ends exo's own shards. What
comes of a lap is the answer to that call, which fails at once where a node fails.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import RingError

PROTOCOL: Final = 2
STATE: Final = "specfast"
"""The key of exo's inference state under which everything of specfast's travels."""


@dataclass(frozen=True)
class Greeting:
    """A node says that it has specfast, and what was typed there.

    Attributes:
        node: its id.
        typed, host: as in ResolvedConfig.
        chosen: target and draft that were set since, and when ("at", seconds since 1970); the newest of a ring count.
        answer: whether the others are to greet it in turn.
        protocol: of laps; only nodes with the same one make a ring.
    """

    node: str
    typed: Mapping[str, Any]
    host: Mapping[str, Any]
    chosen: Mapping[str, Any] | None = None
    answer: bool = False
    protocol: int = PROTOCOL

    def as_status(self) -> str:
        """The text of exo's opaque status."""
        return json.dumps({"type": STATE, "greeting": asdict(self)})


@dataclass(frozen=True)
class Ending:
    """A request's laps are over: its caches may go."""

    key: str

    def as_status(self) -> str:
        """The text of exo's opaque status."""
        return json.dumps({"type": STATE, "ending": asdict(self)})


def read_status(status: str) -> Greeting | Ending | None:
    """What an opaque status says, where it is specfast's."""
    try:
        message = json.loads(status)
        if message.get("type") != STATE:
            return None
        if "greeting" in message:
            return Greeting(**message["greeting"])
        return Ending(**message["ending"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


@dataclass(frozen=True)
class Stop:
    """A node on a ring, and the layers it runs: `first` to `last`, both included."""

    node: str
    first: int
    last: int


@dataclass(frozen=True)
class Lap:
    """One pass of a request's rows around the ring.

    Attributes:
        key: of the request.
        model: its id in exo.
        layers: how many the model has.
        stops: the nodes in order, as the first one sees them.
        at: the stop that takes this message.
        position: of the first row: what is kept of earlier laps; a stop drops everything else.
        drafted: the tokens of the last rows; None where rows of a prompt are only to be read.
        law: fields of the native Law.
        seed, rule: as for the native verify. A rule that needs the draft's law cannot travel.
        precision: of the activations on every stop with native layers; None chooses by the weights.
        engine: the target engine that was typed, which every stop follows where it can; None is the best there.
        capacity: most positions of the request.
    """

    key: str
    model: str
    layers: int
    stops: tuple[Stop, ...]
    position: int
    drafted: tuple[int, ...] | None
    law: tuple[float, int, float, float, int, bool]
    seed: int
    rule: str
    precision: str | None
    engine: str | None
    capacity: int
    at: int = 1

    @property
    def stop(self) -> Stop:
        """The stop that takes this message."""
        return self.stops[self.at]

    @property
    def is_last(self) -> bool:
        """Whether that is the last one."""
        return self.at == len(self.stops) - 1

    def next(self) -> Lap:
        """The same for the stop after."""
        return replace(self, at=self.at + 1)

    def of(self, position: int, drafted: Sequence[int] | None) -> Lap:
        """The request's lap from a position on."""
        return replace(self, position=position, drafted=None if drafted is None else tuple(drafted))

    def as_state(self) -> dict[str, Any]:
        """exo's inference state with this lap."""
        return {STATE: {"lap": asdict(self)}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> Lap | None:
        """The lap in an inference state, if there is one."""
        values = (state or {}).get(STATE, {}).get("lap")
        if values is None:
            return None
        stops = tuple(Stop(**stop) for stop in values["stops"])
        drafted = values["drafted"]
        law = tuple(values["law"])
        return cls(**{**values, "stops": stops, "law": law, "drafted": None if drafted is None else tuple(drafted)})


def law_fields(law: _core.Law) -> tuple[float, int, float, float, int, bool]:
    """A native law as it travels."""
    return law.temperature, law.top_k, law.top_p, law.min_p, law.vocab_limit, law.temper_last


def write_verdict(verdict: _core.Verdict | None) -> npt.NDArray[np.uint8]:
    """What came of a lap, as the tensor that answers exo's call."""
    return _bytes({} if verdict is None else {"tau": verdict.tau, "next_token": verdict.next_token})


class NodeError(RingError):
    """A node of a ring is the reason.

    Attributes:
        node: its id.
        silent: whether it did not answer; else it is not what it was.
    """

    def __init__(self, node: str, message: str, *, silent: bool) -> None:
        super().__init__(message)
        self.node, self.silent = node, silent


def write_error(error: Exception, node: str) -> npt.NDArray[np.uint8]:
    """The same for a lap that failed at a node."""
    about = {"about": error.node, "silent": error.silent} if isinstance(error, NodeError) else {}
    return _bytes({"error": str(error) or type(error).__name__, "node": node, **about})


def is_answer(answer: npt.NDArray[np.uint8] | None) -> bool:
    """Whether it is one of those above."""
    try:
        return isinstance(json.loads(np.asarray(answer, dtype=np.uint8).tobytes()), dict)
    except (ValueError, TypeError):
        return False


def read_verdict(answer: npt.NDArray[np.uint8]) -> _core.Verdict | None:
    """What came of a lap; None where rows were only read.

    Raises:
        RingError: it failed; says where and why.
    """
    values = json.loads(np.asarray(answer, dtype=np.uint8).tobytes())
    if "error" in values:
        message = f"node {values['node']}: {values['error']}"
        if "about" in values:
            raise NodeError(values["about"], message, silent=values["silent"])
        raise RingError(message)
    return _core.Verdict(values["tau"], values["next_token"]) if values else None


def _bytes(values: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(values).encode(), dtype=np.uint8)


@dataclass(frozen=True)
class Asked:
    """A chat request's own options on their way to the node that decodes it, in exo's inference state."""

    options: Mapping[str, Any] = field(default_factory=dict)

    def as_state(self) -> dict[str, Any]:
        """exo's inference state with these options."""
        return {STATE: {"options": dict(self.options)}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> Asked | None:
        """The options in an inference state, if it has some."""
        values = (state or {}).get(STATE, {})
        return cls(values["options"]) if "options" in values else None


def differing(settings: Mapping[str, Sequence[tuple[str, Any]]]) -> tuple[str, str, Any, str, Any] | None:
    """The first option that two nodes were given differently: its name, a node and its value, another and its.

    Args:
        settings: by option the nodes it was given to, with the values.
    """
    for name, given in settings.items():
        node, value = given[0]
        for other, another in given[1:]:
            if another != value:
                return name, node, value, other, another
    return None

"""Whom a node of exo's has met: which nodes run specfast, what was typed there, and which have fallen silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Set
from typing import Any

from ..config import ResolvedConfig, resolve_config
from ..errors import ConfigurationError, RingError
from .wire import PROTOCOL, Greeting, differing

GREETING_SECONDS = 3.0
Say = Callable[[str], None]


class Acquaintances:
    """A node's greetings, and those it has heard.

    Args:
        node: exo's.
        resolved: gives what was typed at this node.
        say: tells people something, once.
    """

    def __init__(self, node: Any, resolved: Callable[[], ResolvedConfig], say: Say) -> None:
        self._node, self._resolved, self._say = node, resolved, say
        self._met: dict[str, Greeting] = {}
        self._strangers: set[str] = set()
        self._lost: set[str] = set()
        self._chosen: Mapping[str, Any] | None = None
        self._heard = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def greet(self, *, answer: bool = True) -> None:
        """Tells the peers that this node has specfast; those that are gone are forgotten."""
        self._loop = asyncio.get_running_loop()
        present = {peer.id() for peer in self._node.peers}
        self._met = {node: greeting for node, greeting in self._met.items() if node in present}
        self._strangers &= present
        self._lost &= present
        await self._node.broadcast_opaque_status("", self._own(answer).as_status())

    def hear(self, greeting: Greeting) -> None:
        """Takes note of a greeting, and answers it if it asks for that."""
        if greeting.node == self._node.id:
            return
        self._met[greeting.node] = greeting
        self._strangers.discard(greeting.node)
        self._lost.discard(greeting.node)
        self._heard.set()
        if greeting.answer:
            self.later(self.greet(answer=False))

    def choose(self, target: str | None, draft: str | None) -> None:
        """Models that replace those typed at any node, from the next request on; tells the others. From any thread."""
        self._chosen = {"at": time.time(), "target_model": target, "draft_model": draft}
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: self.later(self.greet(answer=False)))

    def lose(self, node: str) -> None:
        """A node did not answer: it has to greet again before anything is sent to it."""
        if self._met.pop(node, None):
            self._lost.add(node)

    def forget(self, node: str) -> None:
        """A node turned out to be another one than greeted."""
        self._met.pop(node, None)

    def knows(self, node: str) -> bool:
        """Whether a node has greeted."""
        return node in self._met

    def is_stranger(self, node: str) -> bool:
        """Whether a node did not answer a greeting, or in another version's way."""
        return node in self._strangers or self._met[node].protocol != PROTOCOL

    async def meet(self, others: Set[str]) -> None:
        """Greets nodes not heard of, and waits a moment; those who stay silent are strangers until peers change.

        Raises:
            RingError: a node that has greeted before stays silent.
        """
        missing = others - self._met.keys() - self._strangers
        if missing:
            self.later(self.greet())
        deadline = asyncio.get_running_loop().time() + GREETING_SECONDS
        while missing := others - self._met.keys() - self._strangers:
            self._heard.clear()
            left = deadline - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self._heard.wait(), max(left, 0.0))
            except TimeoutError:
                if lost := missing & self._lost:
                    raise RingError(
                        f"node {', '.join(sorted(lost))} does not answer; send the request again in some seconds, when it is back or "
                        "exo has taken it out of the ring"
                    ) from None
                self._strangers |= missing

    def settings(self, others: Iterable[str]) -> ResolvedConfig:
        """What was typed here or at any of the other nodes; what nobody typed is the default.

        Raises:
            ConfigurationError: two nodes were given different values, or ones that contradict each other.
        """
        greetings = [self._own(False), *(self._met[node] for node in others if node in self._met)]
        chosen = max((each.chosen for each in greetings if each.chosen), key=lambda each: each["at"], default=None)
        models = {} if chosen is None else {name: value for name, value in chosen.items() if name != "at"}
        given: dict[str, list[tuple[str, Any]]] = {}
        merged: dict[str, dict[str, Any]] = {"typed": {}, "host": {}}
        for source, values in merged.items():
            for greeting in greetings:
                for name, value in getattr(greeting, source).items():
                    if name not in models:
                        given.setdefault(f"{source} {name}", []).append((greeting.node, value))
                        values[name] = value
        if found := differing(given):
            name, node, value, other, another = found
            raise ConfigurationError(
                f"{name.split()[1]} is {value!r} at node {node} and {another!r} at node {other}; give it at one of them, or the "
                "same at both"
            )
        try:
            return self._travelling({**merged["typed"], **models}, merged["host"])
        except ConfigurationError as error:
            where = "; ".join(
                f"node {each.node} was given {', '.join(sorted(each.typed)) or 'nothing'}" for each in greetings
            )
            raise ConfigurationError(f"{error} ({where})") from None

    def later(self, work: Coroutine[Any, Any, Any]) -> None:
        """Has the event loop do something; it holds its tasks weakly."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _own(self, answer: bool) -> Greeting:
        resolved = self._resolved()
        return Greeting(self._node.id, resolved.typed, resolved.host, self._chosen, answer)

    def _travelling(self, typed: Mapping[str, Any], host: Mapping[str, Any]) -> ResolvedConfig:
        """The options with what a ring cannot do replaced, which is said where it was asked for."""
        lenience = resolve_config(typed, host=host).config.lenience
        if typed.get("rule", "coupled") != "coupled" or lenience != 1.0:
            self._say(
                "the ring accepts drafts by the coupled rule, which is exact: other rules and leniences have no effect"
            )
        if typed.get("early_exit") is not None:
            self._say(
                "early exit needs all layers on one node: in the ring the text so far is copied, or a draft model drafts"
            )
        kept = {name: value for name, value in typed.items() if name != "early_exit"}
        return resolve_config({**kept, "rule": "coupled", "lenience": 1.0}, host=host)

"""exo's ring with speculation: the first shard's node drafts and leads, the last one's verifies, and all of them roll back.

A lap carries the rows of a request's unread and drafted tokens from shard to shard. What the last shard decides comes back
as the answers to the calls that carried them, so that a node that fails, or leaves, fails the lap at once. Above
temperature 0 the rule is the coupled one: it needs a seed and no law of the draft, and gives the text of plain decoding.
"""

from __future__ import annotations

import asyncio
import importlib
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as StillWaiting
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..config import ResolvedConfig
from ..context import Context
from ..errors import RingError
from ..targets import MakeTarget, Progress
from .acquaintances import Acquaintances, Say
from .held import HeldLayers, layers_of
from .layers import Layers, Positions, as_layers
from .wire import (
    Ending,
    Greeting,
    Lap,
    NodeError,
    Stop,
    is_answer,
    law_fields,
    read_status,
    read_verdict,
    write_error,
    write_verdict,
)

CHUNK = 1024  # rows of a prompt that travel together
Plan = tuple[Stop, ...]
Forward = Callable[[], npt.NDArray[np.float32]]


class RingTarget:
    """The first shard of a model as a request's target: the others' work is a lap away. Called from a thread of its own.

    Args:
        send: has the first layers run, and sends the rows with their lap around; waits for what comes of it.
        end: told the key when the request is over.
        lap: of the request, with position 0 and nothing drafted.
        layers: the first ones.
        cache: of the request.
        law, seed, rule, adjustments: as for NativeTarget.
    """

    def __init__(
        self,
        send: Callable[[Forward, Lap], _core.Verdict | None],
        end: Callable[[str], None],
        lap: Lap,
        layers: Layers,
        cache: Positions,
        law: _core.Law,
        seed: int,
        rule: str,
        adjustments: _core.Adjustments | None,
    ) -> None:
        self.law, self.seed, self.rule, self.adjustments = law, seed, rule, adjustments
        self.layers, self.cache = layers, cache
        self._send, self._end, self._lap = send, end, lap
        self._pending = 1

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        """Reads whole chunks; what is left of the prompt goes around with the first drafted tokens."""
        while len(tokens) - self.cache.length > CHUNK:
            first = self.cache.length
            self._go(tokens[first : first + CHUNK], None)
            self.cache.commit(CHUNK)
            if progress:
                progress(self.cache.length, len(tokens))

    def verify(self, context: Context, proposal: _core.Proposal | None) -> _core.Verdict:
        pending = context.tokens[self.cache.length :]
        drafted = proposal.tokens.tolist() if proposal else []
        self._pending = len(pending)
        verdict = self._go([*pending, *drafted], drafted)
        if verdict is None:
            raise RingError("the last node of the ring decided nothing; start all nodes with the same version")
        return verdict

    def commit(self, kept: int) -> None:
        self.cache.commit(self._pending + kept - 1)

    def close(self) -> None:
        """Lets the other nodes' caches go."""
        self._end(self._lap.key)

    def _go(self, tokens: Sequence[int], drafted: Sequence[int] | None) -> _core.Verdict | None:
        self.cache.rollback()
        rows = np.asarray(tokens, dtype=np.int32)
        return self._send(partial(self.layers.forward, self.cache, rows), self._lap.of(self.cache.length, drafted))


class Ring:
    """A node's part in rings: the laps it sends, and the layers it runs for others.

    Args:
        node: exo's.
        resolved: gives what was typed at this node.
        compute: runs a function in the thread that computes.
        say: tells people something, once.

    Attributes:
        known: the nodes it has met.
        held: the layers.
    """

    can_send = False
    """Whether exo's messages carry state between nodes (set by the peer handle's patch)."""

    def __init__(
        self, node: Any, resolved: Callable[[], ResolvedConfig], compute: Callable[..., Any], say: Say
    ) -> None:
        self._node, self._compute, self._say = node, compute, say
        self._endings: dict[str, asyncio.Future[None]] = {}
        self.known = Acquaintances(node, resolved, say)
        self.held = HeldLayers(node.shard_downloader, compute)
        node.on_opaque_status.register("specfast").on_next(self._hear)

    def _hear(self, _request_id: str, status: str) -> None:
        message = read_status(status)
        if isinstance(message, Ending):
            self.held.end(message.key)
        elif isinstance(message, Greeting):
            self.known.hear(message)

    def plan(self, shard: Any) -> Plan:
        """The nodes of a model's ring, as this node sees them now."""
        node = self._node
        partitions = node.partitioning_strategy.partition(node.topology)
        shards = [node.get_current_shard(shard, i) for i in range(len(partitions))]
        parts = zip(partitions, shards, strict=True)
        return tuple(Stop(part.node_id, each.start_layer, each.end_layer) for part, each in parts)

    async def join(self, shard: Any) -> Plan | None:
        """The ring of a model; None where a node in it is without specfast, which is said.

        Raises:
            RingError: a node has fallen silent.
        """
        plan = self.plan(shard)
        others = {stop.node for stop in plan} - {self._node.id}
        await self.known.meet(others)
        strangers = {node for node in others if self.known.is_stranger(node)}
        if strangers or not self.can_send:
            self._say(
                f"node {', '.join(sorted(strangers or others))} of the ring does not run this specfast: plain decoding, by exo's own "
                "engines; install specfast there and start it with --inference-engine speculative"
            )
            return None
        return plan

    async def first_of(self, shard: Any, index: int) -> str | None:
        """The node with a part of a model, where it takes state with a prompt."""
        stop = self.plan(shard)[index]
        if stop.node != self._node.id:
            await self.known.meet({stop.node})
        return stop.node if self.can_send and self.known.knows(stop.node) else None

    def settings(self, plan: Plan) -> ResolvedConfig:
        """What was typed at any node of a ring; raises as `Acquaintances.settings`."""
        return self.known.settings(stop.node for stop in plan)

    # Laps of requests that this node leads.

    def make_target(self, shard: Any, engine: str | None) -> MakeTarget:
        """Makes targets of requests on a model whose first shard is this one.

        Args:
            engine: the target engine that was typed.
        """
        return partial(self._target, shard, engine, asyncio.get_running_loop())

    def _target(
        self,
        shard: Any,
        engine: str | None,
        loop: asyncio.AbstractEventLoop,
        model: Any,
        law: _core.Law,
        _lenience: float,
        seed: int,
        capacity: int,
        rule: str,
        adjustments: _core.Adjustments | None,
    ) -> RingTarget:
        stops = self.plan(shard)
        if stops[0] != Stop(self._node.id, shard.start_layer, shard.end_layer):
            raise RingError("the ring has just changed; send the request again")
        layers = as_layers(model, layers_of(shard))
        precision = model.precision if isinstance(model, _core.Model) else None
        lap = Lap(
            uuid.uuid4().hex, shard.model_id, shard.n_layers, stops, 0, None, law_fields(law), seed, rule, precision, engine,
            capacity,
        )  # fmt: skip
        cache = self._await(loop, self._compute(layers.new_cache, capacity))
        go, end = partial(self._go, loop), partial(self._end, loop)
        return RingTarget(go, end, lap, layers, cache, law, seed, rule, adjustments)

    def _go(self, loop: asyncio.AbstractEventLoop, forward: Forward, lap: Lap) -> _core.Verdict | None:
        """Runs the first layers and sends a lap around, from a thread."""

        async def go() -> npt.NDArray[np.uint8]:
            return await self._send(await self._compute(forward), lap)

        try:
            return read_verdict(self._await(loop, go()))
        except NodeError as error:
            loop.call_soon_threadsafe(self.known.lose if error.silent else self.known.forget, error.node)
            raise

    @staticmethod
    def _await(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any]) -> Any:
        """Waits in a thread for what exo's loop does; ends where that ends."""
        coming = asyncio.run_coroutine_threadsafe(work, loop)
        while True:
            try:
                return coming.result(1.0)
            except CancelledError:
                raise RingError("exo was stopped in the middle of a request") from None
            except StillWaiting:
                if not loop.is_running():
                    raise RingError("exo was stopped in the middle of a request") from None

    def _end(self, loop: asyncio.AbstractEventLoop, key: str) -> None:
        loop.call_soon_threadsafe(
            lambda: self.known.later(self._node.broadcast_opaque_status("", Ending(key).as_status()))
        )

    # Requests that came in at other nodes.

    def watch(self, request_id: str) -> asyncio.Future[None]:
        """What tells when a request that this node leads has ended."""
        ending = self._endings[request_id] = asyncio.get_running_loop().create_future()
        return ending

    def tell_ended(self, request_id: str, error: Exception | None) -> None:
        """A request that this node leads has ended."""
        ending = self._endings.pop(request_id, None)
        if ending is None or ending.done():
            return
        if error is None:
            ending.set_result(None)
        else:
            ending.set_exception(error)

    def unwatch(self, request_id: str) -> None:
        """Nobody looks at how a request ends any more."""
        self._endings.pop(request_id, None)

    # Laps of other nodes.

    async def take(self, tensor: npt.NDArray[np.float32], lap: Lap) -> npt.NDArray[np.uint8]:
        """Runs a lap's rows through this node's layers and sends them on; what came of it."""
        try:
            if lap.stop.node != self._node.id:
                raise RingError(f"a lap for node {lap.stop.node} came to node {self._node.id}")
            found = await self.held.take(lap, np.ascontiguousarray(tensor[0], dtype=np.float32))
            if isinstance(found, np.ndarray):
                return await self._send(found, lap.next())
            return write_verdict(found)
        except Exception as error:  # whatever it is, it is the first node's to hear
            return write_error(error, self._node.id)

    async def _send(self, rows: npt.NDArray[np.float32], lap: Lap) -> npt.NDArray[np.uint8]:
        """Has the next stop run a lap's rows; what came of it.

        Raises:
            NodeError: it is out of reach, or has no specfast any more.
        """
        stop = lap.stop
        peer = next((peer for peer in self._node.peers if peer.id() == stop.node), None)
        if peer is None:
            raise NodeError(stop.node, f"node {stop.node} has left the ring; send the request again", silent=True)
        shard = importlib.import_module("exo.inference.shard").Shard(lap.model, stop.first, stop.last, lap.layers)
        try:
            answer: npt.NDArray[np.uint8] | None = await peer.send_tensor(
                shard, rows[np.newaxis], inference_state=lap.as_state(), request_id=lap.key
            )
        except asyncio.CancelledError as error:  # gRPC ends calls so where exo closes the connection
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            raise _silent(stop, "exo closed the connection") from error
        except Exception as error:  # exo's transport raises many kinds
            raise _silent(stop, details_of(error)) from error
        if not is_answer(answer):
            raise NodeError(
                stop.node,
                f"node {stop.node} answers otherwise than specfast does; install specfast there in this version, or send the request "
                "again for plain decoding",
                silent=False,
            )
        assert answer is not None
        return answer


def _silent(stop: Stop, why: str) -> NodeError:
    return NodeError(
        stop.node, f"node {stop.node} left the ring in the middle of a request ({why}); send it again", silent=True
    )


def details_of(error: BaseException) -> str:
    """A line about a transport's exception."""
    details = getattr(error, "details", None)
    text = details() if callable(details) else str(error)
    return (str(text) or type(error).__name__).splitlines()[0]

"""Additions to exo's node: all tokens of a step at once, an engine that stays when peers come and go, and rings."""

from __future__ import annotations

import asyncio
import importlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigurationError, RingError, SpecfastError
from .contract import CLASS_NAME
from .engine import SpeculativeEngine
from .requests import CALLER, Caller
from .ring import Ring, details_of
from .wire import Asked, Lap

POLL_SECONDS = 0.2


def keep_engine(module: Any) -> None:
    """The speculative engine is not swapped for another one when peers change; other engines are as ever."""
    original = module.Node.select_best_inference_engine

    async def select_best_inference_engine(self: Any) -> None:
        if isinstance(self.inference_engine, SpeculativeEngine):
            await self.broadcast_supported_engines(self.get_supported_inference_engines())
            if ring := _ring(self):
                ring.held.rest()
                await ring.known.greet()
        else:
            await original(self)

    module.Node.select_best_inference_engine = select_best_inference_engine


def emit_many(module: Any) -> None:
    """Requests that run natively go on here, step by step to their end, whatever happens to the topology."""
    original = module.Node.process_inference_result

    async def process_inference_result(
        self: Any, shard: Any, result: Any, request_id: str | None = None, inference_state: Any = None
    ) -> Any:
        engine = self.inference_engine
        tokens = np.asarray(result)
        native = isinstance(engine, SpeculativeEngine) and np.issubdtype(tokens.dtype, np.integer)
        if not native or request_id is None:
            return await original(self, shard, result, request_id, inference_state)
        if not _emit(self, request_id, tokens.reshape(-1).tolist(), not engine.owns(request_id)):
            _keep(asyncio.create_task(_continue(self, engine, request_id)))
        return tokens

    module.Node.process_inference_result = process_inference_result
    SpeculativeEngine.emits_many = True


async def _continue(node: Any, engine: SpeculativeEngine, request_id: str) -> None:
    """Steps until a request ends. An error ends it too, with an end token where nobody looks at the error."""
    finished = False
    while not finished:
        node.outstanding_requests[request_id] = "processing"
        caller = engine.caller(request_id)
        try:
            tokens = await engine.step(request_id)
        except Exception as error:
            print(f"specfast: request {request_id} failed and ends here: {error}", file=sys.stderr, flush=True)
            if not isinstance(error, SpecfastError):
                traceback.print_exception(error, limit=-3, file=sys.stderr)
            caller.error = caller.error or error
            tokens = [] if caller.watched else [int(engine.tokenizer.eos_token_id)]
        finished = _emit(node, request_id, tokens, not engine.owns(request_id))


def _emit(node: Any, request_id: str, tokens: Sequence[int], finished: bool) -> bool:
    """Gives a step's tokens to those who wait for them; tells whether these were the last."""
    so_far, _ = node.buffered_token_output.get(request_id, ([], False))
    room = node.max_generate_tokens - len(so_far)
    if len(tokens) >= room:
        tokens, finished = tokens[:room], True
        node.inference_engine.end(request_id)
    so_far.extend(tokens)
    node.buffered_token_output[request_id] = (so_far, finished)
    if finished:
        node.outstanding_requests.pop(request_id, None)
    else:
        node.outstanding_requests[request_id] = "waiting"
    if tokens:  # a cancelled request has nobody to tell
        node.trigger_on_token_callbacks(request_id, list(tokens), finished)
        _keep(asyncio.create_task(node.broadcast_result(request_id, list(tokens), finished)))
    return finished


def join_rings(module: Any) -> None:
    """Nodes with the speculative engine form rings: laps go through it, and prompts go to the first node with their options."""
    make, process_tensor = module.Node.__init__, module.Node.process_tensor
    process_prompt, forward_prompt = module.Node.process_prompt, module.Node.forward_prompt

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807 - replaces the class's own
        make(self, *arguments, **options)
        if isinstance(self.inference_engine, SpeculativeEngine):
            self.inference_engine.join_rings(self)

    async def take_tensor(
        self: Any, base_shard: Any, tensor: Any, request_id: str | None = None, inference_state: Any = None
    ) -> Any:
        ring, lap = _ring(self), Lap.from_state(inference_state)
        if ring is None or lap is None:
            return await process_tensor(self, base_shard, tensor, request_id, inference_state)
        return await ring.take(tensor, lap)

    async def take_prompt(
        self: Any, base_shard: Any, prompt: str, request_id: str | None = None, inference_state: Any = None
    ) -> Any:
        ring = _ring(self)
        state = {} if inference_state is None else inference_state
        if ring is None or request_id is None or Asked.from_state(inference_state) is None:
            return await process_prompt(self, base_shard, prompt, request_id, state)
        ending = ring.watch(request_id)  # who sent it learns from this call how it ended
        try:
            await process_prompt(self, base_shard, prompt, request_id, state)
            if self.inference_engine.owns(request_id) or ending.done():
                await ending
        except asyncio.CancelledError:
            self.inference_engine.cancel(request_id)
            raise
        finally:
            ring.unwatch(request_id)
        return None

    async def send_prompt(
        self: Any, base_shard: Any, prompt: str, request_id: str, target_index: int, inference_state: Any = None
    ) -> None:
        ring, caller = _ring(self), CALLER.get() or Caller()
        try:
            first = await ring.first_of(base_shard, target_index) if ring else None
        except RingError as error:
            caller.error = error
            raise
        if first is None:
            await forward_prompt(self, base_shard, prompt, request_id, target_index, inference_state)
            return
        caller.request_id, caller.begun = request_id, True
        options = {"max_tokens": self.max_generate_tokens, **caller.options}
        sending = forward_prompt(self, base_shard, prompt, request_id, target_index, Asked(options).as_state())
        answer = _await_answer(self, base_shard, request_id, caller, first, asyncio.ensure_future(sending))
        _keep(asyncio.create_task(answer))

    module.Node.__init__ = __init__
    module.Node.process_tensor, module.Node.process_prompt = take_tensor, take_prompt
    module.Node.forward_prompt = send_prompt


async def _await_answer(
    node: Any, base_shard: Any, request_id: str, caller: Caller, first: str, sending: asyncio.Future[None]
) -> None:
    """Until the first node has decoded a prompt that came in here; its tokens come as results. What goes wrong is told here."""
    while not sending.done():
        await asyncio.wait({sending}, timeout=POLL_SECONDS)
        if caller.gone:
            sending.cancel()
    node.outstanding_requests.pop(request_id, None)
    error = None if sending.cancelled() else sending.exception()
    if caller.gone or (error is None and not sending.cancelled()):
        return
    text = "exo closed the connection" if error is None else details_of(error)
    refused = re.match(r"Unexpected <class '[^']*\.(ConfigurationError|ContextFullError)'>: ", text)
    raised = re.match(r"Unexpected <class '[^']*'>: ", text)  # as gRPC puts another process's exception
    if refused:
        caller.error = ConfigurationError(text[refused.end() :])
    elif raised:
        caller.error = RingError(f"the ring's first node {first}: {text[raised.end() :]}")
    else:
        caller.error = RingError(
            f"the ring's first node {first} left in the middle of a request ({text}); send it again"
        )
        if ring := _ring(node):
            ring.known.lose(first)
    print(f"specfast: request {request_id} failed and ends here: {caller.error}", file=sys.stderr, flush=True)
    if not caller.watched:
        tokenizers, models = importlib.import_module("exo.inference.tokenizers"), importlib.import_module("exo.models")
        tokenizer = await tokenizers.resolve_tokenizer(models.get_repo(base_shard.model_id, CLASS_NAME))
        node.trigger_on_token_callbacks(request_id, [int(tokenizer.eos_token_id)], True)


def let_state_travel(module: Any) -> None:
    """exo asks of a value in a state whether it is an `mx.array`; where mlx is not there NumPy stands for it, and has no such
    type."""
    if not isinstance(module.mx.array, type):
        module.mx = type("mx", (), {"array": np.ndarray})
    Ring.can_send = True


def _ring(node: Any) -> Ring | None:
    engine = node.inference_engine
    return engine.ring if isinstance(engine, SpeculativeEngine) else None


_tasks: set[asyncio.Task[Any]] = set()


def _keep(task: asyncio.Task[Any]) -> None:
    """An event loop holds its tasks weakly."""
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)

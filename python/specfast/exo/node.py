"""Additions to exo's node: all tokens of a step at once, and an engine that stays when peers come and go."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from .engine import SpeculativeEngine


def keep_engine(module: Any) -> None:
    """The speculative engine is not swapped for another one when peers change; other engines are as ever."""
    original = module.Node.select_best_inference_engine

    async def select_best_inference_engine(self: Any) -> None:
        if isinstance(self.inference_engine, SpeculativeEngine):
            await self.broadcast_supported_engines(self.get_supported_inference_engines())
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
        if not native or request_id is None or not shard.is_last_layer():
            return await original(self, shard, result, request_id, inference_state)
        if not _emit(self, request_id, tokens.reshape(-1).tolist(), not engine.owns(request_id)):
            _keep(asyncio.create_task(_continue(self, engine, request_id)))
        return tokens

    module.Node.process_inference_result = process_inference_result
    SpeculativeEngine.emits_many = True


async def _continue(node: Any, engine: SpeculativeEngine, request_id: str) -> None:
    """Steps until a request ends. An error ends it too, with an end token so that nobody waits in vain."""
    finished = False
    while not finished:
        node.outstanding_requests[request_id] = "processing"
        try:
            tokens = await engine.step(request_id)
        except Exception as error:
            print(f"specfast: request {request_id} failed and ends here: {error}", file=sys.stderr, flush=True)
            traceback.print_exception(error, limit=-3, file=sys.stderr)
            tokens = [int(engine.tokenizer.eos_token_id)]
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


_tasks: set[asyncio.Task[Any]] = set()


def _keep(task: asyncio.Task[Any]) -> None:
    """An event loop holds its tasks weakly."""
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)

"""Additions to exo's chat API: the request's own options, an end for requests nobody waits for, `GET /v1/speculation`."""

from __future__ import annotations

import asyncio
from typing import Any

from ..errors import ConfigurationError, ContextFullError, SpecfastError
from .engine import SpeculativeEngine
from .requests import CALLER, Caller, request_options

POLL_SECONDS = 0.2


def add_speculation_route(module: Any) -> None:
    """`GET /v1/speculation`: the engine's counters."""
    original = module.ChatGPTAPI.__init__

    async def handle_get_speculation(self: Any, _request: Any) -> Any:
        engine = self.node.inference_engine
        if isinstance(engine, SpeculativeEngine):
            answer = {"engine": type(engine).__name__, **engine.get_speculation_stats()}
        else:
            answer = {"engine": type(engine).__name__, "detail": "start exo with --inference-engine speculative"}
        return module.web.json_response(answer, headers={"Access-Control-Allow-Origin": "*"})

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807 - replaces the class's own
        original(self, *arguments, **options)
        self.app.router.add_get("/v1/speculation", self.handle_get_speculation)

    module.ChatGPTAPI.handle_get_speculation = handle_get_speculation
    module.ChatGPTAPI.__init__ = __init__


def honour_requests(module: Any) -> None:
    """A chat request's temperature, seed, top_p, top_k, min_p and max_tokens count, and it ends when its client goes."""
    original = module.ChatGPTAPI.handle_post_chat_completions

    async def handle_post_chat_completions(self: Any, request: Any) -> Any:
        if not isinstance(self.node.inference_engine, SpeculativeEngine):
            return await original(self, request)
        try:
            body = await _body_of(request)
            caller = Caller(_options_of(body), watched=True)
        except ConfigurationError as error:
            return _failed(module, error)
        waiting = CALLER.set(caller)
        answer = asyncio.ensure_future(original(self, request))
        try:
            while not answer.done() and not _gone(request) and caller.error is None:
                await asyncio.wait({answer}, timeout=POLL_SECONDS)
            if caller.error is not None:
                if body.get("stream") and caller.begun and request.transport is not None:
                    request.transport.abort()  # what was begun as a success must not end as one
                return _failed(module, caller.error)
            if not answer.done():
                return module.web.Response(status=499)
            return _failed(module, failure) if (failure := answer.exception()) else answer.result()
        finally:
            CALLER.reset(waiting)
            answer.cancel()
            caller.gone = True  # what is still under way has nobody to answer to
            if caller.request_id is not None:
                asyncio.get_running_loop().call_soon(self.token_queues.pop, caller.request_id, None)

    module.ChatGPTAPI.handle_post_chat_completions = handle_post_chat_completions


def _failed(module: Any, error: BaseException) -> Any:
    """The answer to a request that an error ended; exceptions that are answers stay exceptions."""
    if isinstance(error, module.web.HTTPException) or not isinstance(error, Exception):
        raise error
    refused = isinstance(error, ConfigurationError | ContextFullError)
    text = str(error) if isinstance(error, SpecfastError) else f"exo failed ({type(error).__name__}: {error})"
    return module.web.json_response({"detail": text}, status=400 if refused else 500)


async def _body_of(request: Any) -> Any:
    try:
        return await request.json()
    except ValueError as error:
        raise ConfigurationError(f"the body is not JSON: {error}") from None


def _options_of(body: Any) -> dict[str, Any]:
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ConfigurationError("a chat request is a JSON object whose 'messages' is a list of one message or more")
    for message in messages:
        if not {"role", "content"} <= message.keys():
            raise ConfigurationError(
                f"a message has {', '.join(sorted(message)) or 'nothing'}; it needs a role and a content"
            )
    if not isinstance(body.get("model", ""), str | None):
        raise ConfigurationError(f"model is {body['model']!r}, but must be the name of a model")
    return request_options(body)


def _gone(request: Any) -> bool:
    transport = request.transport
    return transport is None or bool(transport.is_closing())

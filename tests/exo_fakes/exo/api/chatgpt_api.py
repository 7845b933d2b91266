"""Chat completions without streaming."""

import asyncio
import uuid
from collections import defaultdict

from exo.api import web
from exo.inference.tokenizers import resolve_tokenizer
from exo.models import build_base_shard, get_repo, model_cards


class ChatGPTAPI:
    """Answers chat requests with a node."""

    def __init__(
        self,
        node,
        inference_engine_classname,
        response_timeout=90,
        on_chat_completion_request=None,
        default_model=None,
        system_prompt=None,
    ):
        self.node = node
        self.inference_engine_classname = inference_engine_classname
        self.response_timeout = response_timeout
        self.app = web.Application()
        self.default_model = default_model or "llama-3.2-1b"
        self.token_queues = defaultdict(asyncio.Queue)
        self._tasks = set()
        node.on_token.register("chatgpt-api-token-handler").on_next(self._take)
        self.app.router.add_get("/healthcheck", self.handle_healthcheck)

    def _take(self, request_id, tokens, is_finished):
        task = asyncio.create_task(self.handle_tokens(request_id, tokens, is_finished))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def handle_tokens(self, request_id, tokens, is_finished):
        await self.token_queues[request_id].put((tokens, is_finished))

    async def handle_healthcheck(self, request):
        return web.json_response({"status": "ok"})

    async def handle_post_chat_completions(self, request):
        data = await request.json()
        model = data.get("model")
        model = model if model in model_cards else self.default_model
        shard = build_base_shard(model, self.inference_engine_classname)
        if shard is None:
            return web.json_response({"detail": f"Unsupported model: {model}"}, status=400)
        tokenizer = await resolve_tokenizer(get_repo(model, self.inference_engine_classname))
        prompt = tokenizer.apply_chat_template(data["messages"], tokenize=False)
        request_id, tokens, finished = str(uuid.uuid4()), [], False
        try:
            reading = asyncio.create_task(self.node.process_prompt(shard, prompt, request_id=request_id))
            await asyncio.wait_for(asyncio.shield(reading), self.response_timeout)
            while not finished:
                more, finished = await asyncio.wait_for(self.token_queues[request_id].get(), self.response_timeout)
                tokens += more
        except TimeoutError:
            return web.json_response({"detail": "Response generation timed out"}, status=408)
        except Exception as error:
            return web.json_response({"detail": f"Error processing prompt: {error}"}, status=500)
        reason = "stop" if tokens[-1] == tokenizer.eos_token_id else "length"
        answer = {"model": model, "tokens": tokens, "content": tokenizer.decode(tokens), "finish_reason": reason}
        return web.json_response(answer)

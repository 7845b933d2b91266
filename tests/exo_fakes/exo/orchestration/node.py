"""A node alone: it has all layers, and every step's token goes back to the first."""

import asyncio
import json
import uuid

import numpy as np

from exo.helpers import CallbackSystem
from exo.inference.inference_engine import get_inference_engine
from exo.inference.shard import Shard


class Node:
    """Runs requests on an engine and tells observers of their tokens."""

    def __init__(
        self,
        _id,
        server,
        inference_engine,
        discovery,
        shard_downloader,
        partitioning_strategy=None,
        max_generate_tokens=1024,
        default_sample_temperature=0.0,
        topology_viz=None,
    ):
        self.id = _id
        self.inference_engine = inference_engine
        self.shard_downloader = shard_downloader
        self.device_capabilities = None
        self.buffered_token_output = {}
        self.outstanding_requests = {}
        self.max_generate_tokens = max_generate_tokens
        self.default_sample_temperature = default_sample_temperature
        self.topology_inference_engines_pool = []
        self.on_token, self.on_opaque_status = CallbackSystem(), CallbackSystem()
        self.broadcasts = []

    def get_current_shard(self, base_shard, index=None):
        return Shard(base_shard.model_id, 0, base_shard.n_layers - 1, base_shard.n_layers)

    def get_supported_inference_engines(self):
        is_mlx = type(self.inference_engine).__name__.startswith("MLX")
        return ["mlx", "tinygrad"] if is_mlx else ["tinygrad"]

    def get_topology_inference_engines(self):
        return self.topology_inference_engines_pool

    async def broadcast_supported_engines(self, supported_engines_names):
        status = {"type": "supported_inference_engines", "engines": supported_engines_names}
        await self.broadcast_opaque_status("", json.dumps(status))

    async def select_best_inference_engine(self):
        supported = self.get_supported_inference_engines()
        await self.broadcast_supported_engines(supported)
        if self.get_topology_inference_engines():
            self.inference_engine = get_inference_engine(supported[0], self.shard_downloader)

    async def process_prompt(self, base_shard, prompt, request_id=None, inference_state=None):
        shard, request_id = self.get_current_shard(base_shard), request_id or str(uuid.uuid4())
        self.outstanding_requests[request_id] = "processing"
        result, state = await self.inference_engine.infer_prompt(request_id, shard, prompt, inference_state)
        await self.process_inference_result(shard, result, request_id, state)

    async def process_tensor(self, base_shard, tensor, request_id=None, inference_state=None):
        shard = self.get_current_shard(base_shard)
        self.outstanding_requests[request_id] = "processing"
        try:
            result, state = await self.inference_engine.infer_tensor(request_id, shard, tensor, inference_state)
            return await self.process_inference_result(shard, result, request_id, state)
        except Exception as error:
            self.outstanding_requests.pop(request_id)
            print(f"a step failed: {error}")

    async def process_inference_result(self, shard, result, request_id=None, inference_state=None):
        tokens, _ = self.buffered_token_output.setdefault(request_id, ([], False))
        token = await self.inference_engine.sample(result, temp=self.default_sample_temperature)
        await self.inference_engine.ensure_shard(shard)
        tokens.append(token.item())
        finished = token.item() == self.inference_engine.tokenizer.eos_token_id
        finished = finished or len(tokens) >= self.max_generate_tokens
        self.buffered_token_output[request_id] = (tokens, finished)
        self.trigger_on_token_callbacks(request_id, tokens[-1:], finished)
        await self.broadcast_result(request_id, tokens[-1:], finished)
        if finished:
            self.outstanding_requests.pop(request_id)
        else:
            self.outstanding_requests[request_id] = "waiting"
            following = self.forward_tensor(shard, token.reshape(1, -1), request_id, 0, inference_state)
            self._following = asyncio.create_task(following)
        return np.array(tokens)

    async def forward_tensor(self, base_shard, tensor, request_id, target_index, inference_state=None):
        await self.process_tensor(base_shard, tensor, request_id, inference_state)

    def trigger_on_token_callbacks(self, request_id, tokens, is_finished):
        self.on_token.trigger_all(request_id, tokens, is_finished)

    async def broadcast_result(self, request_id, result, is_finished):
        self.broadcasts.append((request_id, list(result), is_finished))

    async def broadcast_opaque_status(self, request_id, status):
        self.on_opaque_status.trigger_all(request_id, status)

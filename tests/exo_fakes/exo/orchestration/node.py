"""A node alone or among peers: it has some layers, and every step's token goes back to the first."""

import asyncio
import json
import uuid
from dataclasses import dataclass

import numpy as np

from exo.helpers import CallbackSystem
from exo.inference.inference_engine import get_inference_engine
from exo.inference.shard import Shard


@dataclass
class Partition:
    """A node's share."""

    node_id: str
    start: float
    end: float


class Strategy:
    """Equal shares, the last name first."""

    def partition(self, topology):
        names = sorted(topology, reverse=True)
        return [Partition(name, i / len(names), (i + 1) / len(names)) for i, name in enumerate(names)]


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
        self.partitioning_strategy = partitioning_strategy or Strategy()
        self.topology, self.peers = {_id}, []
        self.device_capabilities = None
        self.buffered_token_output = {}
        self.outstanding_requests = {}
        self.max_generate_tokens = max_generate_tokens
        self.default_sample_temperature = default_sample_temperature
        self.topology_inference_engines_pool = []
        self.on_token, self.on_opaque_status = CallbackSystem(), CallbackSystem()
        self.broadcasts = []

    def get_partition_index(self, offset=0):
        names = [partition.node_id for partition in self.partitioning_strategy.partition(self.topology)]
        return (names.index(self.id) + offset) % len(names)

    def get_current_shard(self, base_shard, index=None):
        partitions, layers = self.partitioning_strategy.partition(self.topology), base_shard.n_layers
        part = partitions[self.get_partition_index() if index is None else index]
        return Shard(base_shard.model_id, int(part.start * layers), int(part.end * layers) - 1, layers)

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
        if not shard.is_first_layer():
            self.outstanding_requests[request_id] = "waiting"
            await self.forward_prompt(shard, prompt, request_id, 0, inference_state)
            return
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
        index = self.get_partition_index(offset=1)
        if not shard.is_last_layer():
            following = self.forward_tensor(shard, result, request_id, index, inference_state)
            self._following = asyncio.create_task(following)
            return np.array([])
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
            following = self.forward_tensor(shard, token.reshape(1, -1), request_id, index, inference_state)
            self._following = asyncio.create_task(following)
        return np.array(tokens)

    def _at(self, index):
        name = self.partitioning_strategy.partition(self.topology)[index].node_id
        return next((peer for peer in self.peers if peer.id() == name), None)

    async def forward_prompt(self, base_shard, prompt, request_id, target_index, inference_state=None):
        await self._at(target_index).send_prompt(base_shard, prompt, inference_state, request_id)

    async def forward_tensor(self, base_shard, tensor, request_id, target_index, inference_state=None):
        if peer := self._at(target_index):
            await peer.send_tensor(base_shard, tensor, inference_state, request_id)
        else:
            await self.process_tensor(base_shard, tensor, request_id, inference_state)

    def trigger_on_token_callbacks(self, request_id, tokens, is_finished):
        self.on_token.trigger_all(request_id, tokens, is_finished)

    async def broadcast_result(self, request_id, result, is_finished):
        self.broadcasts.append((request_id, list(result), is_finished))
        await self._tell_peers("send_result", request_id, result, is_finished)

    async def _tell_peers(self, call, *values):
        for peer in self.peers:
            try:
                await getattr(peer, call)(*values)
            except Exception as error:
                print(f"peer {peer.id()} could not be told: {error}")

    async def broadcast_opaque_status(self, request_id, status):
        await self._tell_peers("send_opaque_status", request_id, status)
        self.on_opaque_status.trigger_all(request_id, status)

"""What an engine has to do, and engines by name."""

from abc import ABC, abstractmethod

import numpy as np

from exo.inference.tokenizers import resolve_tokenizer


class InferenceEngine(ABC):
    """An engine that runs some layers of a model."""

    session = {}  # noqa: RUF012

    @abstractmethod
    async def encode(self, shard, prompt): ...

    @abstractmethod
    async def sample(self, x): ...

    @abstractmethod
    async def decode(self, shard, tokens): ...

    @abstractmethod
    async def infer_tensor(self, request_id, shard, input_data, inference_state=None): ...

    @abstractmethod
    async def load_checkpoint(self, shard, path): ...

    async def save_checkpoint(self, shard, path):
        raise NotImplementedError

    async def save_session(self, key, value):
        self.session[key] = value

    async def clear_session(self):
        raise AttributeError("an engine of the host cannot clear its session")

    async def infer_prompt(self, request_id, shard, prompt, inference_state=None):
        tokens = await self.encode(shard, prompt)
        return await self.infer_tensor(request_id, shard, tokens.reshape(1, -1), inference_state)


class MLXDynamicShardInferenceEngine(InferenceEngine):
    """Float logits by a rule: after token t comes 3 t + 1, among 320."""

    def __init__(self, shard_downloader):
        self.shard_downloader = shard_downloader
        self.shard = self.tokenizer = None
        self.temperatures = []

    async def ensure_shard(self, shard):
        if self.shard != shard:
            path = await self.shard_downloader.ensure_shard(shard, type(self).__name__)
            self.shard, self.tokenizer = shard, await resolve_tokenizer(path)

    async def encode(self, shard, prompt):
        await self.ensure_shard(shard)
        return np.array(self.tokenizer.encode(prompt))

    async def decode(self, shard, tokens):
        await self.ensure_shard(shard)
        return self.tokenizer.decode(tokens)

    async def sample(self, x, temp=0.0):
        self.temperatures.append(temp)
        return np.array([int(x[0, -1].argmax())])

    async def infer_tensor(self, request_id, shard, input_data, inference_state=None):
        await self.ensure_shard(shard)
        following = (3 * np.asarray(input_data) + 1) % 320
        return (np.arange(320) == following[..., None]).astype(np.float32), inference_state

    async def load_checkpoint(self, shard, path):
        await self.ensure_shard(shard)


class DummyInferenceEngine(MLXDynamicShardInferenceEngine):
    """Another engine, by its name."""


inference_engine_classes = {
    "mlx": "MLXDynamicShardInferenceEngine",
    "tinygrad": "TinygradDynamicShardInferenceEngine",
    "dummy": "DummyInferenceEngine",
}


def get_inference_engine(inference_engine_name, shard_downloader):
    if inference_engine_name == "tinygrad":
        raise ModuleNotFoundError("No module named 'tinygrad'")
    engines = {"mlx": MLXDynamicShardInferenceEngine, "dummy": DummyInferenceEngine}
    if inference_engine_name not in engines:
        raise ValueError(f"Unsupported inference engine: {inference_engine_name}")
    return engines[inference_engine_name](shard_downloader)

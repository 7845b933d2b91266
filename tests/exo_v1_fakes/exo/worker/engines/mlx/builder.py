"""Makes the engine of a model."""

from collections import deque
from copy import deepcopy

from mlx_lm.models.cache import make_prompt_cache

from exo.worker.engines.base import Engine
from exo.worker.engines.mlx.generator.batch_generate import ExoBatchGenerator


class PrefixCache:
    """Caches of whole prompts.

    Attributes:
        hits: how often one was found.
    """

    def __init__(self):
        self.known, self.hits = {}, 0

    def get_kv_cache(self, model, tokens):
        if found := self.known.get(tuple(tokens.tolist())):
            self.hits += 1
            return deepcopy(found), tokens[-2:]
        return make_prompt_cache(model), tokens

    def add(self, tokens, caches):
        self.known[tuple(tokens.tolist())] = deepcopy(caches)


class BatchGenerator(Engine):
    """An engine."""

    def __init__(self, model, tokenizer, group):
        self.prefix = PrefixCache()
        self._gen = ExoBatchGenerator(model, tokenizer, group, self.prefix)
        self._queue, self.names = deque(), {}

    def submit(self, task):
        self._queue.append(task)

    def step(self):
        while self._queue:
            name, params, prompt = self._queue.popleft()
            self.names[self._gen.submit(task_params=params, prompt=prompt)] = name
        return [(self.names[uid], response) for uid, response in self._gen.step()] if self._gen.has_work else []


class SequentialGenerator(Engine):
    """Another engine."""

    def submit(self, task): ...

    def step(self): ...


class MlxBuilder:
    """Makes engines.

    Attributes:
        group: of the nodes that share a model; None on a single one.
    """

    def __init__(self, model_id, model, tokenizer, group=None, *, sequential=False):
        self.model_id, self.model, self.tokenizer, self.group = model_id, model, tokenizer, group
        self.sequential = sequential

    def load(self, bound_instance):
        yield from ()

    def build(self):
        return SequentialGenerator() if self.sequential else BatchGenerator(self.model, self.tokenizer, self.group)

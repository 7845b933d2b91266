"""kv_cache: rollback is bookkeeping, whatever was appended."""

import numpy as np
from specfast import _core
from specfast.bench.random_model import random_model
from specfast.bench.shapes import Shape


def test_rollback(benchmark, record):
    model = random_model(Shape("tiny", 256, 2, 4, 2, 64, 256, 256, True), "q4g64")
    cache = _core.Cache(model)
    model.prefill(cache, np.zeros(1000, dtype=np.int32))

    def append():
        model.forward(cache, np.zeros(16, dtype=np.int32), 0)
        return (), {}

    benchmark.group = "kv_cache"
    benchmark.pedantic(cache.rollback, setup=append, rounds=200)
    record(series="kv_cache_rollback")

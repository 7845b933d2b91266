"""attend_rows through a one-layer decoder: what the context costs per pass, for M rows."""

import numpy as np
import pytest
from specfast import _core
from specfast.bench.random_model import random_model
from specfast.bench.shapes import Shape

SHAPE = Shape("attention", 512, 1, 32, 8, 64, 512, 256, True)


@pytest.mark.parametrize("M", [1, 6, 9])
@pytest.mark.parametrize("context", [16, 4096])
def test_attend_rows(benchmark, record, context, M):
    model = random_model(SHAPE, "q4g64")
    cache = _core.Cache(model)
    model.prefill(cache, np.zeros(context, dtype=np.int32))
    tokens = np.arange(M, dtype=np.int32)

    def step():
        model.forward(cache, tokens, 0)
        cache.rollback()

    benchmark.group = "attend_rows"
    benchmark.pedantic(step, rounds=30, warmup_rounds=3)
    record(series=f"attend_rows_{context}", M=M, context=context)

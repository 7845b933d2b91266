"""logits_rows: the head of a 128k vocabulary with the running maximum, for M rows."""

import numpy as np
import pytest
from specfast import _core
from specfast.bench.random_model import random_model
from specfast.bench.shapes import Shape

SHAPE = Shape("head", 1024, 1, 2, 1, 64, 64, 128256, True)


@pytest.mark.parametrize("M", [1, 6, 9])
def test_logits_rows(benchmark, record, M):
    model = random_model(SHAPE, "q4g64", max_context=64)
    cache, proposal, greedy = _core.Cache(model), _core.Proposal(), _core.Law(temperature=0.0)
    proposal.set_tokens(np.arange(M - 1, dtype=np.int32))

    def step():
        model.verify(cache, np.array([1], dtype=np.int32), proposal, greedy, 1.0, 0, 0)
        cache.rollback()

    benchmark.group = "logits_rows"
    benchmark.pedantic(step, rounds=20, warmup_rounds=2)
    record(series="logits_rows", M=M, gb_s=model.weight_bytes / benchmark.stats.stats.median / 1e9)

"""attend_rows over a long cold context, beside the roofline of the same seconds: GQA 4, keys and values in bf16 and in 8 bits, M rows."""

import numpy as np
import pytest
from specfast import _core
from specfast.bench.random_model import random_model
from specfast.bench.shapes import Shape

CONTEXT, HEADS, ROUNDS = 8192 - 16, 32, 25


@pytest.fixture(scope="module", params=[(64, 16), (128, 16), (128, 8)], ids=["head64", "head128", "head128_kv8"])
def cold(request):
    """A model that is nothing but attention, caches of it that together exceed a last-level cache, and a short one."""
    _core.set_num_threads(_core.num_threads())  # a model this small would otherwise run on one thread
    head_dim, kv_bits = request.param
    shape = Shape("attention", 64, 1, HEADS, 8, head_dim, 64, 256, True)
    model = random_model(shape, "q4g64", max_context=8192, kv_bits=kv_bits)

    def filled(positions):
        cache = _core.Cache(model, positions + 16)
        model.prefill(cache, (np.arange(positions) % 256).astype(np.int32))
        return cache

    count = 1 + (96 << 20) // (model.kv_bytes_per_position * CONTEXT)
    return model, [filled(CONTEXT) for _ in range(count)], filled(16)


@pytest.mark.parametrize("M", [1, 3, 6, 8])
def test_attend_rows(benchmark, cold, record, big, M):
    model, caches, short = cold
    tokens, machine, rest = np.arange(M, dtype=np.int32), [], []
    turn = iter(range(10**9))

    def passes(cache):
        model.forward(cache, tokens, 0)
        cache.rollback()

    def look_around():
        machine.append((_core.read_bandwidth(big), _core.peak_dot("bf16", milliseconds=3.0)))
        rest.append(benchmark._timer())
        passes(short)  # what a pass costs beside its attention
        rest[-1] = benchmark._timer() - rest[-1]
        return (caches[next(turn) % len(caches)],), {}

    kind = f"{model.head_dim}_kv8" if model.kv_bits == 8 else f"{model.head_dim}"
    benchmark.group = f"attend_rows {kind}"
    benchmark.pedantic(passes, setup=look_around, rounds=ROUNDS, warmup_rounds=2)
    bandwidth, peak = np.median(machine, axis=0) * 1e9
    macs = 2 * CONTEXT * model.head_dim * HEADS * M
    roofline = max(model.kv_bytes_per_position * CONTEXT / bandwidth, macs / peak)
    record(series=f"attend_rows_{kind}", M=M, roofline_s=roofline + float(np.median(rest)))

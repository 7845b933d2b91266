"""A GGUF file of Llama-3.2-1B's shape in tinygrad: accelerated, stock, and the native decoder on the same file in place.

Weights are Q4_0, or F16; the file is written once into build/. All three run in one process, in turns, after 64 tokens.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
from specfast import _core
from specfast.bench.shapes import find_shape
from specfast.checkpoint import load_model

pytest.importorskip("tinygrad", reason="tinygrad is not installed")
gguf = pytest.importorskip("gguf", reason="gguf is not installed")

import specfast.tinygrad as st  # noqa: E402
from peers import random_gguf  # noqa: E402
from specfast.tinygrad import private  # noqa: E402
from specfast.tinygrad.host import own_forward  # noqa: E402
from tinygrad import Tensor, TinyJit  # noqa: E402

CONTEXT = 64
SHAPE = find_shape("llama-3.2-1b")


@pytest.fixture(scope="module", params=["Q4_0", "F16"])
def runs(request):
    """Three functions of M: a pass with the logits of all rows, after CONTEXT tokens."""
    path = Path("build") / f"llama-3.2-1b-{request.param}.gguf"
    path.parent.mkdir(exist_ok=True)
    if not path.is_file():
        kind = gguf.GGMLQuantizationType[request.param]
        random_gguf.write(path, SHAPE, kind, kind, max_context=512)
    stock, fast = st.load_gguf(path), st.accelerate(st.load_gguf(path))
    assert st.report(fast).path == "graph"
    native = load_model(path, pack=False).model
    forward, vocab, _ = own_forward(stock)
    turn = itertools.count(1)

    def tokens(M):
        return (np.arange(M, dtype=np.int32) + next(turn) * 97) % vocab

    def in_graphs(forward):
        jits = {M: TinyJit(lambda x, at: (forward(x, at) + 0).realize()) for M in (1, 8)}

        def run(x):
            return jits[x.shape[1]](x, private.variable("start_pos", 511, CONTEXT)).realize()

        for M in (8, 1):
            for _ in range(2):  # run once, then captured; what is timed is replayed
                run(realised(tokens(M)))
        return run

    rows = _core.Cache(native)
    native.prefill(rows, tokens(CONTEXT))

    def alone(M):
        native.forward(rows, tokens(M), M)
        rows.rollback()

    st.logits(fast, realised(tokens(CONTEXT)), 0).realize()
    fast_run = in_graphs(lambda x, at: st.logits(fast, x, at))
    return fast_run, in_graphs(forward), alone, lambda M: realised(tokens(M)), request.param


def realised(tokens):
    """Token ids (1, M) in tinygrad's memory, where its own loop has them."""
    return Tensor(tokens[None]).clone().realize()


@pytest.mark.parametrize("M", [1, 8])
def test_tinygrad(benchmark, runs, record, M):
    fast, stock, alone, inputs, kind = runs
    times = {"stock": [], "native": []}

    def timed(name, run, argument):
        start = benchmark._timer()
        run(argument)
        times[name].append(benchmark._timer() - start)

    def others():
        if len(times["stock"]) < 2:
            timed("stock", stock, inputs(M))
            alone(M)  # stock tinygrad leaves the caches cold and the threads asleep
        x = inputs(M)
        timed("native", alone, M)
        return (x,), {}

    benchmark.group = f"tinygrad {kind}"
    benchmark.pedantic(fast, setup=others, rounds=15, warmup_rounds=1)
    stock_s, native_s = (float(np.median(times[name])) for name in ("stock", "native"))
    ours = float(np.median(benchmark.stats.stats.data))
    record(series=f"tinygrad {kind}", M=M, stock_s=stock_s, native_s=native_s, roofline_s=native_s)
    print(f"\n{kind}, M = {M}: accelerated {1e3 * ours:.2f} ms, native alone {1e3 * native_s:.2f}, stock tinygrad {1e3 * stock_s:.0f} "
          f"({stock_s / ours:.1f} times as long); accelerated / native {ours / native_s:.3f}")  # fmt: skip
    assert stock_s / ours > 2
    assert ours / native_s < 1.25

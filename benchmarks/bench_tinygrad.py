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
from specfast.tinygrad import private  # noqa: E402
from specfast.tinygrad.host import own_forward  # noqa: E402
from tinygrad import Tensor, TinyJit  # noqa: E402

CONTEXT = 64
SHAPE = find_shape("llama-3.2-1b")


def matrices():
    s, q, kv = SHAPE, SHAPE.heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim
    yield "token_embd.weight", s.vocab, s.hidden
    for i in range(s.layers):
        for stem, N, K in (
            ("attn_q", q, s.hidden), ("attn_k", kv, s.hidden), ("attn_v", kv, s.hidden), ("attn_output", s.hidden, q),
            ("ffn_gate", s.intermediate, s.hidden), ("ffn_up", s.intermediate, s.hidden), ("ffn_down", s.hidden, s.intermediate),
        ):  # fmt: skip
            yield f"blk.{i}.{stem}.weight", N, K


def write(path, kind):
    """Random values of about unit products, the same ones in every matrix."""
    s, random = SHAPE, np.random.default_rng(0)
    writer = gguf.GGUFWriter(path.with_suffix(".partial"), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(s.hidden)
    writer.add_block_count(s.layers)
    writer.add_feed_forward_length(s.intermediate)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_rope_dimension_count(s.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"t{i}" for i in range(s.vocab)])
    norms = [f"blk.{i}.{stem}_norm.weight" for i in range(s.layers) for stem in ("attn", "ffn")] + [
        "output_norm.weight"
    ]
    raw = getattr(gguf.GGMLQuantizationType, kind)
    size = {"F16": 2, "Q4_0": 18 / 32}[kind]
    for name, N, K in matrices():
        width = int(K * size)
        if kind == "F16":
            writer.add_tensor_info(name, (N, K), np.dtype(np.float16), N * width)
        else:
            writer.add_tensor_info(name, (N, width), np.dtype(np.uint8), N * width, raw_dtype=raw)
    for name in norms:
        writer.add_tensor_info(name, (s.hidden,), np.dtype(np.float32), 4 * s.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, N, K in matrices():
        if kind == "F16":
            part = (random.standard_normal((1024, K)) / np.sqrt(K)).astype(np.float16)
            data = np.resize(part, (N, K))
        else:
            part = random.integers(0, 256, (1024, K // 32, 18), dtype=np.uint8)
            part[:, :, :2] = np.array([K**-0.5 / 4.6], np.float16).view(np.uint8)
            data = np.resize(part.reshape(1024, -1), (N, K // 32 * 18))
        writer.write_tensor_data(data)
    for _ in norms:
        writer.write_tensor_data(np.ones(s.hidden, np.float32))
    writer.close()
    path.with_suffix(".partial").rename(path)


@pytest.fixture(scope="module", params=["Q4_0", "F16"])
def runs(request):
    """Three functions of M: a pass with the logits of all rows, after CONTEXT tokens."""
    path = Path("build") / f"llama-3.2-1b-{request.param}.gguf"
    path.parent.mkdir(exist_ok=True)
    if not path.is_file():
        write(path, request.param)
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

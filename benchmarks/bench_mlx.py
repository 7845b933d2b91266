"""An mlx-lm model of Llama-3.2-1B's shape, 4 bits in groups of 64: accelerated, stock, and the native decoder alone.

All read the same arrays, in turns. Scales are float32, the fastest of stock MLX on x86. The path of primitives is measured
where specfast._mlx is installed (SPECFAST_MLX=1).
"""

import itertools

import numpy as np
import pytest
from specfast import _core
from specfast.bench.shapes import find_shape

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx import nn  # noqa: E402
from mlx.utils import tree_map  # noqa: E402
from mlx_lm.models import llama  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache  # noqa: E402
from specfast.mlx import accelerate, primitives, report  # noqa: E402
from specfast.mlx.weights import native_model  # noqa: E402

CONTEXT = 64


def random_llama(s):
    """Random words, with scales that give products of about unit size."""
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=s.hidden, num_hidden_layers=s.layers, intermediate_size=s.intermediate,
            num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim, vocab_size=s.vocab,
            rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=s.tied,
        )
    )  # fmt: skip
    nn.quantize(model, 64, 4)
    random = np.random.default_rng(0)

    def fill(x):
        if x.dtype == mx.uint32:
            return mx.array(random.integers(0, 2**32, x.shape, dtype=np.uint32))
        return mx.ones(x.shape) if x.ndim == 1 else mx.full(x.shape, 0.003)

    model.update(tree_map(fill, model.parameters()))
    for module in model.modules():
        if hasattr(module, "biases"):
            module.biases = module.scales * -7.5
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def stock():
    mx.set_default_device(mx.cpu)
    return random_llama(find_shape("llama-3.2-1b"))


@pytest.fixture(scope="module", params=["int8", "bf16", "f32"])
def runs(request, stock):
    """Functions of M by name: a pass with the logits of all rows, after CONTEXT tokens."""
    precision = request.param
    native = native_model(stock, precision)
    turn = itertools.count(1)

    def tokens(M):
        return (np.arange(M, dtype=np.int32) + next(turn) * 97) % native.vocab

    def accelerated(path):
        fused = llama.Model(stock.args)
        nn.quantize(fused, 64, 4)
        fused.update(stock.parameters())
        assert report(accelerate(fused, precision, path)).path == path
        return with_mlx(fused)

    def with_mlx(model):
        cache = make_prompt_cache(model)
        if model is not stock:
            mx.eval(model(mx.array(tokens(CONTEXT))[None], cache=cache))

        def run(M):
            mx.eval(model(mx.array(tokens(M))[None], cache=cache))
            trim_prompt_cache(cache, M)

        return run

    rows = _core.Cache(native)
    native.prefill(rows, tokens(CONTEXT))

    def alone(M):
        native.forward(rows, tokens(M), M)
        rows.rollback()

    paths = ["native"] if primitives.why_not() else ["native", "primitives"]
    return {
        "precision": precision,
        "stock": with_mlx(stock),
        "alone": alone,
        **{path: accelerated(path) for path in paths},
    }


@pytest.mark.parametrize(("M", "stock_rounds"), [(1, 5), (8, 2)])
def test_mlx(benchmark, runs, record, M, stock_rounds):
    stock_s, native_s, ours = measured(benchmark, runs, "native", M, stock_rounds)
    record(series=series("mlx", runs), M=M, stock_s=stock_s, native_s=native_s, roofline_s=native_s)
    print(f"\n{runs['precision']}, M = {M}: accelerated {1e3 * ours:.2f} ms, native alone {1e3 * native_s:.2f}, stock MLX {1e3 * stock_s:.0f} "
          f"({stock_s / ours:.0f} times as long); accelerated / native {ours / native_s:.3f}")  # fmt: skip
    assert stock_s / ours > 10
    assert ours / native_s < 1.3


@pytest.mark.skipif(bool(primitives.why_not()), reason=primitives.why_not())
@pytest.mark.parametrize("M", [1, 8])
def test_mlx_primitives(benchmark, runs, record, M):
    _, native_s, ours = measured(benchmark, runs, "primitives", M, 0)
    record(series=series("mlx_primitives", runs), M=M, native_s=native_s, roofline_s=native_s)
    print(
        f"\n{runs['precision']}, M = {M}: primitives {1e3 * ours:.2f} ms, native alone {1e3 * native_s:.2f}; ratio {ours / native_s:.3f}"
    )
    assert ours / native_s < 1.3


def series(name, runs):
    return name if runs["precision"] == "int8" else f"{name}_{runs['precision']}"


def measured(benchmark, runs, path, M, stock_rounds):
    """Median seconds of stock MLX (nan without rounds), the native decoder alone, and a path, in turns."""
    times = {"stock": [], "alone": []}

    def timed(name):
        start = benchmark._timer()
        runs[name](M)
        times[name].append(benchmark._timer() - start)

    def others():
        if len(times["stock"]) < stock_rounds:
            timed("stock")
            runs["alone"](M)  # stock MLX leaves the caches cold and the threads asleep
        timed("alone")
        return (M,), {}

    benchmark.group = "mlx"
    benchmark.pedantic(runs[path], setup=others, rounds=25, warmup_rounds=1)
    stock_s = float(np.median(times["stock"])) if stock_rounds else float("nan")
    return stock_s, float(np.median(times["alone"])), float(np.median(benchmark.stats.stats.data))

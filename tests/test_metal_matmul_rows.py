"""The Metal kernels that multiply rows with weights, executed on the CPU and compared with the scalar C++ kernels."""

import itertools
import os

import numpy as np
import pytest
from metal_launch import RandomMatrix, close, decode, empty, encode, run
from specfast import _core, metal
from specfast.errors import ShapeError

FULL = os.environ.get("SPECFAST_FULL") == "1"
TYPES = ("f32", "f16", "bf16")
WEIGHTS = [metal.Weights(bits, group) for bits in (4, 8) for group in (32, 64, 128)] + [metal.Weights()]
ROWS = range(1, metal.MAX_ROWS + 1)
# every pair of weights and activations at one M each, unless all are asked for
INSTANTIATIONS = [
    (weights, activations, M)
    for i, (weights, activations) in enumerate(itertools.product(WEIGHTS, TYPES))
    for M in (ROWS if FULL else [1 + i * 4 % 9])
]
SANITIZED = [(metal.Weights(4, 64), "bf16", 5), (metal.Weights(8, 128), "f16", 9), (metal.Weights(), "f32", 3)]


def scalar_product(rng, weights, activations, x, N, K):
    """A random matrix, and x times it by the scalar C++ kernel at precision f32."""
    W = RandomMatrix(rng, weights, activations, N, K)
    return W, _core.matmul_rows(decode(x, activations), W.native, precision="f32", isa="scalar")


def check_matmul(rng, weights, activations, M, mode="plain", schedule=0):
    N, K = 37, 288 if weights.bits == 0 else 3 * max(weights.group, 32) + 1024 // 4 * (weights.group == 32)
    x = encode(rng.normal(size=(M, K)), activations)
    W, wanted = scalar_product(rng, weights, activations, x, N, K)
    y = empty((M, N), activations)
    launch = metal.matmul_rows(weights, activations, M=M, N=N, K=K)
    run(launch, *W.buffers, x, x, y, mode=mode, schedule=schedule)
    assert close(y, wanted, activations)


@pytest.mark.parametrize(("weights", "activations", "M"), INSTANTIATIONS, ids=str)
def test_matmul_rows(weights, activations, M):
    check_matmul(np.random.default_rng(M), weights, activations, M, schedule=M)


@pytest.mark.parametrize("mode", ["address", "thread"])
@pytest.mark.parametrize(("weights", "activations", "M"), SANITIZED, ids=str)
def test_matmul_rows_sanitized(mode, weights, activations, M):
    for schedule in range(5) if FULL or mode == "thread" else (0, 1):
        check_matmul(np.random.default_rng(M), weights, activations, M, mode, schedule)


@pytest.mark.parametrize("epilogue", ["bias", "residual", "silu_mul"])
def test_epilogues(epilogue):
    rng, M, N, K, weights = np.random.default_rng(3), 4, 24, 128, metal.Weights(4, 64)
    x = encode(rng.normal(size=(M, K)), "f32")
    W, product = scalar_product(rng, weights, "f32", x, N, K)
    operand = rng.normal(size=N if epilogue == "bias" else (M, N)).astype(np.float32)
    silu = product / (1 + np.exp(-product))
    wanted = silu * operand if epilogue == "silu_mul" else product + operand
    y = operand.copy() if epilogue == "residual" else empty((M, N), "f32")  # a residual is added in place
    launch = metal.matmul_rows(weights, "f32", M=M, N=N, K=K, epilogue=epilogue)
    run(launch, *W.buffers, x, y if epilogue == "residual" else operand, y)
    assert close(y, wanted, "f32")


@pytest.mark.parametrize(
    ("weights", "activations"),
    [(metal.Weights(4, 64), "bf16"), (metal.Weights(8, 32), "f16"), (metal.Weights(), "bf16")],
    ids=str,
)
def test_a_row_has_the_same_bits_beside_any_rows(weights, activations):
    rng, N, K = np.random.default_rng(7), 20, 640
    W = RandomMatrix(rng, weights, activations, N, K)
    x = encode(rng.normal(size=(9, K)), activations)
    results = []
    for M in ROWS:
        for first in {0, 9 - M}:
            rows = np.ascontiguousarray(x[first : first + M])
            y = empty((M, N), activations)
            run(metal.matmul_rows(weights, activations, M=M, N=N, K=K), *W.buffers, rows, rows, y)
            results.append((first, y))
    whole = results[-1][1]
    for first, y in results:
        assert np.array_equal(y, whole[first : first + len(y)])
    assert not np.array_equal(whole[0], whole[1])  # rows do differ


@pytest.mark.parametrize("M", [1, 6, 9])
def test_swiglu_rows(M):
    rng, N, K, weights = np.random.default_rng(M), 22, 320, metal.Weights(4, 32)
    x = encode(rng.normal(size=(M, K)), "bf16")
    gate, gates = scalar_product(rng, weights, "bf16", x, N, K)
    up, ups = scalar_product(rng, weights, "bf16", x, N, K)
    h = empty((M, N), "bf16")
    launch = metal.swiglu_rows(weights, "bf16", M=M, N=N, K=K)
    for schedule in range(5):
        run(launch, *gate.buffers, *up.buffers, x, h, schedule=schedule)
        assert close(h, gates / (1 + np.exp(-gates)) * ups, "bf16")


@pytest.mark.parametrize("activations", TYPES)
@pytest.mark.parametrize("K", [40, 1000])
def test_norm_rows(activations, K):
    rng = np.random.default_rng(K)
    x, weight = encode(rng.normal(size=(3, K)), activations), encode(rng.normal(1, 0.1, K), activations)
    y, wide = empty((3, K), activations), decode(x, activations).astype(float)
    launch = metal.norm_rows(activations, M=3, K=K, eps=1e-5)
    for schedule in range(5):
        run(launch, x, weight, y, schedule=schedule, mode="thread" if schedule == 1 else "plain")
        wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * decode(weight, activations)
        assert close(y, wanted, activations)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_embed_rows(weights):
    rng, V, K = np.random.default_rng(1), 11, 384
    W = RandomMatrix(rng, weights, "f16", V, K)
    tokens = np.array([9, 3, 0, 10, -1, 99, 7, 7], np.int32)
    y = empty((5, K), "f16")
    launch = metal.embed_rows(weights, "f16", M=5, V=V, K=K, first=1)
    run(launch, *W.buffers, tokens, y)
    assert close(y, W.floats[[3, 0, 10, 0, 10]], "f16")  # ids outside are read inside


@pytest.mark.parametrize(("M", "V", "limit"), [(1, 300, 300), (4, 1030, 1000), (9, 517, 517)])
def test_logits_rows(M, V, limit):
    rng, K, weights = np.random.default_rng(M), 128, metal.Weights(4, 64)
    x = encode(rng.normal(size=(M, K)), "f32")
    W, wanted = scalar_product(rng, weights, "f32", x, V, K)
    head = metal.logits_rows(weights, "f32", M=M, V=V, K=K, limit=limit)
    best_of = metal.logits_best(M=M, V=V)
    for schedule, mode in enumerate(("plain", "plain", "address", "thread", "plain")):
        logits, parts, best = empty((M, V), "f32"), empty((M, -(-V // 256), 4), "f32"), empty((M, 4), "f32")
        run(head, *W.buffers, x, logits, parts, mode=mode, schedule=schedule)
        run(best_of, parts, best, mode=mode, schedule=schedule)
        assert close(logits, wanted, "f32")
        counted = logits[:, :limit].astype(float)
        assert np.array_equal(best[:, 0], counted.max(-1))
        assert np.array_equal(best[:, 1], counted.argmax(-1))
        assert (best[:, 2] == 0).all()
        assert np.allclose(best[:, 3], np.exp(counted - counted.max(-1, keepdims=True)).sum(-1), rtol=1e-5)


def test_equal_logits_go_to_the_lowest_id_and_nan_shows():
    K, V, weights = 32, 700, metal.Weights()
    W, x = np.zeros((V, K), np.float32), np.ones((2, K), np.float32)
    W[[610, 40, 300]] = 1
    x[1, 3] = np.nan
    logits, parts, best = empty((2, V), "f32"), empty((2, 3, 4), "f32"), empty((2, 4), "f32")
    run(metal.logits_rows(weights, "f32", M=2, V=V, K=K, limit=V), W, W, W, x, logits, parts)
    run(metal.logits_best(M=2, V=V), parts, best)
    assert best[0, :2].tolist() == [32, 40]
    assert np.isnan(best[1, 2])


def test_shapes_without_a_kernel_are_refused():
    with pytest.raises(ShapeError, match="10 rows; a kernel takes 1 to 9"):
        metal.matmul_rows(metal.Weights(4, 64), "f16", M=10, N=8, K=64)
    with pytest.raises(ShapeError, match="K is 96, but must be a multiple of 64"):
        metal.matmul_rows(metal.Weights(4, 64), "f16", M=1, N=8, K=96)
    with pytest.raises(ShapeError, match="4 bits in groups of 16"):
        metal.Weights(4, 16)

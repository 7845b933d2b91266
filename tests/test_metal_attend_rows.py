"""The Metal kernels around attention: QKV with RoPE and the append, attention over the cache, the cache's commit."""

import os

import numpy as np
import pytest
from metal_launch import RandomMatrix, close, decode, empty, encode, run
from oracle.model import rmsnorm, rotate
from specfast import _core, metal
from specfast.errors import ShapeError

FULL = os.environ.get("SPECFAST_FULL") == "1"
SHAPES = [  # heads, kv_heads, head_dim, activations
    (4, 2, 64, "f32"),
    (8, 1, 80, "bf16"),
    (3, 3, 96, "f16"),
    (12, 2, 128, "bf16"),
    (8, 2, 256, "f16"),
]


def state_of(position):
    state = np.zeros(8, np.int32)
    state[:2] = position
    return state


def attend(q, keys, values, length, activations, *, ahead=0, mode="plain", schedule=0, room=0):
    """Attention of the last M positions over caches (kv_heads, capacity, dim); `length` are committed before `ahead`."""
    M, heads, dim = q.shape
    kv_heads, capacity, _ = keys.shape
    positions = length + ahead + M + room
    partial = empty((-(-positions // metal.SPAN), M, heads, dim + 2), "f32")
    out = empty((M, heads, dim), activations)
    launch = metal.attend_rows(
        activations,
        M=M,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        capacity=capacity,
        positions=positions,
        ahead=ahead,
    )
    state = state_of(length)
    counters = run(launch, q, keys, values, state, partial, mode=mode, schedule=schedule)
    spans = metal.attend_spans(activations, M=M, heads=heads, head_dim=dim, ahead=ahead)
    run(spans, partial, state, out, mode=mode, schedule=schedule)
    return out, launch, counters


def random_cache(rng, kv_heads, capacity, dim, activations):
    return tuple(encode(rng.normal(size=(kv_heads, capacity, dim)), activations) for _ in range(2))


def scalar_attention(q, keys, values, seen, activations):
    wide = [np.ascontiguousarray(decode(x, activations)[:, :seen].transpose(1, 0, 2)) for x in (keys, values)]
    return _core.attend_rows(decode(q, activations), *wide, kv_bits=32, isa="scalar")


@pytest.mark.parametrize("length", [0, 5, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "activations"), SHAPES)
def test_attend_rows(heads, kv_heads, dim, activations, length):
    rng = np.random.default_rng(length + dim)
    keys, values = random_cache(rng, kv_heads, length + 16, dim, activations)
    for M in (1, 9) if length == 300 else (4,):
        q = encode(rng.normal(size=(M, heads, dim)), activations)
        out, _, _ = attend(q, keys, values, length, activations, schedule=M)
        assert close(out, scalar_attention(q, keys, values, length + M, activations), activations)


@pytest.mark.parametrize("mode", ["address", "thread"])
def test_attend_rows_sanitized(mode):
    rng = np.random.default_rng(1)
    keys, values = random_cache(rng, 1, 270, 64, "bf16")
    q = encode(rng.normal(size=(3, 5, 64)), "bf16")
    for schedule in range(5):
        out, _, _ = attend(q, keys, values, 262, "bf16", mode=mode, schedule=schedule)
        assert close(out, scalar_attention(q, keys, values, 265, "bf16"), "bf16")


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "activations"), SHAPES[1:4])
def test_attention_has_the_same_bits_beside_any_rows(heads, kv_heads, dim, activations):
    rng, first = np.random.default_rng(dim), 250
    keys, values = random_cache(rng, kv_heads, 280, dim, activations)
    q = encode(rng.normal(size=(9, heads, dim)), activations)
    whole, _, _ = attend(q, keys, values, first, activations)
    for M in range(1, 9):
        for skip in {0, 9 - M}:
            rows, _, _ = attend(
                np.ascontiguousarray(q[skip : skip + M]),
                keys,
                values,
                first,
                activations,
                ahead=skip,
                room=512,
                schedule=M,
            )
            assert np.array_equal(rows, whole[skip : skip + M])
    keys[:, first + 9 :] = encode(np.nan, activations)  # what has not been appended plays no part
    values[:, first + 9 :] = encode(np.nan, activations)
    assert np.array_equal(attend(q, keys, values, first, activations)[0], whole)
    keys[:, 0] += 1
    assert not np.array_equal(attend(q, keys, values, first, activations)[0], whole)


@pytest.mark.parametrize("heads", [16, 32, 64])
def test_many_heads_of_one_group(heads):
    rng, M, dim = np.random.default_rng(heads), 9, 64
    keys, values = random_cache(rng, 1, 64, dim, "f16")
    q = encode(rng.normal(size=(M, heads, dim)), "f16")
    out, launch, _ = attend(q, keys, values, 40, "f16")
    assert close(out, scalar_attention(q, keys, values, 40 + M, "f16"), "f16")
    assert launch.threadgroup[0] <= 1024


def qkv(rng, *, M, heads, kv_heads, dim, K, activations, between, position, mode="plain", schedule=0, weights=None):
    """Runs the kernel on random weights; returns what it wrote and what the definition says."""
    weights = weights or metal.Weights(4, 64)
    matrices = [RandomMatrix(rng, weights, activations, n * dim, K) for n in (heads, kv_heads, kv_heads)]
    x = encode(rng.normal(size=(M, K)), activations)
    inv_freq = (10_000.0 ** -(np.arange(0, dim, 2) / dim)).astype(np.float32)
    bias = encode(rng.normal(size=(heads + 2 * kv_heads, dim)), activations)
    norms = encode(rng.normal(1, 0.1, (2, dim)), activations)
    capacity = position + M + 3
    q = empty((M, heads, dim), activations)
    keys, values = (empty((kv_heads, capacity, dim), activations) for _ in range(2))
    launch = metal.qkv_rope_append(
        weights,
        activations,
        M=M,
        K=K,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        capacity=capacity,
        eps=1e-5,
        between=between,
    )
    buffers = [b for matrix in matrices for b in matrix.buffers]
    run(launch, *buffers, x, inv_freq, bias, norms, state_of(position), q, keys, values, mode=mode, schedule=schedule)

    wide = decode(x, activations).astype(float)
    found = [(wide @ matrix.floats.T).reshape(M, -1, dim) for matrix in matrices]
    if between == "bias":
        parts = np.split(decode(bias, activations), [heads, heads + kv_heads])
        found = [a + b for a, b in zip(found, parts, strict=True)]
    if between == "qk_norm":
        found[:2] = [rmsnorm(a, decode(w, activations), 1e-5) for a, w in zip(found, norms, strict=False)]
    at = np.zeros((position + M, 1, dim))
    turned = []
    for a in found[:2]:
        padded = np.repeat(at, a.shape[1], 1)
        padded[position:] = a
        turned.append(rotate(padded, inv_freq.astype(float))[position:])
    return (q, keys, values), (turned[0], turned[1], found[2])


def check_qkv(found, wanted, position, activations):
    assert close(found[0], wanted[0], activations)
    for cache, rows in zip(found[1:], wanted[1:], strict=True):
        M = len(rows)
        assert close(cache[:, position : position + M].transpose(1, 0, 2), rows, activations)
        untouched = decode(np.delete(cache, slice(position, position + M), 1), activations)
        assert (untouched == decode(empty(1, activations), activations)).all()


@pytest.mark.parametrize("between", ["nothing", "bias", "qk_norm"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "activations"), SHAPES)
def test_qkv_rope_append(heads, kv_heads, dim, activations, between):
    rng, position = np.random.default_rng(dim), 37
    M = {"nothing": 1, "bias": 5, "qk_norm": 9}[between]
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "K": 128, "M": M}
    found, wanted = qkv(rng, **shape, activations=activations, between=between, position=position, schedule=M)
    check_qkv(found, wanted, position, activations)


@pytest.mark.parametrize("mode", ["address", "thread"])
def test_qkv_rope_append_sanitized(mode):
    for schedule in range(5):
        rng = np.random.default_rng(schedule)
        shape = {"heads": 2, "kv_heads": 1, "dim": 64, "K": 96, "M": 3}
        found, wanted = qkv(
            rng,
            **shape,
            activations="f16",
            between="qk_norm",
            position=4,
            mode=mode,
            schedule=schedule,
            weights=metal.Weights(8, 32),
        )
        check_qkv(found, wanted, 4, "f16")


def test_qkv_has_the_same_bits_beside_any_rows():
    """Rows are drawn alike for every M, so that the first row is the same."""
    shape = {"heads": 2, "kv_heads": 1, "dim": 64, "K": 192, "activations": "bf16", "between": "nothing", "position": 9}
    weights = metal.Weights(4, 32)
    rows = []
    for M in range(1, 10):
        (q, keys, values), _ = qkv(np.random.default_rng(5), M=M, weights=weights, **shape)
        rows.append((q[0], keys[:, 9], values[:, 9]))
    for row in rows[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(rows[0], row, strict=True))


def test_commit_round():
    launch, text = metal.commit_round(), np.full(40, -1, np.int32)
    tokens, state = np.zeros(16, np.int32), np.zeros(8, np.int32)
    tokens[:6] = 5, 6, 10, 11, 12, 13
    state[:3] = 8, 8, 2
    for kept, next_token, schedule in ((2, 99, 0), (0, 7, 1), (4, 50, 2)):
        before = tokens.copy(), state.copy()
        run(launch, np.array([kept, next_token] + [0] * 6, np.int32), tokens, state, text, schedule=schedule)
        assert tokens[:2].tolist() == [before[0][1 + kept], next_token]
        assert state[:3].tolist() == [n + kept + 1 for n in before[1][:3]]
    assert text[2:11].tolist() == [10, 11, 99, 7, 10, 11, 12, 13, 50]
    before = state.copy()
    run(launch, np.array([1, -1] + [0] * 6, np.int32), tokens, state, text)
    assert state[3] == 1
    assert np.array_equal(state[:3], before[:3])


def test_compact_path():
    """Rows of an accepted path of a tree move together, in place."""
    rng, kv_heads, dim, capacity = np.random.default_rng(3), 2, 64, 20
    keys, values = random_cache(rng, kv_heads, capacity, dim, "bf16")
    before, path = (keys.copy(), values.copy()), np.array([0, 2, 3, 7, 0, 0, 0, 0], np.int32)
    shape = {"count": 4, "kv_heads": kv_heads, "head_dim": dim, "capacity": capacity}
    scratch = empty((4, 2 * kv_heads, dim), "bf16")
    for to_cache in (False, True):
        launch = metal.compact_path("bf16", **shape, to_cache=to_cache)
        run(launch, path, state_of(5), scratch, keys, values, schedule=1, mode="address" if to_cache else "plain")
    for cache, old in zip((keys, values), before, strict=True):
        assert np.array_equal(cache[:, 5:9], old[:, [5, 7, 8, 12]])
        assert np.array_equal(np.delete(cache, slice(5, 9), 1), np.delete(old, slice(5, 9), 1))


def test_shapes_without_a_kernel_are_refused():
    with pytest.raises(ShapeError, match="7 heads share 2 kv heads"):
        metal.attend_rows("f16", M=1, heads=7, kv_heads=2, head_dim=64, capacity=8, positions=8)
    with pytest.raises(ShapeError, match="head_dim is 72"):
        metal.attend_rows("f16", M=1, heads=8, kv_heads=2, head_dim=72, capacity=8, positions=8)
    with pytest.raises(ShapeError, match="head_dim 256 in float32"):
        metal.attend_rows("f32", M=1, heads=8, kv_heads=2, head_dim=256, capacity=8, positions=8)

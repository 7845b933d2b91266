"""Counted, not argued: what a launch reads from device memory."""

import os

import numpy as np
import pytest
from metal_launch import RandomMatrix, empty, encode, run
from specfast import metal
from test_metal_attend_rows import attend, random_cache

FULL = os.environ.get("SPECFAST_FULL") == "1"
ROWS = range(1, metal.MAX_ROWS + 1)
WITHIN = 1.05


def check_matrix(counters, first, own):
    """The buffers from `first` on have been read once, whole."""
    read = [counters.read_bytes[first + i] for i in range(len(own))]
    assert [counters.unique_read_bytes[first + i] for i in range(len(own))] == [b.nbytes for b in own]
    assert read[0] == own[0].nbytes
    assert sum(read) <= WITHIN * sum(b.nbytes for b in own)


@pytest.mark.parametrize(
    ("weights", "activations", "rows"),
    [
        (metal.Weights(4, 64), "bf16", ROWS),
        (metal.Weights(8, 32), "f16", ROWS if FULL else (6,)),
        (metal.Weights(), "bf16", ROWS if FULL else (7,)),
    ],
    ids=str,
)
def test_weights_are_read_once_for_any_rows(weights, activations, rows):
    rng, N, K = np.random.default_rng(1), 48, 1024
    W = RandomMatrix(rng, weights, activations, N, K)
    own = W.buffers if weights.bits else W.buffers[:1]
    for M in rows:
        x, y = encode(rng.normal(size=(M, K)), activations), empty((M, N), activations)
        matmul = metal.matmul_rows(weights, activations, M=M, N=N, K=K)
        check_matrix(run(matmul, *W.buffers, x, x, y, mode="count"), 0, own)
        if M not in (6, 7, 9) and not FULL:
            continue
        logits, parts = empty((M, N), "f32"), empty((M, 1, 4), "f32")
        head = metal.logits_rows(weights, activations, M=M, V=N, K=K, limit=N)
        check_matrix(run(head, *W.buffers, x, logits, parts, mode="count"), 0, own)
        up = tuple(b.copy() for b in W.buffers) if weights.bits else (W.buffers[0].copy(),) * 3
        pair = metal.swiglu_rows(weights, activations, M=M, N=N, K=K)
        counters = run(pair, *W.buffers, *up, x, y, mode="count")
        check_matrix(counters, 0, own)
        check_matrix(counters, 3, own)


@pytest.mark.parametrize("share", [1, 4, 8])
def test_keys_and_values_are_read_once_for_a_group(share):
    rng, kv_heads, dim, length = np.random.default_rng(share), 2, 64, 290
    for M in (1, 5, 9):
        keys, values = random_cache(rng, kv_heads, length + M, dim, "bf16")
        q = encode(rng.normal(size=(M, share * kv_heads, dim)), "bf16")
        _, _, counters = attend(q, keys, values, length, "bf16", mode="count")
        assert counters.read_bytes[1] == keys.nbytes
        assert counters.read_bytes[2] == values.nbytes


def test_qkv_reads_weights_once():
    from test_metal_attend_rows import state_of

    rng, heads, kv_heads, dim, K, weights = np.random.default_rng(2), 4, 2, 64, 512, metal.Weights(4, 64)
    matrices = [RandomMatrix(rng, weights, "f16", n * dim, K) for n in (heads, kv_heads, kv_heads)]
    for M in (1, 9):
        x = encode(rng.normal(size=(M, K)), "f16")
        caches = [empty((kv_heads, M, dim), "f16") for _ in range(2)]
        launch = metal.qkv_rope_append(
            weights, "f16", M=M, K=K, heads=heads, kv_heads=kv_heads, head_dim=dim, capacity=M, eps=1e-5
        )
        buffers = [b for m in matrices for b in m.buffers]
        outputs = [np.ones(dim // 2, np.float32), x, x, state_of(0), empty((M, heads, dim), "f16"), *caches]
        counters = run(launch, *buffers, x, *outputs, mode="count")
        assert [counters.read_bytes[i] for i in range(9)] == pytest.approx([b.nbytes for b in buffers], rel=WITHIN - 1)

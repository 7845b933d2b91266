"""attend_rows: against softmax attention in float64, and bitwise for every number of rows."""

import numpy as np
import pytest
from specfast import _core

ISAS = _core.build_info()["isas_supported"]


def attention(q, k, v):
    """Causal attention of the last M of S positions; q (M, heads, dim), k and v (S, kv_heads, dim)."""
    M, heads, dim = q.shape
    S, kv_heads, _ = k.shape
    out = np.zeros(q.shape)
    for m in range(M):
        for head in range(heads):
            seen = S - M + m + 1
            scores = k[:seen, head * kv_heads // heads].astype(np.float64) @ q[m, head] / np.sqrt(dim)
            p = np.exp(scores - scores.max())
            out[m, head] = p @ v[:seen, head * kv_heads // heads] / p.sum()
    return out


def to_bf16(x):
    """Rounded to the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def random_case(rng, S, M, heads, kv_heads, dim):
    return (
        rng.standard_normal((M, heads, dim)).astype(np.float32),
        rng.standard_normal((S, kv_heads, dim)).astype(np.float32),
        rng.standard_normal((S, kv_heads, dim)).astype(np.float32),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("dim", [6, 16, 64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
def test_against_float64(isa, half, dim, heads, kv_heads):
    rng = np.random.default_rng(dim + heads)
    for S, M in ((1, 1), (5, 3), (256, 1), (257, 9), (600, 21), (2053, 9)):
        q, k, v = random_case(rng, S, M, heads, kv_heads, dim)
        exact = attention(*(to_bf16(x) for x in (q, k, v))) if half else attention(q, k, v)
        error = np.abs(_core.attend_rows(q, k, v, half, isa) - exact).max()
        assert error < (2**-9 * np.abs(v).max() if half else 2e-5)  # the weights are rounded too


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("S", [530, 1034])  # the rows straddle a page, and a span
def test_rows_do_not_see_each_other(isa, S):
    rng = np.random.default_rng(1)
    q, k, v = random_case(rng, S, 21, 8, 2, 64)
    together = _core.attend_rows(q, k, v, True, isa)
    for m in range(21):
        end = S - 21 + m + 1
        alone = _core.attend_rows(q[m : m + 1], k[:end], v[:end], True, isa)
        assert np.array_equal(alone[0], together[m])


def test_a_later_key_would_be_caught():
    q, k, v = random_case(np.random.default_rng(2), 40, 4, 2, 2, 16)
    k[39] *= 3
    before = _core.attend_rows(q, k, v, False)
    v[39] += 1
    after = _core.attend_rows(q, k, v, False)
    assert np.array_equal(before[:3], after[:3])
    assert not np.array_equal(before[3], after[3])

"""attend_rows: against softmax attention in float64, and bitwise for every number of rows."""

import numpy as np
import pytest
from specfast import _core

ISAS = _core.build_info()["isas_supported"]


def attention(q, k, v, window=0):
    """Causal attention of the last M of S positions; q (M, heads, dim), k and v (S, kv_heads, dim).

    Key j is seen at position i if j <= i and, with a window, i - j < window.
    """
    M, heads, dim = q.shape
    S, kv_heads, _ = k.shape
    out = np.zeros(q.shape)
    for m in range(M):
        for head in range(heads):
            i = S - M + m
            seen = slice(max(0, i - window + 1) if window else 0, i + 1)
            scores = k[seen, head * kv_heads // heads].astype(np.float64) @ q[m, head] / np.sqrt(dim)
            p = np.exp(scores - scores.max())
            out[m, head] = p @ v[seen, head * kv_heads // heads] / p.sum()
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
@pytest.mark.parametrize("kv_bits", [16, 32])
@pytest.mark.parametrize("dim", [6, 16, 64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
def test_against_float64(isa, kv_bits, dim, heads, kv_heads):
    rng = np.random.default_rng(dim + heads)
    for S, M in ((1, 1), (5, 3), (256, 1), (257, 9), (600, 21), (2053, 9)):
        q, k, v = random_case(rng, S, M, heads, kv_heads, dim)
        exact = attention(*(to_bf16(x) for x in (q, k, v))) if kv_bits == 16 else attention(q, k, v)
        error = np.abs(_core.attend_rows(q, k, v, kv_bits, isa) - exact).max()
        assert error < (2**-9 * np.abs(v).max() if kv_bits == 16 else 2e-5)  # the weights are rounded too


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_bits", [16, 32])
@pytest.mark.parametrize("window", [1, 2, 7, 255, 256, 257, 300, 1024, 1500, 5000])
def test_windows_against_float64(isa, kv_bits, window):
    rng = np.random.default_rng(window)
    for S, M in ((1, 1), (9, 9), (262, 9), (515, 16), (1300, 1), (1301, 9), (2053, 9)):
        q, k, v = random_case(rng, S, M, 4, 2, 16)
        out = _core.attend_rows(q, k, v, kv_bits, isa, window)
        rounded = [to_bf16(x) for x in (q, k, v)] if kv_bits == 16 else (q, k, v)
        tolerance = 2**-9 * np.abs(v).max() if kv_bits == 16 else 2e-5
        assert np.abs(out - attention(*rounded, window)).max() < tolerance
        if kv_bits == 32 and 1 < window < S:
            for wrong in (window - 1, window + 1):
                assert np.abs(out - attention(*rounded, wrong)).max() > tolerance


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [0, 1, 5, 14, 270, 700])
@pytest.mark.parametrize("S", [530, 1034])  # the rows straddle a page, and a span
def test_rows_do_not_see_each_other(isa, window, S):
    rng = np.random.default_rng(1)
    q, k, v = random_case(rng, S, 21, 8, 2, 64)
    together = _core.attend_rows(q, k, v, 16, isa, window)
    for m in range(21):
        end = S - 21 + m + 1
        alone = _core.attend_rows(q[m : m + 1], k[:end], v[:end], 16, isa, window)
        assert np.array_equal(alone[0], together[m])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [1, 30, 290])
def test_what_a_window_has_left_does_not_count(isa, window):
    q, k, v = random_case(np.random.default_rng(2), 600, 4, 2, 2, 16)
    before = _core.attend_rows(q, k, v, 16, isa, window)
    k[: 597 - window] *= 3
    v[: 597 - window] += 1
    assert np.array_equal(_core.attend_rows(q, k, v, 16, isa, window), before)
    v[597 - window] += 1  # what the first row, at 596, has just not left
    assert np.array_equal(_core.attend_rows(q, k, v, 16, isa, window)[1:], before[1:])
    assert not np.array_equal(_core.attend_rows(q, k, v, 16, isa, window)[0], before[0])


def test_a_later_key_would_be_caught():
    q, k, v = random_case(np.random.default_rng(2), 40, 4, 2, 2, 16)
    k[39] *= 3
    before = _core.attend_rows(q, k, v, 32)
    v[39] += 1
    after = _core.attend_rows(q, k, v, 32)
    assert np.array_equal(before[:3], after[:3])
    assert not np.array_equal(before[3], after[3])

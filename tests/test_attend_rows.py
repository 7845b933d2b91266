"""attend_rows: against softmax attention in float64, and bitwise for every number of rows."""

import numpy as np
import pytest
from specfast import _core

ISAS = _core.build_info()["isas_supported"]


def attention(q, k, v, window=0, sinks=0):
    """Causal attention of the last M of S positions; q (M, heads, dim), k and v (S, kv_heads, dim).

    Key j is seen at position i if j <= i and, with a window, i - j < window or j < sinks.
    """
    M, heads, dim = q.shape
    S, kv_heads, _ = k.shape
    out = np.zeros(q.shape)
    for m in range(M):
        for head in range(heads):
            i = S - M + m
            seen = [j for j in range(i + 1) if not window or i - j < window or j < sinks]
            scores = k[seen, head * kv_heads // heads].astype(np.float64) @ q[m, head] / np.sqrt(dim)
            p = np.exp(scores - scores.max())
            out[m, head] = p @ v[seen, head * kv_heads // heads] / p.sum()
    return out


def to_bf16(x):
    """Rounded to the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def to_int8(x):
    """Each vector rounded to integers times largest / 127, ties to even; zero if it is smaller than 1e-30."""
    largest = np.abs(x).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 1e-30)
    return np.rint(x * inverse) * (largest / np.float32(127))


def rounded(kv_bits, q, k, v):
    """What the kernel multiplies; in 8 bits, queries and weights are rounded to more than the tolerance sees."""
    if kv_bits == 8:
        return q, to_int8(k), to_int8(v)
    return tuple(to_bf16(x) for x in (q, k, v)) if kv_bits == 16 else (q, k, v)


def tolerance(kv_bits, v):
    return {8: 1e-4, 16: 2**-9, 32: 1e-5}[kv_bits] * np.abs(v).max()  # the weights are rounded too


def random_case(rng, S, M, heads, kv_heads, dim):
    return (
        rng.standard_normal((M, heads, dim)).astype(np.float32),
        rng.standard_normal((S, kv_heads, dim)).astype(np.float32),
        rng.standard_normal((S, kv_heads, dim)).astype(np.float32),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_bits", [8, 16, 32])
@pytest.mark.parametrize("dim", [6, 16, 64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
def test_against_float64(isa, kv_bits, dim, heads, kv_heads):
    rng = np.random.default_rng(dim + heads)
    for S, M in ((1, 1), (5, 3), (256, 1), (257, 9), (600, 21), (2053, 9)):
        q, k, v = random_case(rng, S, M, heads, kv_heads, dim)
        exact = attention(*rounded(kv_bits, q, k, v))
        assert np.abs(_core.attend_rows(q, k, v, kv_bits, isa) - exact).max() < tolerance(kv_bits, v)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_bits", [8, 16, 32])
@pytest.mark.parametrize("window", [1, 2, 7, 255, 256, 257, 300, 1024, 1500, 5000])
def test_windows_against_float64(isa, kv_bits, window):
    rng = np.random.default_rng(window)
    for S, M in ((1, 1), (9, 9), (262, 9), (515, 16), (1300, 1), (1301, 9), (2053, 9)):
        q, k, v = random_case(rng, S, M, 4, 2, 16)
        out = _core.attend_rows(q, k, v, kv_bits, isa, window)
        inputs, limit = rounded(kv_bits, q, k, v), tolerance(kv_bits, v)
        assert np.abs(out - attention(*inputs, window)).max() < limit
        if 1 < window < S and (kv_bits == 32 or (kv_bits == 8 and window < 300)):
            for wrong in (window - 1, window + 1):
                assert np.abs(out - attention(*inputs, wrong)).max() > limit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_bits", [8, 16, 32])
@pytest.mark.parametrize(("window", "sinks"), [(1, 1), (1, 300), (6, 4), (250, 7), (256, 256), (300, 4), (1020, 513)])
def test_sinks_against_float64(isa, kv_bits, window, sinks):
    rng = np.random.default_rng(window)
    for S, M in ((1, 1), (9, 9), (262, 9), (515, 16), (1301, 9), (2058, 21)):
        q, k, v = random_case(rng, S, M, 4, 2, 16)
        out = _core.attend_rows(q, k, v, kv_bits, isa, window, sinks)
        inputs, limit = rounded(kv_bits, q, k, v), tolerance(kv_bits, v)
        assert np.abs(out - attention(*inputs, window, sinks)).max() < limit
        if window + sinks < S and kv_bits == 32:
            for wrong in (sinks - 1, sinks + 1):
                assert np.abs(out - attention(*inputs, window, wrong)).max() > limit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_bits", [8, 16])
@pytest.mark.parametrize(
    ("window", "sinks"),
    [(0, 0), (1, 0), (5, 0), (14, 0), (270, 0), (700, 0), (5, 4), (270, 1), (8, 300), (516, 4), (523, 1)],
)
@pytest.mark.parametrize("S", [530, 1034])  # the rows straddle a page, and a span
def test_rows_do_not_see_each_other(isa, kv_bits, window, sinks, S):
    rng = np.random.default_rng(1)
    q, k, v = random_case(rng, S, 21, 8, 2, 64)
    together = _core.attend_rows(q, k, v, kv_bits, isa, window, sinks)
    for m in range(21):
        end = S - 21 + m + 1
        alone = _core.attend_rows(q[m : m + 1], k[:end], v[:end], kv_bits, isa, window, sinks)
        assert np.array_equal(alone[0], together[m])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_bits", [8, 16, 32])
def test_sinks_count_once_a_window_has_left_them(isa, kv_bits):
    q, k, v = random_case(np.random.default_rng(5), 600, 9, 2, 2, 16)
    plain = _core.attend_rows(q, k, v, kv_bits, isa)
    for window, sinks in ((600, 4), (596, 4), (1, 599), (0, 4)):  # nothing is left out, and so nothing is different
        assert np.array_equal(_core.attend_rows(q, k, v, kv_bits, isa, window, sinks), plain)
    assert not np.array_equal(_core.attend_rows(q, k, v, kv_bits, isa, 595, 4)[-1], plain[-1])
    assert np.array_equal(_core.attend_rows(q, k, v, kv_bits, isa, 595, 4)[:-1], plain[:-1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_bits", [8, 16])
@pytest.mark.parametrize("window", [1, 30, 290])
def test_what_a_window_has_left_does_not_count(isa, kv_bits, window):
    q, k, v = random_case(np.random.default_rng(2), 600, 4, 2, 2, 16)
    before = _core.attend_rows(q, k, v, kv_bits, isa, window)
    k[: 597 - window] *= 3
    v[: 597 - window] += 1
    assert np.array_equal(_core.attend_rows(q, k, v, kv_bits, isa, window), before)
    v[597 - window] += 1  # what the first row, at 596, has just not left
    assert np.array_equal(_core.attend_rows(q, k, v, kv_bits, isa, window)[1:], before[1:])
    assert not np.array_equal(_core.attend_rows(q, k, v, kv_bits, isa, window)[0], before[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32), (8, 64), (8, 128)])
def test_affine_codes_against_float64(isa, bits, group):
    from oracle.model import affine_groups

    rng = np.random.default_rng(bits)
    for S, M, dim in ((1, 1, 128), (9, 3, 128), (515, 9, 128), (1301, 4, 256), (300, 2, 32), (70, 2, 96)):
        if dim % group:
            continue
        q, k, v = random_case(rng, S, M, 4, 2, dim)
        out = _core.attend_rows(q, k, v, bits, isa, group=group)
        inputs = q, affine_groups(k, bits, group), affine_groups(v, bits, group)
        assert np.abs(out - attention(*inputs)).max() < 2e-5 * np.abs(v).max()
        if bits == 4 and S > 1:
            assert np.abs(out - attention(q, k, v)).max() > 1e-3
        for m in range(M):
            end = S - M + m + 1
            alone = _core.attend_rows(q[m : m + 1], k[:end], v[:end], bits, isa, group=group)
            assert np.array_equal(alone[0], out[m])
        windowed = _core.attend_rows(q, k, v, bits, isa, 33, 3, group)
        assert np.abs(windowed - attention(*inputs, 33, 3)).max() < 2e-5 * np.abs(v).max()


@pytest.mark.parametrize("isa", ISAS)
def test_special_vectors_in_affine_codes(isa):
    q, k, v = random_case(np.random.default_rng(3), 300, 9, 2, 2, 64)
    k[7], v[9], k[11] = 0, 0, 3  # groups of one value
    from oracle.model import affine_groups

    exact = attention(q, affine_groups(k, 8, 32), affine_groups(v, 8, 32))
    assert np.abs(_core.attend_rows(q, k, v, 8, isa, group=32) - exact).max() < 1e-4
    for broken in (k, v):
        kept, broken[295, 0, 2] = broken[295, 0, 2], np.nan
        out = _core.attend_rows(q, k, v, 8, isa, group=32)
        assert np.isnan(out[4:, 0]).any()
        assert np.isfinite(out[:4]).all()
        assert np.isfinite(out[:, 1]).all()
        broken[295, 0, 2] = kept


def test_a_later_key_would_be_caught():
    q, k, v = random_case(np.random.default_rng(2), 40, 4, 2, 2, 16)
    k[39] *= 3
    before = _core.attend_rows(q, k, v, 32)
    v[39] += 1
    after = _core.attend_rows(q, k, v, 32)
    assert np.array_equal(before[:3], after[:3])
    assert not np.array_equal(before[3], after[3])


def test_unrounded_keys_and_values_would_be_caught():
    q, k, v = random_case(np.random.default_rng(4), 600, 9, 2, 2, 64)
    out = _core.attend_rows(q, k, v, 8)
    assert np.abs(out - attention(*rounded(8, q, k, v))).max() < tolerance(8, v)
    assert np.abs(out - attention(q, k, v)).max() > 3 * tolerance(8, v)


@pytest.mark.parametrize("isa", ISAS)
def test_special_vectors_in_8_bits(isa):
    q, k, v = random_case(np.random.default_rng(3), 300, 9, 2, 2, 16)
    k[7], v[9], k[11], v[12] = 0, 0, 1e-38, 1e-38
    k[20, 0, 3], v[21, 1, 5] = 3e4, -3e4  # outliers: what lies beside them is rounded to 0
    exact = attention(q, to_int8(k), to_int8(v))
    assert np.abs(_core.attend_rows(q, k, v, 8, isa) - exact).max() < tolerance(8, v)
    for bad in (np.nan, np.inf):
        for broken in (k, v):
            kept, broken[295, 0, 2] = broken[295, 0, 2], bad
            out = _core.attend_rows(q, k, v, 8, isa)
            assert np.isnan(out[4:, 0]).all()  # the rows at 295 and later, in the head that has it
            assert np.isfinite(out[:4]).all()
            assert np.isfinite(out[:, 1]).all()
            broken[295, 0, 2] = kept
    q[3, 1, 0] = np.nan
    assert np.isnan(_core.attend_rows(q, k, v, 8, isa)[3, 1]).all()

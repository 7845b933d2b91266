"""Logits to laws against the oracle: truncations, ties, padding, extreme values, and what is refused."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import law as oracle
from specfast import _core

RELATIVE = 2e-5  # float32 arguments of exp: 2^-24 of up to 87 a rounding, a few of them
ATOL = 2e-38  # weights below exp(-87.3) are 0


def law_rows(logits, **options):
    return _core.law_rows(np.ascontiguousarray(logits, np.float32), _core.Law(**options))


def compare(logits, **options):
    options = {name: float(np.float32(x)) if isinstance(x, float) else x for name, x in options.items()}
    p = law_rows(logits, **options)
    np.testing.assert_allclose(p, oracle.law_rows(np.float32(logits), **options), RELATIVE, ATOL)
    np.testing.assert_allclose(p.sum(1, dtype=np.float64), 1, rtol=1e-6)
    return p


@pytest.mark.parametrize("V", [1, 2, 7, 64, 1000, 5003])
@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
def test_plain_softmax(V, temperature):
    compare(np.random.default_rng(V).normal(0, 3, (3, V)), temperature=temperature)


@pytest.mark.parametrize("V", [2, 40, 4096])
def test_top_k_keeps_exactly_k(V):
    logits = np.random.default_rng(V).normal(0, 3, (2, V))
    for k in sorted({1, 2, V // 10, V // 2, V - 1, V, V + 5} - {0}):
        p = compare(logits, top_k=k)
        assert (np.count_nonzero(p, 1) == min(k, V)).all()


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9, 1.0])
def test_top_k_of_a_threshold(threshold):
    V = 128_256
    k = max(1, int(np.ceil((1 - threshold) * V)))
    p = compare(np.random.default_rng(0).normal(0, 3, (1, V)), top_k=k)
    assert np.count_nonzero(p) == k


ORDERS = {
    "rising": np.sort,
    "falling": lambda x: -np.sort(-x),
    "every fourth is large": lambda x: np.where(np.arange(x.size) % 4 == 0, np.abs(x) + 20, x),
    "every fourth is small": lambda x: np.where(np.arange(x.size) % 4 == 0, -np.abs(x) - 20, x),
    "one of two values": np.sign,
    "only -inf but a few": lambda x: np.where(np.abs(x) > 3, x, -np.inf),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("k", [1, 7, 500, 2001, 8000, 19_999])
def test_top_k_in_any_order(order, k):
    logits = ORDERS[order](np.random.default_rng(0).normal(0, 1, 20_000)).astype(np.float32)[None]
    p, expected = law_rows(logits, top_k=k), oracle.law_rows(logits, top_k=k)
    assert (np.flatnonzero(p) == np.flatnonzero(expected)).all()
    np.testing.assert_allclose(p, expected, RELATIVE)


def ties(draw_from, V, seed):
    return np.random.default_rng(seed).choice(np.float32(draw_from), (4, V))


@pytest.mark.parametrize("values", [[1.0], [0.0, -0.0], [-2.5, -2.5000002, 3.0], [-1e-40, 0.0, 1e-40], [-1e30, 1e30]])
@pytest.mark.parametrize("V", [5, 33, 700])
def test_ties_keep_the_lowest_ids(values, V):
    logits = ties(values, V, V)
    for k in {1, 2, V // 3, V // 2, V - 1} - {0}:
        p = compare(logits, top_k=k)
        expected = oracle.law_rows(logits, top_k=k)
        assert (np.flatnonzero(p) == np.flatnonzero(expected > 1e-37)).all()


def test_ties_at_the_edge_of_top_p_keep_the_lowest_ids():
    p = law_rows(np.zeros((1, 8)), top_p=0.3)
    np.testing.assert_allclose(p, [[1 / 3] * 3 + [0] * 5], rtol=1e-6)
    p = law_rows([[0, 2, 1, 2, 1, 1, 0]], top_p=0.7)
    assert np.flatnonzero(p).tolist() == [1, 2, 3]


@pytest.mark.parametrize("top_p", [1e-7, 0.1, 0.5, 0.9, 0.999999, 1.0])
@pytest.mark.parametrize("V", [3, 300, 20_000])
def test_top_p(top_p, V):
    logits = np.random.default_rng(V).normal(0, 2, (2, V))
    margin = min(oracle.smallest_margin(row, temperature=1.0, top_k=0, top_p=top_p, min_p=0) for row in logits)
    p = law_rows(logits, top_p=top_p)
    if margin > 1e-6:
        compare(logits, top_p=top_p)
    full = oracle.law_rows(logits)
    for row, whole in zip(p, full, strict=True):
        held = whole[row > 0]
        assert held.sum() >= top_p - 1e-6
        assert len(held) == 1 or held.sum() - held.min() < top_p + 1e-6
        assert held.min() >= whole[row == 0].max(initial=0) * (1 - 1e-6)


@pytest.mark.parametrize("min_p", [1e-30, 0.01, 0.3, 1.0])
def test_min_p(min_p):
    logits = np.random.default_rng(5).normal(0, 2, (4, 500))
    p = compare(logits, min_p=min_p)
    ratio = np.exp(np.float32(logits) - np.float32(logits).max(1, keepdims=True))
    assert ((p > 0) == (ratio >= np.float32(min_p))).all()


@settings(max_examples=150, deadline=None)
@given(
    V=st.integers(1, 60),
    limit=st.integers(0, 70),
    seed=st.integers(0, 2**32 - 1),
    options=st.fixed_dictionaries(
        {
            "temperature": st.floats(0.1, 2.0),
            "top_k": st.integers(0, 70),
            "top_p": st.floats(0.01, 1.0),
            "min_p": st.floats(0.0, 0.9),
            "temper_last": st.booleans(),
        }
    ),
)
def test_everything_together(V, limit, seed, options):
    logits = np.float32(np.random.default_rng(seed).normal(0, 3, (1, V)))
    rounded = {name: float(np.float32(x)) if isinstance(x, float) else x for name, x in options.items()}
    visible = logits[0, : limit or V]
    if temper_last := rounded.pop("temper_last"):
        rounded |= {"temperature": 1.0, "top_k": 0}
    assume(oracle.smallest_margin(visible, **rounded) > 1e-5)
    compare(logits, vocab_limit=limit, **options)
    if temper_last and not (options["temperature"] == 1.0 or V == 1):
        whole = law_rows(logits[:, : limit or V], min_p=options["min_p"], top_p=options["top_p"])
        kept = law_rows(logits, vocab_limit=limit, **options | {"top_k": 0})
        assert (np.flatnonzero(whole) == np.flatnonzero(kept)).all()


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.9}, {"temperature": 0.3, "min_p": 0.01}])
def test_padded_rows_get_no_mass_and_are_not_looked_at(options):
    logits = np.random.default_rng(1).normal(0, 2, (3, 40))
    alone = law_rows(logits[:, :30], **options)
    for filler in (1e30, np.nan, np.inf):
        padded = logits.copy()
        padded[:, 30:] = filler
        p = law_rows(padded, vocab_limit=30, **options)
        assert (p[:, :30] == alone).all()
        assert not p[:, 30:].any()


def test_minus_infinity_gets_no_mass():
    logits = np.random.default_rng(1).normal(0, 2, (1, 40))
    logits[0, ::2] = -np.inf
    for options in ({}, {"top_k": 30}, {"top_k": 4}, {"top_p": 0.9}):
        p = compare(logits, **options)
        assert not p[0, ::2].any()


@pytest.mark.parametrize("scale", [1e-30, 1e5, 1e30, 3e38])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_extreme_logits(scale, temperature):
    logits = np.random.default_rng(2).uniform(-1, 1, (4, 100)) * scale
    p = law_rows(logits, temperature=temperature)
    assert np.isfinite(p).all()
    compare(logits, temperature=temperature, top_k=10)
    compare(logits, temperature=temperature)


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-30])
def test_temperatures_whose_inverse_overflows(temperature):
    assert law_rows([[1, 2, -np.inf, 2]], temperature=temperature).tolist() == [[0, 0.5, 0, 0.5]]


def test_far_tails_underflow_to_zero():
    p = law_rows([[0, -86, -88, -200, -3e38]])
    assert p[0, 0] == 1
    assert p[0, 1] == pytest.approx(np.exp(-86.0), rel=RELATIVE)
    assert not p[0, 2:].any()


def test_the_exponential_is_accurate():
    x = -np.linspace(0, 75, 100_001).astype(np.float32)  # beyond, probabilities become denormal
    p = law_rows(np.concatenate([np.zeros(1), x])[None]).astype(np.float64)[0]
    ratio = p[1:] / p[0] / np.exp(x.astype(np.float64))
    assert np.abs(ratio - 1).max() < 3 * 2.0**-23


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 17, 99])
@pytest.mark.parametrize("top_k", [0, 5])
def test_not_finite_logits_raise(value, place, top_k):
    logits = np.random.default_rng(2).normal(0, 1, (2, 100))
    logits[1, place] = value
    with pytest.raises(_core.NumericalError, match="row 1"):
        law_rows(logits, top_k=top_k)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.0, "top_k": 3}, {"top_k": 1}])
def test_greedy_takes_the_lowest_of_the_largest(options):
    for V in (1, 5, 1024, 5000):
        logits = np.random.default_rng(V).integers(-3, 3, (3, V)).astype(np.float32)
        p = law_rows(logits, **options)
        assert (p.argmax(1) == logits.argmax(1)).all()
        assert (np.sort(p.ravel())[-3:] == 1).all()
        assert p.sum() == 3


def test_no_allowed_token_raises():
    with pytest.raises(_core.NumericalError, match="row 0"):
        law_rows(np.full((1, 9), -np.inf))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": float("nan")},
        {"vocab_limit": -1},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(_core.SpecfastError, match=next(iter(bad))):
        _core.Law(**bad)


def test_a_row_does_not_depend_on_its_neighbours():
    logits = np.float32(np.random.default_rng(4).normal(0, 3, (5, 1111)))
    for options in ({}, {"top_k": 100}, {"top_p": 0.8}):
        together = law_rows(logits, **options)
        assert all((law_rows(row[None], **options)[0] == p).all() for row, p in zip(logits, together, strict=True))


def test_sample_is_the_inverse_cdf():
    rng = np.random.default_rng(6)
    for V in (1, 2, 9, 511, 512, 513, 4096, 10_007):
        p = (rng.integers(0, 4096, V) * (rng.random(V) < 0.7) / 2**20).astype(np.float32)
        p[rng.integers(V)] += np.float32(0.125)
        steps = np.cumsum(p.astype(np.float64))
        for u in [0.0, *rng.random(200), 1 - 2.0**-53]:
            token = _core.sample_token(p, u)
            assert token == np.searchsorted(steps, u * steps[-1], side="right") or u == 1 - 2.0**-53
            assert p[token] > 0


@pytest.mark.parametrize("V", [1, 5, 600, 128_256])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-53])
def test_sample_never_returns_a_token_without_mass(V, u):
    for only in {0, V // 2, V - 1}:
        for mass in (1.0, 1e-38, 1e-45):
            p = np.zeros(V, np.float32)
            p[only] = mass
            assert _core.sample_token(p, u) == only


def test_sample_without_mass_raises():
    for p in (np.zeros(5, np.float32), np.full(5, np.nan, np.float32)):
        with pytest.raises(_core.NumericalError):
            _core.sample_token(p, 0.5)

"""The token rule writes the target's law: by exact enumeration of oracle and compiled rule, and by chi-square.

Every check is also run on rules that are subtly wrong, and has to reject them.
"""

import os

import numpy as np
import pytest
from oracle import verify as oracle
from oracle.chi_square import excess
from random_laws import PAIRS, SIZES, trees
from specfast import _core

FULL = os.environ.get("SPECFAST_FULL") == "1"
EXACT = 1e-12
DRAFT, ACCEPT, RESIDUAL = 0, 1, 2


def kernel(p, q, tokens, u, lenience):
    """The compiled rule, called like the oracle's."""
    return _core.verify_tokens(np.float32(p), np.float32(q), np.array(tokens, np.int32), np.array(u), lenience)


def kernel_without_q(p, q, tokens, u, lenience):
    return _core.verify_tokens(np.float32(p), None, np.array(tokens, np.int32), np.array(u), lenience)


def distance(rule, p, q, lenience=1.0):
    """Total variation between the text one round writes and the target's."""
    return np.abs(oracle.text_law(rule, p, q, lenience) - oracle.joint(p)).sum() / 2


RULES = {"oracle": oracle.verify_tokens, "kernel": kernel}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("V", "gamma"), SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_the_text_is_the_targets_by_enumeration(rule, pair, V, gamma):
    for seed in range(4 if FULL else 1):
        for lenience in (1.0, 0.75, 0.5) if V**gamma <= 16 else (1.0, 0.75):
            p, q = trees(pair, V, gamma, seed)
            assert distance(RULES[rule], p, q, lenience) < EXACT


@pytest.mark.parametrize("rule", [oracle.verify_tokens, kernel, kernel_without_q])
@pytest.mark.parametrize("lenience", [1.0, 0.6])
def test_a_certain_drafter_needs_no_law(rule, lenience):
    p, q = trees("certain draft", 4, 3, 5)
    assert distance(rule, p, q, lenience) < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lenience", [1.25, 2.0])
@pytest.mark.parametrize("pair", ["random", "tied", "nearly certain"])
def test_lenience_above_one_gives_no_token_more_than_its_bound(rule, lenience, pair):
    gamma = 2
    p, q = trees(pair, 3, gamma, 3)
    text = oracle.text_law(RULES[rule], p, q, lenience)
    assert text.sum() == pytest.approx(1, abs=EXACT)
    first = text.reshape(3, -1).sum(1)
    assert (first <= lenience * p[0] + EXACT).all()
    assert (text <= lenience**gamma * oracle.joint(p) + EXACT).all()


# --- rules that look right and are not ---


def residual_is_p(p, q, tokens, u, lenience):
    """Draws from p after a rejection."""
    tau, token = oracle.verify_tokens(p, q, tokens, u, lenience)
    return tau, oracle.inverse_cdf(p[tau], u[-1]) if tau < len(tokens) else token


def accepts_by_equality_with_the_arg_max(p, q, tokens, u, lenience):
    """Keeps a token that is the target's most likely one."""
    for i, x in enumerate(tokens):
        if x != np.argmax(p[i]):
            return i, oracle.inverse_cdf(p[i], u[-1])
    return len(tokens), oracle.inverse_cdf(p[-1], u[-1])


def residual_reuses_the_accept_draw(p, q, tokens, u, lenience):
    """One draw both rejects and chooses the replacement."""
    tau, _ = oracle.verify_tokens(p, q, tokens, u, lenience)
    return oracle.verify_tokens(p, q, tokens, np.append(u[:-1], u[tau]), lenience)


def flat_q(p, q, tokens, u, lenience):
    """The ratio uses a q that was not the q sampled from."""
    return oracle.verify_tokens(p, np.full_like(q, 1 / q.shape[1]), tokens, u, lenience)


def plain_residual(p, q, tokens, u, lenience):
    """Lenience below 1 with the residual of lenience 1."""
    tau, token = oracle.verify_tokens(p, q, tokens, u, lenience)
    if tau == len(tokens):
        return tau, token
    return tau, oracle.inverse_cdf(oracle.residual(p[tau], q[tau]), u[-1])


def accepts_everything(p, q, tokens, u, lenience):
    """What a ratio that has underflowed does."""
    return len(tokens), oracle.inverse_cdf(p[-1], u[-1])


WRONG = [
    (residual_is_p, 1.0),
    (accepts_by_equality_with_the_arg_max, 1.0),
    (flat_q, 1.0),
    (plain_residual, 0.75),
    (accepts_everything, 1.0),
]


@pytest.mark.parametrize(("rule", "lenience"), WRONG)
@pytest.mark.parametrize("gamma", [1, 2])
def test_enumeration_rejects_wrong_rules(rule, lenience, gamma):
    worst = max(distance(rule, *trees("random", 4, gamma, seed), lenience) for seed in range(4))
    assert worst > 1e-2


def test_enumeration_rejects_a_reused_draw():
    p, q = (laws[0] for laws in trees("random", 4, 1, 2))
    p = np.array([p, p])

    def written(rule):
        text = np.zeros(4)
        for x in range(4):
            points = oracle.breakpoints(p, q[None], [x], 1.0)
            everywhere = [np.concatenate(points)] * 2
            law = oracle.verdict_law(rule, p, q[None], [x], points=everywhere)
            text[x] += q[x] * law[1].sum()
            text += q[x] * law[0]
        return text

    assert np.abs(written(oracle.verify_tokens) - p[0]).max() < EXACT
    assert np.abs(written(residual_reuses_the_accept_draw) - p[0]).max() > 1e-3


# --- the compiled rule against the oracle ---


def real_laws(rng, rows, V, spread):
    logits = rng.normal(0, spread, (rows, V)).astype(np.float32)
    return _core.law_rows(logits, _core.Law(top_k=int(rng.integers(1, V + 1))))


@pytest.mark.parametrize("V", [1, 2, 5, 100, 511, 513, 4096, 5000])
@pytest.mark.parametrize("lenience", [0.5, 1.0, 1.5])
def test_equals_the_oracle(V, lenience):
    rng = np.random.default_rng(V)
    seen = set()
    for _ in range(400 if FULL else 60):
        gamma = int(rng.integers(1, 8))
        q = real_laws(rng, gamma, V, 2)
        p = np.float32(0.7) * q + np.float32(0.3) * real_laws(rng, gamma, V, 2)
        p = np.concatenate([p, real_laws(rng, 1, V, 2)])
        tokens = [_core.sample_token(row, rng.random()) for row in q]
        u = rng.random(gamma + 1)
        with_q = rng.random() < 0.7
        given = q.astype(np.float64) if with_q else oracle.one_hot(tokens, V)
        expected = oracle.verify_tokens(p.astype(np.float64), given, tokens, u, lenience)
        assert _core.verify_tokens(p, q if with_q else None, np.array(tokens, np.int32), u, lenience) == expected
        seen.add(expected[0] == gamma)
    assert True in seen


@pytest.mark.parametrize("extra", [1, 8, 300])
def test_a_shorter_q_has_no_mass_beyond_its_end(extra):
    rng = np.random.default_rng(extra)
    V, gamma = 600, 3
    for _ in range(50):
        q, p = real_laws(rng, gamma, V - extra, 2), real_laws(rng, gamma + 1, V, 2)
        padded = np.pad(q, ((0, 0), (0, extra)))
        tokens = np.array([_core.sample_token(row, rng.random()) for row in q], np.int32)
        u = rng.random(gamma + 1)
        assert _core.verify_tokens(p, q, tokens, u) == _core.verify_tokens(p, padded, tokens, u)
        assert _core.verify_tokens(p, q, tokens, u) == oracle.verify_tokens(np.float64(p), padded, tokens, u)


def sampled_texts(p, q, passed_q, draws, residual_purpose=RESIDUAL):
    """Counts of the first two tokens over many rounds of keyed draws. p: three laws, q: two, whatever was written."""
    V = p.shape[1]
    counts = np.zeros((V, V))
    for i in range(draws):
        tokens = np.array([_core.sample_token(q[k], _core.uniform(1, i, k, DRAFT)) for k in range(2)], np.int32)
        last = 2 if residual_purpose == RESIDUAL else 0
        u = np.array([*(_core.uniform(1, i, k, ACCEPT) for k in range(2)), _core.uniform(1, i, last, residual_purpose)])
        tau, token = _core.verify_tokens(p, passed_q, tokens, u)
        text = [*tokens[:tau], token]
        if len(text) == 1:  # the next round is plain
            text.append(_core.sample_token(p[1], _core.uniform(2, i, 0, RESIDUAL)))
        counts[text[0], text[1]] += 1
    return counts


@pytest.mark.parametrize("V", [4, 50])
def test_keyed_draws_follow_the_target_by_chi_square(V):
    rng = np.random.default_rng(V)
    p = _core.law_rows(rng.normal(0, 1, (3, V)).astype(np.float32), _core.Law())
    q = _core.law_rows(rng.normal(0, 1, (2, V)).astype(np.float32), _core.Law())
    draws = 400_000 if FULL else 30_000
    law = np.float64(p[0])[:, None] * np.float64(p[1])
    assert excess(sampled_texts(p, q, q, draws), law) < 1
    flat = np.full_like(q, 1 / V)
    assert excess(sampled_texts(p, q, flat, draws), law) > 1  # the q passed is not the q drawn from
    assert excess(sampled_texts(p, q, q, draws, ACCEPT), law) > 1  # the first accept draw also draws the residual


# --- traps seen in real engines ---

ALMOST_ONE = 1 - 2.0**-53


def verify(p, q, tokens, u, lenience=1.0):
    q = None if q is None else np.array(q, np.float32)
    return _core.verify_tokens(np.array(p, np.float32), q, np.array(tokens, np.int32), np.array(u, float), lenience)


def test_a_token_without_target_mass_is_never_kept():
    assert verify([[0, 1], [1, 0]], [[1, 0]], [0], [0.0, 0.5]) == (0, 1)
    assert verify([[0, 1], [1, 0]], None, [0], [0.0, 0.5]) == (0, 1)
    assert verify([[0, 1], [1, 0]], [[0, 1]], [0], [0.0, 0.5]) == (0, 1)  # also when the draft had none for it


def test_equal_laws_are_never_rejected():
    p = [[0.25, 0.75], [0.5, 0.5]]
    for x in (0, 1):
        assert verify(p, p[:1], [x], [ALMOST_ONE, 0.0]) == (1, 0)


@pytest.mark.parametrize("V", [3, 700, 128_256])
def test_u_close_to_one_stays_inside_the_vocabulary(V):
    p = np.zeros((2, V), np.float32)
    p[:, : V - 1] = 1 / (V - 1)  # the last id is padding
    q = np.zeros((1, V), np.float32)
    q[0, 0] = 1
    for u in (0.0, ALMOST_ONE):
        tau, token = _core.verify_tokens(p, q, np.zeros(1, np.int32), np.array([u, ALMOST_ONE]))
        assert (tau, token) == ((1, V - 2) if u == 0 else (0, V - 2))


@pytest.mark.parametrize("tiny", [6e-8, 1e-20, 1e-38, 1e-45])
def test_tiny_probabilities_are_compared_not_flushed(tiny):
    """In float16 both sides underflow to 0 and everything, or nothing, is accepted."""
    p, q = [[1, tiny], [1, 0]], [[0.5, 0.5]]
    assert verify(p, q, [1], [0.5, 0.5]) == (0, 0)
    assert verify([[1, tiny], [1, 0]], [[1, 8 * tiny]], [1], [0.1, 0.5])[0] == 1
    assert verify([[1, tiny], [1, 0]], [[1, 8 * tiny]], [1], [0.2, 0.5])[0] == 0


def test_an_empty_residual_falls_back_to_p():
    """q >= p everywhere: rounding left q too much mass, and the rejected token cannot be drawn from max(p - q, 0)."""
    p, q = [[0.25, 0.75, 0], [1, 0, 0]], [[0.5, 0.75, 0]]
    assert verify(p, q, [0], [0.9, 0.1]) == (0, 0)
    assert verify(p, q, [0], [0.9, 0.9]) == (0, 1)
    assert verify(p, q, [0], [0.9, ALMOST_ONE]) == (0, 1)


@pytest.mark.parametrize("lenience", [0.5, 1.0, 2.0])
def test_nan_in_q_rejects_and_falls_back_to_p(lenience):
    for q in ([[np.nan, 0.5, 0.5]], [[0.5, np.nan, 0.5]], [[np.nan] * 3]):
        tau, token = verify([[0.25, 0, 0.75], [1, 0, 0]], q, [1], [0.0, 0.3], lenience)
        assert (tau, token) == (0, 2)


def test_a_target_without_mass_raises():
    for p in ([[np.nan, np.nan], [1, 0]], [[0, 0], [1, 0]]):
        with pytest.raises(_core.NumericalError, match="row 0"):
            verify(p, [[0.5, 0.5]], [0], [0.5, 0.5])


def test_a_certain_draft_leaves_the_others_untouched():
    """1 - p(x) as small as 2^-24 keeps its relative precision."""
    eps = 2.0**-24
    p = [[1 - eps, eps, 0], [1, 0, 0]]
    assert verify(p, None, [0], [ALMOST_ONE, 0.5]) == (0, 1)
    assert verify(p, None, [0], [0.5, 0.5]) == (1, 0)


@pytest.mark.parametrize(
    ("p", "q", "tokens", "u"),
    [
        ((2, 4), (1, 4), (1,), (1,)),
        ((1, 4), (1, 4), (1,), (2,)),
        ((2, 4), (2, 4), (1,), (2,)),
        ((4,), (1, 4), (1,), (2,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(p, q, tokens, u):
    with pytest.raises(_core.ShapeError):
        _core.verify_tokens(np.ones(p, np.float32), np.ones(q, np.float32), np.zeros(tokens, np.int32), np.zeros(u))


@pytest.mark.parametrize(("token", "u", "lenience"), [(4, 0.5, 1.0), (-1, 0.5, 1.0), (0, 1.0, 1.0), (0, 0.5, 0.0)])
def test_values_out_of_range_are_refused(token, u, lenience):
    with pytest.raises(_core.ShapeError):
        verify([[0.25] * 4] * 2, [[0.25] * 4], [token], [u, 0.5], lenience)

"""The block rule writes the target's law and keeps no fewer tokens than the token rule, by exact enumeration."""

import itertools

import numpy as np
import pytest
from oracle import verify as oracle
from random_laws import PAIRS, SIZES, trees
from specfast import ConfigurationError, _core, ops

EXACT = 1e-12


def kernel(p, q, tokens, u, lenience=1.0):
    return ops.verify_tokens(np.float32(p), np.float32(q), np.array(tokens, np.int32), np.array(u), rule="block")


def kernel_without_q(p, q, tokens, u, lenience=1.0):
    return ops.verify_tokens(np.float32(p), None, np.array(tokens, np.int32), np.array(u), rule="block")


RULES = {"oracle": oracle.verify_block, "kernel": kernel}


def distance(rule, p, q):
    """Total variation between the text one round writes and the target's."""
    return np.abs(oracle.text_law(rule, p, q, 1.0, oracle.block_breakpoints) - oracle.joint(p)).sum() / 2


def kept(rule, breakpoints, p, q):
    """The expected tau of one round."""
    gamma, V = len(q), p[0].size
    drafted, expected = oracle.joint(q), 0.0
    for tokens in itertools.product(range(V), repeat=gamma):
        if drafted[tokens] == 0:
            continue
        given_p = np.array([p[k][tokens[:k]] for k in range(gamma + 1)])
        given_q = np.array([q[k][tokens[:k]] for k in range(gamma)])
        points = breakpoints(given_p, given_q, tokens, 1.0)
        law = oracle.verdict_law(rule, given_p, given_q, tokens, points=points)
        expected += drafted[tokens] * (law.sum(1) @ np.arange(gamma + 1))
    return expected


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("V", "gamma"), SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_the_text_is_the_targets_by_enumeration(rule, pair, V, gamma):
    assert distance(RULES[rule], *trees(pair, V, gamma, 0)) < EXACT


@pytest.mark.parametrize("rule", [oracle.verify_block, kernel_without_q])
def test_of_certain_tokens_it_keeps_what_the_token_rule_keeps(rule):
    """The joint law of tau and the next token is the same, so that no law q is needed."""
    p, _ = trees("random", 3, 3, 5)
    for tokens in itertools.product(range(3), repeat=3):
        rows, q = np.array([p[k][tokens[:k]] for k in range(4)]), oracle.one_hot(tokens, 3)
        points = [
            np.append(a, b)
            for a, b in zip(
                oracle.block_breakpoints(rows, q, tokens), oracle.breakpoints(rows, q, tokens, 1.0), strict=True
            )
        ]
        law = oracle.verdict_law(rule, rows, q, tokens, points=points)
        assert np.abs(law - oracle.verdict_law(oracle.verify_tokens, rows, q, tokens)).max() < EXACT


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("V", "gamma"), [(2, 1), (2, 3), (3, 2), (4, 2)])
def test_it_keeps_no_fewer_than_the_token_rule(pair, V, gamma):
    for seed in range(3):
        p, q = trees(pair, V, gamma, seed)
        by_block = kept(kernel, oracle.block_breakpoints, p, q)
        by_token = kept(oracle.verify_tokens, oracle.breakpoints, p, q)
        assert by_block >= by_token - EXACT
        if gamma == 1:
            assert by_block == pytest.approx(by_token, abs=EXACT)


def test_the_papers_example():
    """Sun et al. 2024, section 2: 11/9 tokens in expectation where the token rule keeps 10/9."""
    p = [np.broadcast_to([1 / 3, 2 / 3], (2,) * k + (2,)) for k in range(3)]
    q = [np.broadcast_to([2 / 3, 1 / 3], (2,) * k + (2,)) for k in range(2)]
    assert kept(oracle.verify_block, oracle.block_breakpoints, p, q) == pytest.approx(11 / 9, abs=EXACT)
    assert kept(kernel, oracle.block_breakpoints, p, q) == pytest.approx(11 / 9, abs=1e-6)
    assert kept(oracle.verify_tokens, oracle.breakpoints, p, q) == pytest.approx(10 / 9, abs=EXACT)


# --- rules that look right and are not ---


def stops_at_the_first_prefix_that_fails(p, q, tokens, u, lenience=1.0):
    c, h = oracle.prefixes(p, q, tokens)
    tau = next((i for i in range(len(tokens)) if not u[i] < h[i + 1]), len(tokens))
    left = p[tau] if tau == len(tokens) else oracle.residual(c[tau] * p[tau], q[tau])
    return tau, oracle.inverse_cdf(left, u[-1])


def draws_the_token_rules_residual(p, q, tokens, u, lenience=1.0):
    tau, token = oracle.verify_block(p, q, tokens, u)
    return tau, token if tau == len(tokens) else oracle.inverse_cdf(oracle.residual(p[tau], q[tau]), u[-1])


def uses_the_token_rules_test(p, q, tokens, u, lenience=1.0):
    c, _ = oracle.prefixes(p, q, tokens)
    tau, token = oracle.verify_tokens(p, q, tokens, u)
    return tau, token if tau == len(tokens) else oracle.inverse_cdf(oracle.residual(c[tau] * p[tau], q[tau]), u[-1])


def passes_by_c(p, q, tokens, u, lenience=1.0):
    c, _ = oracle.prefixes(p, q, tokens)
    tau = max(i for i in range(len(tokens) + 1) if i == 0 or u[i - 1] < c[i])
    left = p[tau] if tau == len(tokens) else oracle.residual(c[tau] * p[tau], q[tau])
    return tau, oracle.inverse_cdf(left, u[-1])


def everywhere(p, q, tokens, lenience=1.0):
    """Breakpoints of any rule above: in every u those of both rules."""
    c, h = oracle.prefixes(p, q, tokens)
    tests = np.concatenate([c, h, *oracle.breakpoints(p, q, tokens, 1.0)[:-1]])
    steps = [x[-1] for x in (oracle.breakpoints(p, q, tokens, 1.0), oracle.block_breakpoints(p, q, tokens))]
    return [*([tests] * len(tokens)), np.concatenate(steps)]


WRONG = [
    stops_at_the_first_prefix_that_fails,
    draws_the_token_rules_residual,
    uses_the_token_rules_test,
    passes_by_c,
]


@pytest.mark.parametrize("rule", WRONG)
def test_enumeration_rejects_wrong_rules(rule):
    def worst(rule):
        found = []
        for seed in range(4):
            p, q = trees("random", 3, 2, seed)
            found.append(np.abs(oracle.text_law(rule, p, q, 1.0, everywhere) - oracle.joint(p)).sum() / 2)
        return max(found)

    assert worst(oracle.verify_block) < EXACT
    assert worst(rule) > 1e-3


# --- the compiled rule against the oracle, and at its edges ---


@pytest.mark.parametrize("V", [1, 2, 5, 100, 513, 5000])
def test_equals_the_oracle(V):
    rng = np.random.default_rng(V)
    seen = set()
    for _ in range(60):
        gamma = int(rng.integers(1, 8))
        q = _core.law_rows(
            rng.normal(0, 2, (gamma, V)).astype(np.float32), _core.Law(top_k=int(rng.integers(1, V + 1)))
        )
        p = _core.law_rows(rng.normal(0, 2, (gamma + 1, V)).astype(np.float32), _core.Law())
        p[:gamma] = np.float32(0.7) * q + np.float32(0.3) * p[:gamma]
        tokens = np.array([_core.sample_token(row, rng.random()) for row in q], np.int32)
        u = rng.random(gamma + 1)
        expected = oracle.verify_block(np.float64(p), np.float64(q), tokens, u)
        assert _core.verify_tokens(p, q, tokens, u, rule="block") == expected
        seen.add(expected[0] == gamma)
    assert True in seen


def test_a_token_without_target_mass_ends_every_prefix():
    p = np.array([[0, 1], [1, 0], [1, 0]])
    assert kernel(p, [[0.5, 0.5], [0.5, 0.5]], [0, 0], [0.0, 0.0, 0.5]) == (0, 1)


def test_equal_laws_are_never_rejected():
    p = np.array([[0.25, 0.75]] * 3)
    for tokens in itertools.product((0, 1), repeat=2):
        assert kernel(p, p[:2], tokens, [1 - 2.0**-53] * 2 + [0.0]) == (2, 0)


def test_nan_in_q_ends_every_prefix():
    p, tokens = np.float32([[0.25, 0.75], [1, 0]]), np.zeros(1, np.int32)
    for q in ([[np.nan, 0.5]], [[0.5, np.nan]]):
        verdict = _core.verify_tokens(p, np.float32(q), tokens, np.array([0.0, 0.5]), rule="block")
        assert verdict in ((0, 1), (1, 0))
    q = np.full((1, 2), np.nan, np.float32)
    assert _core.verify_tokens(p, q, tokens, np.array([0.0, 0.1]), rule="block") == (0, 0)


P, Q, TOKENS, U = [[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.1]], [0], [0.1, 0.2]


@pytest.mark.parametrize("rule", [None, "token", "block"])
def test_lists_are_taken_for_arrays(rule):
    arrays = np.float32(P), np.float32(Q), np.int32(TOKENS), np.array(U)
    assert ops.verify_tokens(P, Q, TOKENS, U, rule=rule) == ops.verify_tokens(*arrays, rule=rule)
    assert ops.verify_tokens(P[:1], None, [], [0.7], rule=rule) == (0, 1)
    assert ops.couple_tokens(P, TOKENS, seed=3, position=4) == ops.couple_tokens(
        arrays[0], arrays[2], seed=3, position=4
    )


@pytest.mark.parametrize("convert", [np.asarray, list], ids=["arrays", "lists"])
@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("q", [[np.nan, 0.5]], "row 0 of q"),
        ("q", [[-0.1, 0.5]], "row 0 of q"),
        ("q", [[0.0, 0.0]], "row 0 of q"),
        ("q", [[np.inf, 0.5]], "row 0 of q"),
        ("p", [[0.5, 0.5], [np.inf, 0.5]], "row 1 of p"),
        ("p", [[0.5, 0.5], [-0.5, 0.5]], "row 1 of p"),
    ],
)
def test_rows_that_are_no_laws_are_refused(name, rows, words, convert):
    laws = {"p": np.float32(P), "q": np.float32(Q), name: convert(np.float32(rows))}
    with pytest.raises(_core.ShapeError, match=words):
        ops.verify_tokens(**laws, tokens=np.int32(TOKENS), u=np.array(U))
    if name == "p":
        with pytest.raises(_core.ShapeError, match=words):
            ops.couple_tokens(laws["p"], np.int32(TOKENS), seed=0, position=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"p": None}, "p must be an array of float32"),
        ({"p": "x"}, "p must be an array of float32"),
        ({"p": [[0.5, 0.5], [0.5]]}, "p must be an array of float32"),
        ({"tokens": [0.5]}, "tokens must be an array of int32"),
        ({"tokens": [2**40]}, "tokens must be an array of int32"),
        ({"u": None}, "u must be an array of float64"),
    ],
)
def test_what_becomes_no_array_is_refused(changes, words):
    with pytest.raises(_core.ShapeError, match=words):
        ops.verify_tokens(**{"p": P, "q": Q, "tokens": TOKENS, "u": U, **changes})


@pytest.mark.parametrize("value", [-1, 2**64, 1.5, "a", None, True])
def test_keys_out_of_range_are_refused(value):
    with pytest.raises(ConfigurationError, match="seed is"):
        ops.couple_tokens(P, TOKENS, seed=value, position=0)
    with pytest.raises(ConfigurationError, match="position is"):
        ops.couple_tokens(P, TOKENS, seed=0, position=value)


@pytest.mark.parametrize("lenience", [0, -1.0, np.nan, np.inf, "x", None, True, 10**400])
def test_a_lenience_that_is_no_positive_number_is_refused(lenience):
    with pytest.raises(ConfigurationError, match="lenience is"):
        ops.verify_tokens(P, Q, TOKENS, U, lenience=lenience)


def test_lenience_is_refused():
    p, q = np.full((2, 2), 0.5, np.float32), np.full((1, 2), 0.5, np.float32)
    tokens, u = np.zeros(1, np.int32), np.full(2, 0.5)
    for rule, lenience in (("block", 0.9), ("block", 2.0), ("coupled", 1.0), ("typical", 1.0)):
        with pytest.raises(ConfigurationError):
            ops.verify_tokens(p, q, tokens, u, rule=rule, lenience=lenience)
    assert ops.verify_tokens(p, q, tokens, u, lenience=2.0) == ops.verify_tokens(
        p, q, tokens, u, rule="token", lenience=2.0
    )
    with pytest.raises(_core.ShapeError):
        _core.verify_tokens(p, q, tokens, u, 2.0, rule="block")

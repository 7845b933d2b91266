"""verify_logits gives the verdict of law_rows and verify_tokens, to the bit, on every instruction set and thread count."""

import os
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specfast import _core

FULL = os.environ.get("SPECFAST_FULL") == "1"
ISAS = _core.build_info()["isas_supported"]
BEST = ISAS[-1]


@pytest.fixture(autouse=True, scope="module")
def restore_threads():
    threads = _core.num_threads()
    yield
    _core.set_num_threads(threads)


@dataclass
class Case:
    logits: np.ndarray
    q: np.ndarray | None
    tokens: np.ndarray
    u: np.ndarray
    lenience: float = 1.0
    options: dict = field(default_factory=dict)

    def expected(self, isa="scalar"):
        """By writing every law in full."""
        p = _core.law_rows(self.logits, _core.Law(**self.options), isa)
        return _core.verify_tokens(p, self.q, self.tokens, self.u, self.lenience, isa)

    def verdict(self, isa=None):
        return _core.verify_logits(
            self.logits, self.q, self.tokens, self.u, _core.Law(**self.options), self.lenience, isa
        )

    def check(self):
        expected = self.expected()
        for threads in (1, 2, 3):
            _core.set_num_threads(threads)
            for isa in ISAS:
                assert self.verdict(isa) == expected


LAWS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0]),
        "top_k": st.integers(0, 700),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "vocab_limit": st.integers(0, 700),
        "temper_last": st.booleans(),
    },
)
SPREADS = {
    "far apart": lambda rng, shape: rng.normal(0, 5, shape),
    "close": lambda rng, shape: rng.normal(0, 0.3, shape),
    "tied": lambda rng, shape: rng.choice([-1.5, -0.0, 0.0, 1.0], shape),
    "mostly forbidden": lambda rng, shape: np.where(rng.random(shape) < 0.8, -np.inf, rng.normal(0, 2, shape)),
    "extreme": lambda rng, shape: rng.uniform(-3e38, 3e38, shape),
}


def random_case(rng, V, gamma, spread, options, *, with_q, lenience=1.0, narrower=0):
    """Tokens are drawn from q, so that most of them are kept; draws lie on and beside the places where a verdict turns."""
    logits = np.float32(SPREADS[spread](rng, (gamma + 1, V)))
    visible = options.get("vocab_limit") or V
    logits[:, rng.integers(min(visible, V))] = rng.normal(0, 1)
    Vq = max(1, V - narrower)
    drafted = np.where(np.isinf(logits), -9, logits)[:gamma, :Vq] * np.float32(0.8) + rng.normal(0, 0.5, (gamma, Vq))
    q = _core.law_rows(np.float32(np.clip(drafted, -3e38, 3e38)), _core.Law())
    tokens = np.array([_core.sample_token(row, rng.random() * 0.9) for row in q], np.int32)
    u = rng.random(gamma + 1) * rng.choice([1, 0.5, 0.01])
    p = _core.law_rows(logits, _core.Law(**options)).astype(np.float64)
    i = int(rng.integers(gamma + 1))
    if rng.random() < 0.6:  # where token i is just kept or just rejected, or the draw just reaches another token
        if i < gamma:
            turn = lenience * p[i, tokens[i]] / (float(q[i, tokens[i]]) if with_q else 1.0)
        else:
            turn = rng.choice(np.cumsum(p[i]) / p[i].sum())
        u[i] = np.clip(turn + rng.integers(-2, 3) * np.spacing(turn), 0, 1 - 2.0**-53)
    return Case(logits, q if with_q else None, tokens, u, lenience, options)


CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "V": st.one_of(st.integers(1, 40), st.integers(41, 700)),
    "gamma": st.integers(0, 6),
    "spread": st.sampled_from(list(SPREADS)),
    "options": LAWS,
    "with_q": st.booleans(),
    "lenience": st.sampled_from([1.0, 1.0, 0.5, 0.9, 1.5, 4.0]),
    "narrower": st.sampled_from([0, 0, 1, 7, 100]),
}


@settings(max_examples=3000 if FULL else 400, deadline=None)
@given(**CASES)
def test_equals_the_rule_on_full_laws(seed, V, gamma, spread, options, with_q, lenience, narrower):
    rng = np.random.default_rng(seed)
    random_case(rng, V, gamma, spread, options, with_q=with_q, lenience=lenience, narrower=narrower).check()


LARGE = [
    {},
    {"temperature": 0.6, "vocab_limit": 128_000},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    {"top_k": 12_826},
    {"top_k": 12_826, "top_p": 0.9, "min_p": 0.001},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("options", LARGE, ids=str)
@pytest.mark.parametrize("with_q", [True, False])
def test_a_vocabulary_of_128256(options, with_q):
    rng = np.random.default_rng(len(str(options)))
    for V, narrower in ((128_256, 0), (128_256, 256), (151_937, 1)):
        for spread in ("far apart", "close", "tied") if FULL else ("far apart", "tied"):
            gamma = int(rng.integers(1, 6))
            lenience = float(rng.choice([0.7, 1.0, 1.3]))
            random_case(rng, V, gamma, spread, options, with_q=with_q, lenience=lenience, narrower=narrower).check()


def test_every_outcome_occurs():
    """The cases above reject at every place, keep everything, and hold draws from residual and bonus."""
    rng = np.random.default_rng(0)
    seen = [random_case(rng, 50, 3, "close", {}, with_q=True).expected()[0] for _ in range(200)]
    assert {0, 1, 2, 3} == set(seen)


WRONG = {
    "another temperature": lambda c: Case(
        c.logits, c.q, c.tokens, c.u, c.lenience, c.options | {"temperature": 1 + 2.0**-20}
    ),
    "one candidate fewer": lambda c: Case(
        c.logits, c.q, c.tokens, c.u, c.lenience, c.options | {"top_k": c.options["top_k"] - 1}
    ),
    "no lenience": lambda c: Case(c.logits, c.q, c.tokens, c.u, 1.0, c.options),
    "q of the row before": lambda c: Case(c.logits, np.roll(c.q, 1, 0), c.tokens, c.u, c.lenience, c.options),
    "one draw for everything": lambda c: Case(
        c.logits, c.q, c.tokens, np.append(c.u[:-1], c.u[0]), c.lenience, c.options
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_comparison_notices_what_is_wrong(wrong):
    rng = np.random.default_rng(1)
    cases = [random_case(rng, 60, 3, "close", {"top_k": 40}, with_q=True, lenience=0.8) for _ in range(200)]
    assert all(case.verdict() == case.expected() for case in cases)
    assert any(WRONG[wrong](case).verdict() != case.expected() for case in cases)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [*LARGE, {"temperature": 1.7}], ids=str)
def test_laws_have_the_same_bits_on_every_isa(isa, options):
    rng = np.random.default_rng(3)
    for V in (1, 15, 17, 255, 257, 1000, 128_256):
        for spread in SPREADS.values():
            logits = np.float32(spread(rng, (2, V)))
            logits[:, 0] = 0.5
            law = _core.Law(**options)
            p = _core.law_rows(logits, law, isa)
            assert p.tobytes() == _core.law_rows(logits, law, "scalar").tobytes()
            u = rng.random()
            assert _core.sample_token(p[0], u, isa) == _core.sample_token(p[0], u, "scalar")


def decided_at(tau, **options):
    """A case with five tokens whose first rejected one is at tau."""
    rng = np.random.default_rng(tau)
    logits = rng.normal(0, 1, (6, 300)).astype(np.float32)
    tokens = logits.argmax(1)[:5].astype(np.int32)
    u = np.full(6, 1e-6)
    if tau < 5:
        logits[tau, tokens[tau]] = -np.inf
    return Case(logits, None, tokens, u, 1.0, options)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, "nothing allowed"])
@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.9}, {"temperature": 0.0}], ids=str)
def test_rows_that_have_no_law(value, options):
    for isa in ISAS:
        for threads in (1, 2, 3):
            _core.set_num_threads(threads)
            for tau in (0, 2, 5):
                case = decided_at(tau, **options)
                good = case.verdict(isa)
                assert good[0] == tau
                for row in range(6):
                    bad = decided_at(tau, **options)
                    if value == "nothing allowed":
                        bad.logits[row] = -np.inf
                    else:
                        bad.logits[row, (row * 77) % 300] = value
                    if row > tau:  # it is not looked at
                        assert bad.verdict(isa) == good
                        continue
                    with pytest.raises(_core.NumericalError) as here:
                        bad.verdict(isa)
                    with pytest.raises(_core.NumericalError) as there:
                        _core.law_rows(bad.logits, _core.Law(**options))
                    assert str(here.value) == str(there.value)
                    assert f"row {row}" in str(here.value)


def test_values_beyond_the_limit_are_not_looked_at():
    for options in ({}, {"top_k": 5}, {"min_p": 0.1}):
        case = decided_at(5, vocab_limit=290, **options)
        expected = case.verdict()
        case.logits[:, 290:] = np.nan
        assert case.verdict() == expected


@pytest.mark.parametrize(
    ("logits", "q", "tokens", "u"),
    [
        ((2, 4), (1, 4), (1,), (1,)),
        ((1, 4), (1, 4), (1,), (2,)),
        ((2, 4), (2, 4), (1,), (2,)),
        ((4,), (1, 4), (1,), (2,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits, q, tokens, u):
    arrays = np.ones(logits, np.float32), np.ones(q, np.float32), np.zeros(tokens, np.int32), np.zeros(u)
    with pytest.raises(_core.ShapeError):
        _core.verify_logits(*arrays, _core.Law())


@pytest.mark.parametrize(("token", "u", "lenience"), [(4, 0.5, 1.0), (-1, 0.5, 1.0), (0, 1.0, 1.0), (0, 0.5, 0.0)])
def test_values_out_of_range_are_refused(token, u, lenience):
    logits, q = np.zeros((2, 4), np.float32), np.full((1, 4), 0.25, np.float32)
    with pytest.raises(_core.ShapeError):
        _core.verify_logits(logits, q, np.array([token], np.int32), np.array([u, 0.5]), _core.Law(), lenience)
    with pytest.raises(_core.ShapeError, match="logits must be float32"):
        _core.verify_logits(np.zeros((2, 4)), q, np.zeros(1, np.int32), np.array([0.5, 0.5]), _core.Law())

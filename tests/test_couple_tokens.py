"""The coupled rule: the noise is what it says, its choices are the target's draws, and a seed's text has no drafter in it."""

import functools
import math
import os

import numpy as np
import pytest
import specfast
from oracle import law as law_oracle
from oracle import philox
from oracle import verify as oracle
from oracle.chi_square import excess
from specfast import _core, ops
from test_embedded_pair import prompts

FULL = os.environ.get("SPECFAST_FULL") == "1"
ISAS = _core.build_info()["isas_supported"]
NONE = np.zeros(0, np.int32)


@pytest.fixture(autouse=True)
def threads():
    before = _core.num_threads()
    yield
    _core.set_num_threads(before)


def noise(seed, position, token):
    """64 random bits as a number in (0, 1), then -log(1 - u)."""
    key = philox.MASK & seed, seed >> 32
    counter = token // 64 * 16 + token % 16, position & philox.MASK, position >> 32
    high, low = (philox.philox((*counter, purpose), key)[token // 16 % 4] for purpose in (3, 4))
    return -math.log1p(-min((high + (low + 0.5) * 2.0**-32) * 2.0**-32, 1 - 2.0**-53))


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (7, 5), (2**63 + 5, 2**40 + 1)])
def test_the_noise_is_its_definition(seed, position):
    for token in (*range(130), 5000, 128_255, 2**31 - 1):
        assert _core.noise(seed, position, token) == pytest.approx(noise(seed, position, token), rel=1e-14)


def test_the_noise_is_exponential_and_its_neighbours_are_independent():
    drawn = np.array([[_core.noise(3, position, token) for token in range(64)] for position in range(400)])
    u = -np.expm1(-drawn)
    assert excess(np.histogram(u, 64, (0, 1))[0], np.ones(64)) < 1
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u[:, 16:], u[:, :-16])):
        pairs = np.histogram2d(a.ravel(), b.ravel(), 8, [(0, 1), (0, 1)])[0]
        assert excess(pairs, np.ones((8, 8))) < 1
    pairs = np.histogram2d(u.ravel(), u.ravel(), 8, [(0, 1), (0, 1)])[0]
    assert excess(pairs, np.ones((8, 8))) > 1


def laws(rng, rows, V):
    """Rows with ties, zeros and far tails."""
    p = rng.exponential(size=(rows, V)) ** rng.choice([1, 8])
    p[rng.random(p.shape) < rng.choice([0, 0.5])] = 0
    p[:, rng.integers(V)] = 0.25
    return (p / p.sum(1, keepdims=True)).astype(np.float32)


def test_it_chooses_the_arg_max_of_log_p_and_gumbel_noise():
    rng = np.random.default_rng(1)
    V, rows, seen = 20, 100, 100_000 if FULL else 20_000  # noises
    for case in range(seen // (V * rows)):
        p = laws(rng, rows, V)
        gumbel = -np.log([[noise(case, 11 + i, t) for t in range(V)] for i in range(rows)])
        chosen = [_core.couple_tokens(p[i : i + 1], NONE, case, 11 + i)[1] for i in range(rows)]
        with np.errstate(divide="ignore"):
            assert chosen == np.argmax(np.log(np.float64(p)) + gumbel, 1).tolist()
        tokens = np.array(chosen[:-1], np.int32)
        assert ops.couple_tokens(p, tokens, seed=case, position=11) == (rows - 1, chosen[-1])
        tokens[7] = (tokens[7] + 1) % V
        assert ops.couple_tokens(p, tokens, seed=case, position=11) == oracle.couple_tokens(
            np.float64(p), tokens, gumbel
        )


def test_its_choices_follow_the_law():
    p = np.float32([[0.5, 0.25, 0, 0.125, 0.125]])
    draws = 200_000 if FULL else 20_000
    counts = np.bincount([_core.couple_tokens(p, NONE, 5, i)[1] for i in range(draws)], minlength=5)
    assert excess(counts, p[0]) < 1
    assert excess(counts, np.float32([0.45, 0.3, 0, 0.125, 0.125])) > 1


def test_target_and_draft_agree_more_often_than_independent_draws():
    rng = np.random.default_rng(2)
    p = laws(rng, 1, 50)
    q = np.float32(0.7) * p + np.float32(0.3) * laws(rng, 1, 50)
    draws = 4000
    agree = np.mean([_core.couple_tokens(p, NONE, 1, i) == _core.couple_tokens(q, NONE, 1, i) for i in range(draws)])
    distance = np.abs(np.float64(p) - q).sum() / 2
    assert agree > (1 - distance) / (1 + distance) - 5 * 0.5 / math.sqrt(draws)
    assert agree > (np.float64(p) * q).sum() + 0.1


@pytest.mark.parametrize("options", [{}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.05}, {"vocab_limit": 33}], ids=str)
def test_from_logits_it_chooses_the_same_on_every_isa_and_thread_count(options):
    rng = np.random.default_rng(4)
    law = _core.Law(temperature=0.7, **options)
    for case, V in enumerate((40, 65, 700, 5003, 40_000)):
        logits = rng.normal(0, 2, (4, V)).astype(np.float32)
        p = _core.law_rows(logits, law)
        chosen = [_core.couple_tokens(p[i : i + 1], NONE, case, i)[1] for i in range(4)]
        for tau in range(4):
            tokens = np.array(chosen[:3], np.int32)
            tokens[tau:] = (tokens[tau:] + 1) % V
            for isa in ISAS:
                assert _core.couple_tokens(p, tokens, case, 0, isa) == (tau, chosen[tau])
                for count in (1, 2, 3):
                    _core.set_num_threads(count)
                    assert _core.couple_logits(logits, tokens, law, case, 0, isa) == (tau, chosen[tau])


def test_rows_without_a_law_raise_if_they_are_looked_at():
    logits = np.zeros((2, 8), np.float32)
    first = _core.couple_logits(logits[:1], NONE, _core.Law(), 0, 0)[1]
    logits[1, 3] = np.nan
    for options in ({}, {"top_k": 3}):
        assert _core.couple_logits(logits, np.array([first + 1], np.int32), _core.Law(), 0, 0) == (0, first)
        with pytest.raises(_core.NumericalError, match="row 0"):
            _core.couple_logits(logits[1:], NONE, _core.Law(**options), 0, 0)
    with pytest.raises(_core.NumericalError, match="row 0"):
        _core.couple_tokens(np.zeros((1, 4), np.float32), NONE, 0, 0)
    with pytest.raises(_core.ShapeError):
        _core.couple_tokens(np.zeros((2, 4), np.float32), NONE, 0, 0)


# --- the engine ---

PROMPTS, TOKENS = (40, 128) if FULL else (3, 64)
GAMMAS = range(1, 21) if FULL else (1, 4, 20)


@functools.cache
def engine_with(**options):
    return specfast.load(temperature=0.8, rule="coupled", **options)


@pytest.fixture(scope="module")
def engine():
    return engine_with()


@pytest.mark.parametrize("drafter", ["model", "suffix", "prompt-lookup", "combined", "early-exit"])
@pytest.mark.parametrize("number", range(PROMPTS))
def test_a_seeds_text_is_the_same_with_and_without_a_drafter(drafter, number):
    _core.set_num_threads(1)
    prompt, options = prompts(PROMPTS)[number], {"max_tokens": TOKENS, "ignore_eos": True, "seed": number}
    engine = engine_with(early_exit=1 + number % 4) if drafter == "early-exit" else engine_with(drafter=drafter)
    plain = engine.generate(prompt, disabled=True, **options)
    assert (plain.terms.rule, plain.stats.drafted) == ("coupled", 0)
    accepted = 0
    for gamma in (*GAMMAS, "auto"):
        run = engine.generate(prompt, gamma=gamma, **options)
        assert (run.terms.drafter, run.terms.gamma, run.stats.fallbacks) == (drafter, gamma, 0)
        assert run.token_ids == plain.token_ids, gamma
        accepted += run.stats.accepted
    assert accepted > 0
    assert engine.generate(prompt, disabled=True, **{**options, "seed": number + 1000}).token_ids != plain.token_ids


def test_other_rules_write_another_text_with_a_drafter(engine):
    options = {"max_tokens": 40, "ignore_eos": True, "seed": 1, "rule": "block"}
    texts = {tuple(engine.generate("def f(", gamma=gamma, **options).token_ids) for gamma in (1, 2, 5)}
    assert len(texts) > 1


def test_a_plain_coupled_text_is_the_noisy_arg_max_of_its_logits(engine):
    """The oracle's law and noise, at the position of each token in the text."""
    model = engine.pair.target.model
    run = engine.generate("import os\n", max_tokens=6, ignore_eos=True, seed=9, top_k=0, disabled=True)
    context = list(engine.pair.encode("import os\n", raw=False, system=None))
    for token in run.token_ids:
        cache = _core.Cache(model)
        logits = model.forward(cache, np.array(context, np.int32), 1)
        p = law_oracle.law_rows(logits, temperature=np.float32(0.8), vocab_limit=engine.pair.vocab)[0]
        gumbel = -np.log([noise(9, len(context), t) for t in range(p.size)])
        with np.errstate(divide="ignore"):
            assert int(np.argmax(np.log(p) + gumbel)) == token
        context.append(token)

"""Laws and verification at a 128k vocabulary, gamma 5: cold logits beside the memory's limit, and NumPy beside the rule."""

import itertools

import numpy as np
import pytest
from specfast import _core

V, GAMMA = 128256, 5
LAWS = {
    "temperature": _core.Law(0.8),
    "top_k_top_p": _core.Law(0.8, 50, 0.95),
    "threshold": _core.Law(0.8, 12826),  # 10 percent of the vocabulary
}


@pytest.fixture(scope="module")
def cold():
    """Logits (6, V) and draft laws (5, V), 14 of each, together more than 64 MB."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(14):
        logits = (4 * rng.standard_normal((GAMMA + 1, V))).astype(np.float32)
        drafted = (logits[:GAMMA] + rng.standard_normal((GAMMA, V))).astype(np.float32)
        made.append((logits, _core.law_rows(drafted, _core.Law(0.8))))
    return made


@pytest.fixture(scope="module")
def case(cold):
    logits, q = cold[0]
    rng = np.random.default_rng(0)
    return logits, _core.law_rows(logits, _core.Law(0.8)), q, q.argmax(-1).astype(np.int32), rng.random(GAMMA + 1)


@pytest.fixture(scope="module")
def bandwidth():
    """A function that measures GB/s of reading 256 MB, and keeps every figure."""
    big, seen = np.ones(256 << 20, np.uint8), []

    def measure():
        seen.extend(_core.read_bandwidth(big) for _ in range(5))
        return np.median(seen)

    measure()
    return measure


def verify_in_two_steps(logits, q, tokens, u, law):
    return _core.verify_tokens(_core.law_rows(logits, law), q, tokens, u)


def verify_block(logits, q, tokens, u, law):
    return _core.verify_logits(logits, q, tokens, u, law, rule="block")


VERIFY = {"verify_logits": _core.verify_logits, "block": verify_block, "two_steps": verify_in_two_steps}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("tau", [GAMMA, GAMMA - 1])
@pytest.mark.parametrize("rule", VERIFY)
def test_verify_cold(benchmark, record, cold, bandwidth, rule, tau, name):
    """All tokens kept, which reads every row; or the last rejected, for which the token rule reads one row less and a row of q."""
    cases, verify = [], VERIFY[rule]
    for logits, q in cold:
        tokens, u = logits[:GAMMA].argmax(-1).astype(np.int32), np.array([0.0] * GAMMA + [0.5])
        if tau < GAMMA:
            tokens[tau], u[tau] = q[tau].argmin(), 0.999
            q[tau, tokens[tau]] = 0.5
        cases.append((logits, q, tokens, u, LAWS[name]))
        assert verify(*cases[-1])[0] == tau
    rotation = itertools.cycle(cases)
    benchmark.group = f"verify cold, {name}, tau {tau}"
    benchmark.pedantic(verify, setup=lambda: (next(rotation), {}), rounds=84, warmup_rounds=14)
    limit = (2 * GAMMA + 1) * V * 4 / (bandwidth() * 1e9)
    record(
        series=f"{rule}_{name}_tau_{tau}",
        M=GAMMA + 1,
        roofline_s=limit,
        over_limit=benchmark.stats.stats.median / limit,
    )


@pytest.mark.parametrize("name", LAWS)
def test_coupled_cold(benchmark, record, cold, bandwidth, name):
    """All tokens kept; no q is read."""
    none, law = np.zeros(0, np.int32), LAWS[name]
    cases = []
    for logits, _ in cold:
        chosen = [_core.couple_logits(logits[i : i + 1], none, law, 1, i)[1] for i in range(GAMMA)]
        cases.append((logits, np.array(chosen, np.int32), law, 1, 0))
        assert _core.couple_logits(*cases[-1])[0] == GAMMA
    rotation = itertools.cycle(cases)
    benchmark.group = f"verify cold, {name}, coupled"
    benchmark.pedantic(_core.couple_logits, setup=lambda: (next(rotation), {}), rounds=84, warmup_rounds=14)
    limit = (2 * GAMMA + 1) * V * 4 / (bandwidth() * 1e9)
    record(series=f"coupled_{name}", M=GAMMA + 1, roofline_s=limit, over_limit=benchmark.stats.stats.median / limit)


@pytest.mark.parametrize("name", LAWS)
def test_law_rows(benchmark, record, case, name):
    benchmark.group = "law_rows"
    benchmark.pedantic(lambda: _core.law_rows(case[0], LAWS[name]), rounds=20, warmup_rounds=2)
    record(series=f"law_rows_{name}")


def test_verify_tokens(benchmark, record, case):
    _, p, q, tokens, u = case
    benchmark.group = "verify_tokens"
    benchmark.pedantic(lambda: _core.verify_tokens(p, q, tokens, u, 1.0), rounds=50, warmup_rounds=3)
    record(series="verify_tokens")


def test_verify_tokens_numpy(benchmark, record, case):
    _, p, q, tokens, u = case

    def verify():
        index = np.arange(GAMMA)
        passed = u[:GAMMA] * q[index, tokens] < p[index, tokens]
        tau = GAMMA if passed.all() else int(np.argmin(passed))
        weights = np.maximum(p[tau] - q[tau], 0) if tau < GAMMA else p[tau]
        total = weights.cumsum()
        return tau, int(np.searchsorted(total, u[GAMMA] * total[-1]))

    benchmark.group = "verify_tokens"
    benchmark.pedantic(verify, rounds=50, warmup_rounds=3)
    record(series="verify_tokens_numpy")

"""Laws and verification at a 128k vocabulary, gamma 5, against plain NumPy."""

import numpy as np
import pytest
from specfast import _core

V, GAMMA = 128256, 5


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((GAMMA + 1, V))).astype(np.float32)
    p = _core.law_rows(logits, _core.Law(1.0))
    q = _core.law_rows((logits[:GAMMA] + rng.standard_normal((GAMMA, V))).astype(np.float32), _core.Law(1.0))
    tokens = q.argmax(-1).astype(np.int32)
    return logits, p, q, tokens, rng.random(GAMMA + 1)


@pytest.mark.parametrize(
    ("name", "law"),
    [("softmax", _core.Law(1.0)), ("threshold", _core.Law(1.0, 12826)), ("top_p", _core.Law(1.0, 50, 0.95))],
)
def test_law_rows(benchmark, record, case, name, law):
    benchmark.group = "law_rows"
    benchmark.pedantic(lambda: _core.law_rows(case[0], law), rounds=20, warmup_rounds=2)
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

"""Truncation in mlx-lm's order, and its penalties and biases, against mlx-lm itself."""

import numpy as np
import pytest
from oracle.law import smallest_margin
from specfast import _core

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
sample_utils = pytest.importorskip("mlx_lm.sample_utils", reason="mlx-lm is not installed")


def mlx_law(logits, temperature, top_k, top_p, min_p):
    """What mlx_lm.sample_utils.make_sampler draws from."""
    log_p = mx.array(logits) - mx.logsumexp(mx.array(logits), keepdims=True)
    log_p = log_p[None]
    if top_p < 1:
        log_p = sample_utils.apply_top_p(log_p, top_p)
    if min_p > 0:
        log_p = sample_utils.apply_min_p(log_p, min_p, 1)
    if top_k > 0:
        log_p = sample_utils.apply_top_k(log_p, top_k)
    return np.asarray(mx.softmax(log_p[0] / temperature))


@pytest.mark.parametrize("seed", range(30))
def test_truncation_before_temperature(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, 300).astype(np.float32)
    options = {
        "temperature": float(rng.choice([0.5, 1.5])),
        "top_k": int(rng.choice([0, 5, 40])),
        "top_p": float(rng.choice([0.5, 0.9, 1.0])),
        "min_p": float(rng.choice([0.0, 0.05])),
    }
    if smallest_margin(logits, **{**options, "temperature": 1.0, "top_k": 0}) < 1e-4:
        pytest.skip("rounding decides what is kept")
    p = _core.law_rows(logits[None], _core.Law(**options, temper_last=True))[0]
    np.testing.assert_allclose(p, mlx_law(logits, **options), 1e-4, 1e-7)
    if options["top_p"] < 1 and options["top_k"] == 0:
        temper_first = _core.law_rows(logits[None], _core.Law(**options))[0]
        assert np.abs(temper_first - p).max() > 1e-3


@pytest.mark.parametrize("window", [3, 20])
def test_penalties_and_biases(window):
    """mlx-lm counts the prompt for presence and frequency too: prompt_length 0."""
    rng = np.random.default_rng(window)
    logits, text = rng.normal(0, 2, 50).astype(np.float32), rng.integers(0, 50, 30).astype(np.int32)
    bias = {4: 1.5, int(text[-1]): -2.0}
    processors = sample_utils.make_logits_processors(bias, 1.3, window, 0.5, window, 0.25, window)
    expected = mx.array(logits)[None]
    for process in processors:
        expected = process(mx.array(text), expected)
    ours = _core.Adjustments(
        repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25, penalty_window=window, logit_bias=bias
    )
    ours.follow(text)
    np.testing.assert_allclose(
        ours.edit_rows(logits[None], np.zeros(0, np.int32))[0], np.asarray(expected), rtol=1e-6, atol=1e-6
    )

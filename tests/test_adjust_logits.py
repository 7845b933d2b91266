"""Edits of logits: penalties, biases and masks against the definition, and through the engine."""

import itertools

import numpy as np
import pytest
import specfast
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.law import adjust_logits
from specfast import ConfigurationError, NumericalError, _core

EDITS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.1, 2.0]),
        "presence_penalty": st.floats(-2, 2, width=32),
        "frequency_penalty": st.floats(-2, 2, width=32),
        "penalty_window": st.integers(0, 12),
        "logit_bias": st.dictionaries(st.integers(0, 20), st.floats(-100, 100, width=32), max_size=5),
    },
)


@settings(max_examples=200, deadline=None)
@given(edits=EDITS, seed=st.integers(0, 2**32 - 1), masked=st.booleans(), packed=st.booleans())
def test_every_row_is_edited_as_after_its_own_prefix(edits, seed, masked, packed):
    rng = np.random.default_rng(seed)
    V, gamma = 70, 4
    allowed = {}

    def mask(tokens):
        key = tuple(tokens)
        row = allowed.setdefault(key, rng.random(V) < 0.7)
        row[3] = True
        return np.packbits(np.pad(row, (0, 26)), bitorder="little").view(np.uint32) if packed else row

    prompt = rng.integers(0, V, 6).tolist()
    adjustments = _core.Adjustments(prompt_length=len(prompt), mask=mask if masked else None, **edits)
    text = list(prompt)
    adjustments.follow(np.array(prompt, np.int32))
    for _ in range(5):
        logits = np.round(rng.normal(0, 2, (gamma + 1, V)), 1).astype(np.float32)  # with ties
        drafted = rng.integers(0, V, gamma).astype(np.int32)
        adjustments.edit_rows(logits[:3], drafted[:2])  # as a draft does, before the target
        edited, best = adjustments.edit_rows(logits, drafted)
        for m in range(gamma + 1):
            before = [*text, *drafted[:m].tolist()]
            expected = adjust_logits(
                logits[m], before, len(prompt), allowed=allowed[tuple(before)] if masked else None, **edits
            )
            assert (edited[m] == expected).all()
            assert best[m] == np.argmax(expected)
        kept = drafted[: rng.integers(0, gamma + 1)].tolist()
        text += kept
        adjustments.follow(np.array(kept, np.int32))
        assert adjustments.length == len(text)


def test_a_window_forgets_and_a_draft_is_forgotten():
    logits, tokens = np.ones((1, 4), np.float32), np.array([0, 1, 1], np.int32)
    adjustments = _core.Adjustments(repetition_penalty=2.0, penalty_window=2)
    adjustments.follow(tokens)
    assert adjustments.edit_rows(logits, tokens[:0])[0].tolist() == [[1, 0.5, 1, 1]]
    both = np.ones((2, 4), np.float32)
    assert adjustments.edit_rows(both, np.array([3], np.int32))[0][1].tolist() == [1, 0.5, 1, 0.5]
    assert adjustments.edit_rows(logits, tokens[:0])[0].tolist() == [[1, 0.5, 1, 1]]


# --- the engine ---


@pytest.fixture(scope="module")
def engine():
    return specfast.load()


OPTIONS = [
    {"repetition_penalty": 1.3, "penalty_window": 20},
    {"presence_penalty": 1.5, "frequency_penalty": 0.4},
    {"logit_bias": {13: 4.0, 199: -float("inf")}},
    {"mask": lambda tokens: np.arange(4096) % 3 != tokens[-1] % 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=[*"0123"])
def test_speculation_changes_nothing(engine, options):
    """Greedy, and with the noise of a seed; and the options change the text."""
    for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "rule": "coupled", "seed": 5}):
        common = {"max_tokens": 40, "ignore_eos": True, **sampling}
        plain = engine.generate("def main(", disabled=True, **common, **options)
        assert plain.token_ids != engine.generate("def main(", disabled=True, **common).token_ids
        for gamma in (1, 5):
            run = engine.generate("def main(", gamma=gamma, **common, **options)
            assert run.token_ids == plain.token_ids
            assert run.stats.accepted > 0


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_a_mask_holds_for_every_token(engine, rule):
    calls = []

    def mask(tokens):
        calls.append(len(tokens))
        return np.arange(4096) % 3 != tokens[-1] % 3

    prompt = list(engine.pair.encode("x", raw=True, system=None))
    run = engine.generate(prompt, max_tokens=60, ignore_eos=True, mask=mask, rule=rule, gamma=4)
    text = [prompt[-1], *run.token_ids]
    assert all(a % 3 != b % 3 for a, b in itertools.pairwise(text))
    assert run.stats.accepted > 0
    assert set(range(len(prompt), len(prompt) + 60)) <= set(calls)  # every position, bonus rows included
    free = engine.generate(prompt, max_tokens=60, ignore_eos=True, rule=rule).token_ids
    assert any(a % 3 == b % 3 for a, b in itertools.pairwise(free))


def test_a_mask_that_fails_fails_the_request_only(engine):
    def broken(tokens):
        raise KeyError("grammar")

    with pytest.raises(KeyError, match="grammar"):
        engine.generate("x", mask=broken, max_tokens=4)
    for nothing in (np.zeros(4096, bool), np.zeros(3, np.uint32)):
        for temperature in (0.0, 1.0):
            with pytest.raises(NumericalError, match="allows no token"):
                engine.generate(
                    "x", mask=lambda tokens, nothing=nothing: nothing, max_tokens=4, temperature=temperature
                )
    with pytest.raises(_core.ShapeError, match="mask"):
        engine.generate("x", mask=lambda tokens: [True], max_tokens=4)
    assert len(engine.generate("x", mask=lambda tokens: None, max_tokens=4, ignore_eos=True).token_ids) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.5},
        {"frequency_penalty": "1"},
        {"penalty_window": -1},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {4096: 1.0}},
        {"logit_bias": {"5": 1.0}},
        {"logit_bias": {5: float("nan")}},
        {"mask": 3},
        {"truncation": "vllm"},
    ],
    ids=str,
)
def test_bad_options_are_refused(engine, options):
    with pytest.raises(ConfigurationError):
        engine.generate("x", max_tokens=2, **options)


def test_truncation_orders_differ(engine):
    """At a temperature, what top-p keeps depends on which comes first."""
    law = {"top_k": 0, "top_p": 0.5, "temperature": 2.0, "max_tokens": 60, "seed": 3, "rule": "coupled"}
    first, last = (engine.generate("def f(", truncation=order, **law).token_ids for order in ("hf", "mlx"))
    assert first != last

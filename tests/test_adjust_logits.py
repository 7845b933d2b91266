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


DRAFTING = ["suffix", "model", "combined", "early-exit"]


def engine_with(drafter, engine):
    return (specfast.load(early_exit=2), {}) if drafter == "early-exit" else (engine, {"drafter": drafter})


@pytest.mark.parametrize("drafter", ["none", *DRAFTING])
def test_a_mask_never_sees_text_after_an_end_token(engine, drafter):
    engine, options = engine_with(drafter, engine)
    (end,), line = engine.pair.eos_ids, engine.pair.encode("x = 1\n", raw=True, system=None)
    prompt, after = [*line, end, *line, end, *line], []  # a copy goes past an end token

    def mask(tokens):
        if end in tokens[len(prompt) :]:
            after.append(tokens)

    def endings(**more):
        common = {"max_tokens": 60, "mask": mask, "logit_bias": {end: 6.0}, **more, **options}
        return [engine.generate(prompt, seed=seed, **common) for seed in range(20)]

    for rule in ("token", "block", "coupled") if drafter != "none" else ("token",):
        runs = endings(rule=rule)
        assert "eos" in {run.finish_reason for run in runs}
        assert not after
        assert drafter == "none" or sum(run.stats.accepted for run in runs) > 0
    endings(ignore_eos=True)
    assert after


@pytest.mark.parametrize("drafter", DRAFTING)
@pytest.mark.parametrize("fails", [True, False], ids=["raises", "allows nothing"])
def test_a_mask_with_no_answer_for_a_rejected_draft_changes_nothing(engine, drafter, fails):
    """A grammar may know the text that plain decoding writes and nothing else."""
    engine, options = engine_with(drafter, engine)
    text = "def f(x): return x\ndef g(x): return y\n" * 3
    prompt, refused = engine.pair.encode(text, raw=True, system=None), []
    for temperature in (0.0, 1.0):
        common = {"max_tokens": 40, "ignore_eos": True, "temperature": temperature, "seed": 3, "rule": "coupled"}
        plain = engine.generate(prompt, disabled=True, **common).token_ids

        def mask(tokens, plain=plain):
            drafted = tokens[len(prompt) :]
            if drafted == plain[: len(drafted)]:
                return None
            refused.append(drafted)
            if fails:
                raise ValueError("dead end")
            return np.zeros(4096, bool)

        run = engine.generate(prompt, mask=mask, gamma=5, **common, **options)
        assert run.token_ids == plain
        assert run.stats.accepted > 0
        assert run.stats.fallbacks == 0
    assert refused


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
@pytest.mark.parametrize("drafter", DRAFTING)
def test_a_mask_that_fails_where_the_text_gets_fails_the_request(engine, drafter, rule):
    engine, options = engine_with(drafter, engine)
    prompt = engine.pair.encode("def f(x):", raw=True, system=None)
    common = {"max_tokens": 40, "ignore_eos": True, "seed": 3, "rule": rule, "gamma": 5, **options}

    def mask(tokens):
        if len(tokens) >= len(prompt) + 20:
            raise KeyError("grammar")

    kept = []
    with pytest.raises(KeyError, match="grammar"):
        kept.extend(token for chunk in engine.stream(prompt, mask=mask, **common) for token in chunk.token_ids)
    assert 20 - 5 <= len(kept) <= 20  # a last round that would have kept the rest is lost

    def interrupted(tokens):
        if len(tokens) > len(prompt):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompt, mask=interrupted, **common)


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

"""The configuration: the documented names, defaults and ranges, and precedence with its source."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from specfast import ConfigurationError, SpeculativeConfig
from specfast.config import FIELDS, UNSET, kept_by_threshold, resolve_config

DEFAULTS = {
    "target_model": None,
    "draft_model": None,
    "auto_config": False,
    "target_engine": None,
    "draft_engine": None,
    "gamma": 5,
    "temperature": 1.0,
    "top_k_threshold": 0.9,
    "lenience": 1.0,
    "early_exit": None,
    "disabled": False,
}
RANGES = {"gamma": (1, 20), "temperature": (0.1, 2.0), "top_k_threshold": (0.1, 1.0), "lenience": (0.5, 2.0)}


def test_the_documented_defaults():
    config = SpeculativeConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.rule is None
    with pytest.raises(AttributeError):
        config.gamma = 6


@pytest.mark.parametrize(("name", "limits"), RANGES.items())
def test_both_ends_of_a_range_are_in_it(name, limits):
    for value in limits:
        assert getattr(SpeculativeConfig(**{name: value}), name) == value


@given(name=st.sampled_from(sorted(RANGES)), value=st.floats() | st.integers() | st.booleans() | st.text() | st.none())
def test_a_value_is_in_its_range_or_refused(name, value):
    low, high = RANGES[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    allowed = number and (low <= value <= high or (name == "temperature" and value == 0))
    if name == "gamma":
        allowed = value == "auto" or (allowed and isinstance(value, int))
    if allowed:
        assert getattr(SpeculativeConfig(**{name: value}), name) == value
        return
    with pytest.raises(ConfigurationError) as error:
        SpeculativeConfig(**{name: value})
    message = str(error.value)
    assert name in message
    assert f"{low:g} to {high:g}" in message  # the limit


def test_a_top_k_count_given_as_the_threshold_names_the_option_for_counts():
    with pytest.raises(ConfigurationError, match="--top-k"):
        SpeculativeConfig(top_k_threshold=40)
    with pytest.raises(ConfigurationError) as error:
        SpeculativeConfig(top_k_threshold=0.05)
    assert "--top-k" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"target_engine": "torch"},
        {"draft_engine": ""},
        {"early_exit": 0},
        {"early_exit": True},
        {"early_exit": "last"},
        {"rule": "typical"},
        {"rule": "block", "lenience": 1.1},
        {"rule": "coupled", "lenience": 0.9},
        {"disabled": "yes"},
        {"auto_config": 1},
        {"target_model": ""},
        {"draft_model": 7},
    ],
)
def test_values_that_are_none_of_the_choices_are_refused(options):
    with pytest.raises(ConfigurationError):
        SpeculativeConfig(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_engine": "mlx"}, "native"),
        ({"draft_engine": "tinygrad"}, "native"),
    ],
)
def test_what_is_not_available_yet_says_what_is(options, words):
    config = SpeculativeConfig(**options)  # in range: another version can
    with pytest.raises(ConfigurationError, match="not available in this version") as error:
        config.require_available()
    assert words in str(error.value)
    SpeculativeConfig(target_engine="native", draft_engine="native", rule="block").require_available()


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, "block"),
        ({"lenience": 1.1}, "token"),
        ({"rule": "token"}, "token"),
        ({"rule": "coupled"}, "coupled"),
        ({"temperature": 0}, "greedy"),
        ({"temperature": 0, "rule": "block", "lenience": 1.1}, "greedy"),  # lenience has no effect
    ],
)
def test_the_rule_in_effect(options, rule):
    assert SpeculativeConfig(**options).effective_rule == rule


def test_early_exit_takes_a_layer_or_auto_and_no_draft_besides():
    assert [SpeculativeConfig(early_exit=value).early_exit for value in (None, 1, 90, "auto")] == [None, 1, 90, "auto"]
    with pytest.raises(ConfigurationError, match=r"early_exit 3 and draft_model llama-3.2-1b are two ways"):
        SpeculativeConfig(target_model="llama-3.1-8b", draft_model="llama-3.2-1b", early_exit=3)
    assert SpeculativeConfig(draft_model="none", early_exit=3).early_exit == 3
    typed = {"target_model": "llama-3.1-8b", "auto_config": True, "early_exit": "auto"}
    line = resolve_config(typed).describe(draft_model="early exit auto")
    assert "draft early exit auto (typed)" in line
    with pytest.raises(ConfigurationError, match="two ways to draft"):
        resolve_config(typed).with_models("llama-3.1-8b", "llama-3.2-1b")


@pytest.mark.parametrize("drafter", ["model", "suffix", "prompt-lookup", "combined"])
@pytest.mark.parametrize("early_exit", [2, "auto"])
def test_early_exit_takes_no_drafter_besides_but_none(drafter, early_exit):
    words = f"early_exit {early_exit} and drafter {drafter} are two ways to draft"
    with pytest.raises(ConfigurationError, match=words):
        SpeculativeConfig(early_exit=early_exit, drafter=drafter)
    resolved = resolve_config({"early_exit": early_exit})
    with pytest.raises(ConfigurationError, match=words):
        resolved.with_request({"drafter": drafter})
    assert resolved.with_request({"drafter": "none"}).config.drafter == "none"  # plain


def test_precedence_from_default_to_request():
    layers = {}
    for source, value in (("default", 5), ("family", 6), ("host", 7), ("typed", 8), ("request", 9)):
        if source == "family":
            layers["typed"] = {"target_model": "llama-3.1-8b", "auto_config": True}
        elif source != "default":
            layers[source] = {**layers.get(source, {}), "gamma": value}
        resolved = resolve_config(**layers)
        assert (resolved.config.gamma, resolved.sources["gamma"]) == (value, source)


def test_a_typed_default_is_typed_and_an_unset_option_is_not():
    resolved = resolve_config({"gamma": 5, "temperature": UNSET, "auto_config": True, "target_model": "qwen-2.5-7b"})
    assert (resolved.config.gamma, resolved.sources["gamma"]) == (5, "typed")
    assert (resolved.config.temperature, resolved.sources["temperature"]) == (0.8, "family")
    assert not UNSET


def test_family_values_need_auto_config():
    resolved = resolve_config({"target_model": "llama-3.1-8b"})
    assert resolved.config.lenience == 1.0
    assert set(resolved.sources.values()) == {"typed", "default"}


def test_a_request_is_added_to_what_was_typed():
    resolved = resolve_config({"gamma": 3, "temperature": 0.5}).with_request({"temperature": 0.0})
    assert (resolved.config.gamma, resolved.config.temperature) == (3, 0.0)
    assert (resolved.sources["gamma"], resolved.sources["temperature"]) == ("typed", "request")


def test_other_models_bring_their_own_family():
    resolved = resolve_config({"target_model": "llama-3.1-8b", "auto_config": True}).with_models("qwen-2.5-7b", None)
    assert (resolved.config.gamma, resolved.config.top_k_threshold) == (4, 0.85)


def test_an_unknown_option_names_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"'gama'.*gamma"):
        resolve_config({"gama": 5})


def test_one_line_tells_every_value_and_its_source():
    typed = {"target_model": "qwen-2.5-7b", "auto_config": True, "gamma": 3}
    line = resolve_config(typed, host={"temperature": 0.5}).describe(draft_model="qwen-2.5-0.5b")
    assert "\n" not in line
    for part in (
        "target qwen-2.5-7b (typed)",
        "draft qwen-2.5-0.5b (default)",
        "gamma 3 (typed)",
        "temperature 0.5 (host)",
        "top-k threshold 0.85 (family)",
        "lenience 1 (family)",
    ):
        assert part in line


@pytest.mark.parametrize(
    ("options", "lossless"),
    [
        ({}, True),
        ({"lenience": 0.5}, True),
        ({"lenience": 1.1}, False),
        ({"lenience": 1.1, "temperature": 0.0}, True),
        ({"lenience": 1.1, "top_k_threshold": 1.0}, True),
        ({"lenience": 1.1, "disabled": True}, True),
    ],
)
def test_only_a_lenience_above_one_changes_the_law(options, lossless):
    assert SpeculativeConfig(**options).lossless is lossless


@pytest.mark.parametrize(("threshold", "vocab", "kept"), [(0.9, 4096, 410), (0.9, 10, 1), (1.0, 50, 1), (0.1, 10, 9), (0.7, 10, 3)])  # fmt: skip
def test_the_threshold_keeps_a_share(threshold, vocab, kept):
    assert kept_by_threshold(threshold, vocab) == kept


@given(t=st.integers(10, 100), vocab=st.integers(1, 300_000))
def test_the_threshold_is_the_exact_ceiling(t, vocab):
    assert kept_by_threshold(t / 100, vocab) == max(1, -(-(100 - t) * vocab // 100))


def test_every_field_is_documented():
    assert all(name in SpeculativeConfig.__doc__ for name in FIELDS)

"""Compatibility is read from tokenizer.json and config.json; a pair that does not fit is decoded plainly."""

import json
import math

import pytest
import specfast
from specfast.compatibility import compare_models
from specfast.errors import ModelFormatError
from specfast.models import free_bytes
from tiny_directories import byte_level, decoder_weights, write_model, write_pair, write_tokenizer


def directory(root, name, tokenizer, vocab=320):
    write_tokenizer(root / name, tokenizer)
    (root / name / "config.json").write_text(json.dumps({"vocab_size": vocab}))
    return root / name


def test_equal_tokens_fit(tmp_path):
    verdict = compare_models(*(directory(tmp_path, name, byte_level()) for name in "ab"))
    assert (verdict.status, verdict.tokens_match, verdict.vocab_match, verdict.vocab) == ("compatible", True, True, 320)


def test_equal_tokens_in_another_order_and_padding_fit(tmp_path):
    a = directory(tmp_path, "a", byte_level(), 320)
    b = directory(tmp_path, "b", byte_level(), 384)
    values = json.loads((b / "tokenizer.json").read_text())
    values["model"]["vocab"] = dict(reversed(values["model"]["vocab"].items()))
    (b / "tokenizer.json").write_text(json.dumps(values))
    verdict = compare_models(a, b)
    assert (verdict.status, verdict.vocab_match, verdict.vocab) == ("compatible", False, 320)


@pytest.mark.parametrize("other", [byte_level("<think>"), byte_level(vocab=310)], ids=["added token", "vocabulary"])
def test_other_tokens_do_not_fit(tmp_path, other):
    verdict = compare_models(directory(tmp_path, "a", byte_level()), directory(tmp_path, "b", other))
    assert verdict.status == "incompatible"
    assert verdict.warning("llama-3.1-8b", "qwen-2.5-3b") == (
        "Warning: Models may be incompatible for speculative decoding:\n"
        "  Target: llama-3.1-8b, Draft: qwen-2.5-3b\n"
        "  Tokens match: False, Vocab match: True"
    )


def test_two_tokens_that_changed_places_do_not_fit(tmp_path):
    a, b = (directory(tmp_path, name, byte_level()) for name in "ab")
    values = json.loads((b / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (b / "tokenizer.json").write_text(json.dumps(values))
    assert compare_models(a, b).status == "incompatible"


def test_a_model_without_tokenizer_json_is_unknown(tmp_path):
    a, b = (directory(tmp_path, name, byte_level()) for name in "ab")
    (b / "tokenizer.json").unlink()
    assert compare_models(a, b).status == "unknown"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": 3}}'])
def test_a_damaged_tokenizer_is_an_error(tmp_path, content):
    a, b = (directory(tmp_path, name, byte_level()) for name in "ab")
    (b / "tokenizer.json").write_text(content)
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        compare_models(a, b)


@pytest.mark.parametrize("content", ["{}", '{"vocab_size": -1}', '{"vocab_size": true}', '{"vocab_size": "many"}'])
def test_a_config_without_a_vocabulary_is_an_error(tmp_path, content):
    a, b = (directory(tmp_path, name, byte_level()) for name in "ab")
    (b / "config.json").write_text(content)
    with pytest.raises(ModelFormatError, match="vocab_size"):
        compare_models(a, b)


def test_a_draft_that_does_not_fit_is_warned_about_and_not_loaded(tmp_path):
    target, _ = write_pair(tmp_path)
    draft = directory(tmp_path, "stranger", byte_level("<think>"))  # no weights: loading it would fail
    told = []
    engine = specfast.load(target, draft, notify=told.append)
    plain = specfast.load(target, disabled=True)
    assert told == [
        "Warning: Models may be incompatible for speculative decoding:\n"
        f"  Target: {target}, Draft: {draft}\n"
        "  Tokens match: False, Vocab match: True"
    ]
    result = engine.generate("def main", max_tokens=12, temperature=0.0)
    assert result.token_ids == plain.generate("def main", max_tokens=12, temperature=0.0).token_ids
    assert (result.stats.drafted, result.stats.target_passes) == (0, 12)
    assert engine.get_speculation_stats()["model_family_compatibility"] == "incompatible"


def test_a_draft_with_more_padding_speculates_and_gives_the_same_text(tmp_path):
    target, _ = write_pair(tmp_path)
    wide = tmp_path / "wide"
    write_model(wide, decoder_weights(5, vocab=352))
    write_tokenizer(wide, byte_level())
    engine = specfast.load(target, wide)
    plain, result = (engine.generate("x = ", max_tokens=24, temperature=0.0, disabled=off) for off in (True, False))
    assert result.stats.drafted > 0
    assert result.token_ids == plain.token_ids


def test_padding_rows_of_the_target_are_never_drawn(tmp_path):
    known = byte_level().get_vocab_size()
    decoder = decoder_weights(5, vocab=known + 20)
    decoder.head[known:] *= 50  # the padding would be the likeliest by far
    write_model(tmp_path / "t", decoder)
    write_tokenizer(tmp_path / "t", byte_level())
    for temperature in (0.0, 2.0):
        result = specfast.load(tmp_path / "t", disabled=True).generate("a", max_tokens=40, temperature=temperature)
        assert max(result.token_ids) < known


def test_auto_config_falls_back_to_a_suggestion_that_fits(tmp_path, monkeypatch):
    target, draft = write_pair(tmp_path)
    stranger = directory(tmp_path, "stranger", byte_level("<think>"))
    places = {"llama-3.1-8b": target, "llama-3.2-1b": stranger, "llama-3.2-3b": draft, "stranger": stranger}
    monkeypatch.setattr("specfast.hub.resolve", lambda name, **_: places[name])
    told = []
    engine = specfast.load("llama-3.1-8b", "stranger", auto_config=True, notify=told.append)
    assert engine.pair.draft_name == "llama-3.2-3b"
    assert [line.splitlines()[1] for line in told if line.startswith("Warning")] == [
        "  Target: llama-3.1-8b, Draft: stranger",
        "  Target: llama-3.1-8b, Draft: llama-3.2-1b",
    ]


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, 4096e3), ("max", 4096e3), ("3000000", 2.5e6), ("1500000", 1e6), ("100", 0.0)]
)
def test_free_memory_is_the_systems_or_what_a_container_leaves(tmp_path, limit, expected):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text("1000000\n")
        (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 500000\n")
    assert free_bytes(tmp_path / "meminfo", tmp_path) == expected
    assert free_bytes(tmp_path / "none", tmp_path / "none") == math.inf


def test_auto_config_passes_over_a_draft_that_does_not_fit_in_memory(tmp_path, monkeypatch):
    target, draft = write_pair(tmp_path)
    monkeypatch.setattr("specfast.hub.resolve", lambda name, **_: target if name == "llama-3.1-70b" else draft)
    monkeypatch.setattr("specfast.models.free_bytes", lambda: 3e9)
    told = []
    engine = specfast.load("llama-3.1-70b", auto_config=True, notify=told.append)
    assert engine.pair.draft_name == "llama-3.2-3b"
    assert engine.resolved.sources["gamma"] == "family"
    monkeypatch.setattr("specfast.models.free_bytes", lambda: 1e9)
    engine = specfast.load("llama-3.1-70b", auto_config=True, notify=told.append)
    assert engine.pair.draft is None
    assert "llama-3.2-3b needs about 1.8 GB, and 1.0 GB are free" in told[0]
    assert "suffix drafter" in told[-1]

"""The engine on small native pairs: the same tokens with and without a draft, whatever the options and the end."""

import numpy as np
import pytest
import specfast
from specfast import ConfigurationError, ContextFullError, ModelFormatError, NumericalError
from tiny_directories import byte_level, decoder_weights, write_model, write_pair, write_tokenizer

PROMPTS = ["def main(path):", "héllo wörld", "x"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), max_context=300)


@pytest.fixture(scope="module")
def engine(directories):
    return specfast.load(*directories)


def tokens(engine, prompt="def main", **options):
    return engine.generate(prompt, **{"max_tokens": 40, "temperature": 0.0, **options}).token_ids


@pytest.mark.parametrize(("prompt", "threads"), [*((prompt, 1) for prompt in PROMPTS), (PROMPTS[0], 2)])
def test_greedy_tokens_are_the_same_for_every_gamma(engine, prompt, threads):
    before = specfast.build_info()["threads"]
    try:
        specfast.inference.set_threads(threads)
        plain = engine.generate(prompt, max_tokens=32, temperature=0.0, disabled=True, ignore_eos=True)
        assert (plain.stats.target_passes, plain.stats.drafted, plain.terms.gamma) == (32, 0, 0)
        passes = []
        for gamma in range(1, 21):
            run = engine.generate(prompt, max_tokens=32, temperature=0.0, gamma=gamma, ignore_eos=True)
            assert run.token_ids == plain.token_ids
            assert run.stats.drafted >= gamma
            passes.append(run.stats.target_passes)
        assert min(passes) < 32  # something was accepted
    finally:
        specfast.inference.set_threads(before)


def test_a_draft_that_never_agrees_changes_nothing_either(directories, tmp_path):
    target, _ = directories
    write_model(tmp_path / "other", decoder_weights(77), max_context=300)
    write_tokenizer(tmp_path / "other", byte_level())
    engine = specfast.load(target, tmp_path / "other")
    assert tokens(engine) == tokens(engine, disabled=True)


def test_a_seed_gives_the_same_text_again_and_another_seed_another(engine):
    first = engine.generate(PROMPTS[0], max_tokens=40, seed=7)
    assert engine.generate(PROMPTS[0], max_tokens=40, seed=7).token_ids == first.token_ids
    assert engine.generate(PROMPTS[0], max_tokens=40, seed=8).token_ids != first.token_ids
    drawn = engine.generate(PROMPTS[0], max_tokens=40)
    assert engine.generate(PROMPTS[0], max_tokens=40, seed=drawn.terms.seed).token_ids == drawn.token_ids
    assert engine.generate(PROMPTS[0], max_tokens=40).terms.seed != drawn.terms.seed


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"top_k_threshold": 1.0}, {"top_k": 1}, {"temperature": 0.0, "lenience": 2.0, "seed": 3}],
)
def test_every_way_to_be_greedy_is_greedy(engine, options):
    assert engine.generate("x", max_tokens=20, **options).token_ids == tokens(engine, "x", max_tokens=20)


def test_the_threshold_keeps_its_share_and_a_typed_count_replaces_it(directories):
    def law(options, **request):
        return specfast.load(*directories, **options).stream("x", **request)._target.law

    assert law({}).top_k == 32  # ceil(0.1 * 320)
    assert law({}, top_k=5).top_k == 5
    assert law({}, top_k=0).top_k == 0
    assert law({"top_k_threshold": 0.5}, top_k=200).top_k == 160  # both given: both hold
    assert law({"top_k_threshold": 0.5}, top_k=7).top_k == 7
    stream = specfast.load(*directories).stream("x", top_p=0.5, min_p=0.1, temperature=0.5)
    assert stream._drafter._drafter._parts["model"]._law is stream._target.law  # one law for p and q
    assert (stream._target.law.top_p, stream._target.law.temperature) == (0.5, 0.5)


def test_chunks_join_to_the_text_and_the_tokens(engine):
    generation = engine.stream("héllo", max_tokens=60, seed=1)
    chunks = list(generation)
    result = generation.result()
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert [token for chunk in chunks for token in chunk.token_ids] == result.token_ids
    text = result.token_ids[:-1] if result.finish_reason == "eos" else result.token_ids
    assert result.text == engine.pair.tokenizer.decode(text)


def test_a_stop_string_cuts_text_and_tokens(engine):
    whole = engine.generate("def main", max_tokens=60, temperature=0.0, ignore_eos=True)
    stop = whole.text[20:23]
    at = whole.text.index(stop)
    for gamma in (1, 5, 20):
        cut = engine.generate("def main", max_tokens=60, temperature=0.0, ignore_eos=True, stop=[stop], gamma=gamma)
        assert (cut.text, cut.finish_reason) == (whole.text[:at], "stop")
        n = len(cut.token_ids)
        assert cut.token_ids == whole.token_ids[:n]
        decode = engine.pair.tokenizer.decode
        assert stop in decode(cut.token_ids)
        assert stop not in decode(cut.token_ids[:-1])


def test_an_end_token_ends_the_text(directories, tmp_path):
    target, draft = directories
    whole = tokens(specfast.load(target, disabled=True), max_tokens=60, ignore_eos=True)
    end = next(token for i, token in enumerate(whole) if i >= 9 and token not in whole[:i])
    write_model(tmp_path / "t", decoder_weights(5), eos=[1, end], max_context=300)
    write_tokenizer(tmp_path / "t", byte_level())
    for gamma in (1, 4, 20):
        result = specfast.load(tmp_path / "t", draft).generate("def main", max_tokens=60, temperature=0.0, gamma=gamma)
        assert result.token_ids == whole[: whole.index(end) + 1]
        assert result.finish_reason == "eos"
        assert result.stats.tokens == len(result.token_ids)


def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path):
    write_model(tmp_path, decoder_weights(5, vocab=200))
    tokenizer = byte_level()
    for token, sound in ((199, True), (200, False)):
        write_tokenizer(tmp_path, tokenizer, eos_token=tokenizer.id_to_token(token))
        if sound:
            assert specfast.load(tmp_path, disabled=True).pair.eos_ids == (1, token)
        else:
            with pytest.raises(ModelFormatError, match="end token is 200, but the model's tokens are 0 to 199"):
                specfast.load(tmp_path, disabled=True)


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 6, 7])
def test_max_tokens_is_exact(engine, max_tokens):
    result = engine.generate("x", max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    assert (len(result.token_ids), result.finish_reason) == (max_tokens, "length")


@pytest.mark.parametrize("gamma", [1, 5, 20])
def test_a_full_context_ends_the_text(engine, gamma):
    prompt = [5 + i % 40 for i in range(280)]
    plain = engine.generate(prompt, temperature=0.0, disabled=True, ignore_eos=True)
    result = engine.generate(prompt, temperature=0.0, gamma=gamma, ignore_eos=True)
    assert (len(result.token_ids), result.finish_reason) == (20, "context")
    assert result.token_ids == plain.token_ids


def test_a_prompt_may_be_an_array_of_ids(engine):
    assert tokens(engine, np.array([5, 6, 7])) == tokens(engine, [5, 6, 7])


def test_a_prompt_that_does_not_fit_is_refused(engine):
    assert engine.generate([5] * 299, temperature=0.0, ignore_eos=True).finish_reason == "context"
    for length in (300, 301, 5000):
        with pytest.raises(ContextFullError, match=f"{length} tokens.*300"):
            engine.generate([5] * length)


def test_the_context_can_be_bounded(directories):
    engine = specfast.load(*directories, max_context=32)
    assert len(tokens(engine, [5] * 30, ignore_eos=True)) == 2
    with pytest.raises(ContextFullError, match="holds 32"):
        engine.generate([5] * 32)
    for context in (0, 301):
        with pytest.raises(ConfigurationError):
            specfast.load(*directories, max_context=context)


def test_a_draft_with_less_context_stops_drafting_and_decoding_goes_on(directories, tmp_path):
    target, _ = directories
    write_model(tmp_path / "short", decoder_weights(5, layers=1), max_context=40)
    write_tokenizer(tmp_path / "short", byte_level())
    told = []
    engine = specfast.load(target, tmp_path / "short", notify=told.append)
    for length in (10, 39, 60):
        options = {"max_tokens": 80, "temperature": 0.0, "ignore_eos": True, "drafter": "model"}
        result = engine.generate([7] * length, **options)
        assert result.token_ids == engine.generate([7] * length, **options, disabled=True).token_ids
        assert (result.stats.drafted > 0) == (length < 40)
        assert result.stats.fallbacks == 0
    assert told == []


def test_a_draft_that_is_not_smaller_is_told(directories):
    told = []
    specfast.load(directories[0], directories[0], notify=told.append)
    assert [message.startswith("check that the draft model is actually smaller") for message in told] == [True]


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("", {}),
        ([], {}),
        ([320], {}),
        ([-1], {}),
        ("x", {"max_tokens": 0}),
        ("x", {"max_tokens": 1.5}),
        ("x", {"temperature": 3.0}),
        ("x", {"gamma": 21}),
        ("x", {"lenience": 0.4}),
        ("x", {"top_p": 0.0}),
        ("x", {"min_p": 1.1}),
        ("x", {"top_k": -1}),
        ("x", {"seed": -1}),
        ("x", {"seed": 2**64}),
        ("x", {"seed": "seven"}),
        ("x", {"top_k": 2.5}),
        ("x", {"top_p": float("nan")}),
        ("x", {"top_p": None}),
        ("x", {"stop": [""]}),
        ("x", {"rule": "block", "lenience": 1.1}),
        ("x", {"rule": "coupled", "lenience": 0.9}),
        ("x", {"draft_model": "other"}),
        ("x", {"early_exit": 1}),
        ("x", {"gama": 3}),
        (None, {}),
        (5, {}),
        (["a"], {}),
        ([None], {}),
        ([1.0], {}),
        ([True], {}),
        (b"abc", {}),
        ({1, 2}, {}),
        (iter([1]), {}),
        (np.array([1.5]), {}),
        (np.array([[1, 2]]), {}),
        ([1, {"role": "user", "content": "x"}], {}),
        ("x", {"stop": 5}),
        ("x", {"stop": None}),
        ("x", {"temperature": 10**400}),
        ("x", {"lenience": 10**400}),
        ("x", {"top_k_threshold": -(10**400)}),
        ("x", {"gamma": np.array([1, 2])}),
        ("x", {"drafter": np.array([1, 2])}),
        ("x", {"logit_bias": {1: 10**400}}),
        ("x", {"logit_bias": {1: -(10**400)}}),
        ("x", {"logit_bias": [1]}),
        ("x", {"logit_bias": []}),
        ("x", {"logit_bias": "a"}),
        ("x", {"top_p": 1e-320}),
        ("x", {"top_p": 1e-46}),
        ("x", {"repetition_penalty": 1e-320}),
        ([{"role": "user", "content": "x"}], {}),
    ],
)
def test_bad_requests_are_refused_and_the_engine_goes_on(engine, prompt, options):
    with pytest.raises(ConfigurationError):
        engine.generate(prompt, **options)
    assert len(tokens(engine, max_tokens=3, ignore_eos=True)) == 3


@pytest.mark.parametrize(
    "options",
    [{"kv_bits": 8.0}, {"max_context": "x"}, {"max_context": 1.5}, {"max_context": True}, {"threads": "x"}],
    ids=str,
)
def test_bad_options_of_a_load_are_refused(directories, options):
    with pytest.raises(ConfigurationError, match="|".join(str(value) for value in options.values())):
        specfast.load(*directories, **options)


def damaged(directory, root):
    """The same model with a weight that is not a number."""
    decoder = decoder_weights(5)
    decoder.layers[0].up[3, 3] = np.nan
    write_model(root, decoder, max_context=300)
    (root / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    return root


def test_a_draft_of_nan_falls_back_to_plain_decoding_and_says_so_once(directories, tmp_path):
    target, _ = directories
    told = []
    engine = specfast.load(target, damaged(target, tmp_path), notify=told.append)
    told.clear()  # that it is not smaller
    for fallbacks in (1, 2):
        result = engine.generate("def main", max_tokens=40, temperature=0.0)
        assert result.token_ids == tokens(engine, disabled=True)
        assert (result.stats.fallbacks, result.stats.drafted) == (1, 0)
        assert engine.get_speculation_stats()["fallbacks"] == fallbacks
    assert len(told) == 1
    assert "NumericalError" in told[0]


def test_a_target_of_nan_raises(directories, tmp_path):
    _, draft = directories
    engine = specfast.load(damaged(draft, tmp_path), draft)
    for temperature in (0.0, 1.0):
        with pytest.raises(NumericalError, match=r"not finite|NaN"):
            engine.generate("x", temperature=temperature)


def test_stats_before_anything_is_loaded():
    engine = specfast.get_inference_engine("speculative", None, specfast.suggest_speculative_config("llama-3.1-8b"))
    stats = engine.get_speculation_stats()
    assert stats["model_family_compatibility"] == "unknown"
    assert stats["acceptance_rate"] == 0.0
    assert isinstance(stats["acceptance_rate"], float)
    assert stats["lossless"] is False  # the Llama family's lenience
    assert (stats["target_model"], stats["draft_model"]) == ("llama-3.1-8b", "llama-3.2-3b")
    assert {"precision", "rounds", "target_passes", "drafted", "accepted", "fallbacks", "tokens"} <= set(stats)


def test_stats_add_up_over_requests(directories):
    engine = specfast.load(*directories)
    runs = [engine.generate(prompt, max_tokens=20, seed=1).stats for prompt in PROMPTS]
    stats = engine.get_speculation_stats()
    for name in ("tokens", "target_passes", "drafted", "accepted", "prompt_tokens", "rounds", "requests"):
        assert stats[name] == sum(getattr(run, name) for run in runs) > 0
    assert stats["acceptance_rate"] == stats["accepted"] / stats["drafted"]
    assert stats["tokens_per_target_pass"] == stats["tokens"] / stats["target_passes"] > 1
    assert (stats["model_family_compatibility"], stats["lossless"], stats["precision"]) == ("compatible", True, "f32")


def test_lenience_above_one_is_told_once_and_marked(directories):
    told = []
    engine = specfast.load(*directories, lenience=1.5, notify=told.append)
    first = engine.generate("x", max_tokens=20)
    engine.generate("x", max_tokens=20)
    assert not first.lossless
    assert engine.get_speculation_stats()["lossless"] is False
    (message,) = told
    assert "1.5 times" in message
    assert "Lenience 1 is exact" in message
    assert engine.generate("x", max_tokens=5, temperature=0.0).lossless
    assert engine.generate("x", max_tokens=5, disabled=True).lossless
    assert engine.generate("x", max_tokens=5, lenience=0.7).lossless


def test_a_request_comes_before_what_was_typed(directories):
    engine = specfast.load(*directories, gamma=2, temperature=0.5)
    assert engine.generate("x", max_tokens=9).terms.gamma == 2
    assert engine.generate("x", max_tokens=9, gamma=7).terms.gamma == 7
    assert engine.config.gamma == 2


def test_automatic_gamma_measures_and_with_a_seed_does_not(directories):
    told = []
    engine = specfast.load(*directories, gamma="auto", notify=told.append)
    greedy = engine.generate("def main", max_tokens=60, temperature=0.0, ignore_eos=True)
    assert greedy.terms.gamma == "auto"
    assert greedy.token_ids == tokens(engine, max_tokens=60, disabled=True, ignore_eos=True)
    assert told == []
    for options in ({}, {"rule": "token"}, {"lenience": 0.9}):
        runs = [engine.generate("def main", max_tokens=40, seed=3, **options) for _ in range(5)]
        assert len({tuple(run.token_ids) for run in runs}) == 1
        assert runs[0].terms.rule == ("token" if options else "coupled")
        assert ["seed" in line for line in told] == ([True] if options else [])
    assert engine.generate("def main", max_tokens=4).terms.rule == "block"


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_a_seeds_shorter_text_is_the_beginning_of_a_longer_one(directories, rule):
    engine = specfast.load(*directories, gamma=5, rule=rule)
    whole = tokens(engine, max_tokens=30, seed=2, ignore_eos=True)
    for count in range(1, 30):
        assert tokens(engine, max_tokens=count, seed=2, ignore_eos=True) == whole[:count]


def test_the_coupled_rule_is_chosen_for_a_seed_whether_or_not_there_is_a_draft(directories):
    engine = specfast.load(*directories, gamma="auto")
    runs = [engine.generate("def main", max_tokens=40, seed=3, ignore_eos=True, **o) for o in ({}, {"disabled": True})]
    assert runs[0].token_ids == runs[1].token_ids
    assert "rule coupled" in engine.describe(seeded=True)
    assert "rule block" in engine.describe()
    assert engine.get_speculation_stats()["rule"] == "block"


def test_new_models_apply_to_the_next_request(directories, tmp_path):
    target, draft = directories
    write_model(tmp_path / "other", decoder_weights(42), max_context=300)
    write_tokenizer(tmp_path / "other", byte_level())
    other = specfast.load(tmp_path / "other", disabled=True)
    engine = specfast.load(target, draft)
    before = tokens(engine)
    under_way = engine.stream("def main", max_tokens=40, temperature=0.0)
    next(under_way)
    engine.set_models(str(tmp_path / "other"), str(draft))
    for _ in under_way:
        pass
    assert under_way.result().token_ids == before
    assert tokens(engine) == tokens(other) != before
    with pytest.raises(specfast.ModelFormatError, match="no such model"):
        engine.set_models("/nowhere/at/all", None)
    assert tokens(engine) == tokens(other)  # it keeps what it had
    assert engine.get_speculation_stats()["target_model"] == str(tmp_path / "other")


def test_requests_may_be_under_way_together(engine):
    streams = [engine.stream(prompt, max_tokens=30, temperature=0.0) for prompt in PROMPTS]
    for _ in range(40):
        for stream in streams:
            next(stream, None)
    assert [stream.result().token_ids for stream in streams] == [tokens(engine, p, max_tokens=30) for p in PROMPTS]


def test_a_request_given_up_leaves_the_engine_ready(engine):
    expected = tokens(engine)
    stream = engine.stream("def main", max_tokens=40, temperature=0.0)
    next(stream)
    stream.close()
    assert stream.result().finish_reason == "interrupted"
    assert tokens(engine) == expected


def test_a_long_prompt_is_read_in_chunks_with_progress(engine):
    seen = []
    engine.generate([9] * 290, max_tokens=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(256, 289), (289, 289)]


def test_progress_may_interrupt_reading(engine):
    def stop(done, total):
        raise KeyboardInterrupt

    stream = engine.stream([9] * 290, max_tokens=2, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert stream.result().token_ids == []
    assert len(tokens(engine, max_tokens=3, ignore_eos=True)) == 3


def test_unavailable_options_are_refused_when_the_engine_is_built():
    for options in ({"target_engine": "mlx"}, {"draft_engine": "tinygrad"}):
        with pytest.raises(ConfigurationError, match="not available"):
            specfast.load(**options)
    with pytest.raises(ConfigurationError, match="'speculative'"):
        specfast.get_inference_engine("mlx", None, {})


def test_a_target_without_a_draft_says_how_to_get_one(directories):
    told = []
    engine = specfast.load(directories[0], notify=told.append)
    assert engine.pair.draft is None
    assert "suffix" in told[0]
    assert "--speculative-draft-model" in told[0]
    assert specfast.load(directories[0], disabled=True, notify=told.append) is not None
    assert len(told) == 1


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_file_changed_in_place_ends_requests_and_one_renamed_over_does_not(tmp_path, role):
    target, draft = write_pair(tmp_path, max_context=300)
    engine = specfast.load(target, draft)
    expected = tokens(engine)
    path = tmp_path / role / "model.safetensors"
    content = path.read_bytes()

    other = path.with_suffix(".new")
    other.write_bytes(b"x")
    other.rename(path)
    assert tokens(engine) == expected
    path.unlink()
    assert tokens(engine) == expected

    path.write_bytes(content)
    engine.set_models(str(target), str(draft))
    assert tokens(engine) == expected
    for damage in (content, content[: len(content) // 2], b""):
        path.write_bytes(damage)
        with pytest.raises(
            ModelFormatError, match=rf"{role}/model\.safetensors: was changed in place.*{len(damage)} now"
        ):
            engine.stream("x")
    path.write_bytes(content)
    engine.set_models(str(target), str(draft))
    assert tokens(engine) == expected

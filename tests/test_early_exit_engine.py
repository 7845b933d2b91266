"""Early exit in the engine: the plain text for every layer and gamma, the layer chosen by measuring, and its counters."""

import numpy as np
import pytest
import specfast
from specfast import ConfigurationError, _core
from specfast.early_exit import MOST_EXITS, MOST_ROWS, candidate_exits, choose_exit, measure_acceptance
from specfast.errors import NumericalError
from tiny_directories import byte_level, write_model, write_pair, write_tokenizer
from tiny_models import native, random_decoder

PROMPT = "def main(path):\n    return"
GREEDY = _core.Law(temperature=0.0)


def deep(seed, *, matter=(0.1, 0.1, 0.1), damaged=None):
    """A decoder of 4 layers; `matter` is how much those after the first do."""
    decoder = random_decoder(seed, V=320, layers=4, tied=False)
    for layer, share in zip(decoder.layers[1:], matter, strict=True):
        layer.o, layer.down = share * layer.o, share * layer.down
    if damaged is not None:
        decoder.layers[damaged].up[0, 0] = np.nan
    return decoder


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("deep")
    write_model(root, deep(5), max_context=300)
    write_tokenizer(root, byte_level())
    return root


def generate(directory, prompt=PROMPT, *, notify=print, load=None, **options):
    engine = specfast.load(directory, notify=notify, **(load or {}))
    return engine.generate(prompt, **{"max_tokens": 40, "temperature": 0.0, "ignore_eos": True, **options})


@pytest.mark.parametrize("layers", [1, 2, 3, "auto"])
def test_greedy_text_is_plain_and_comes_in_fewer_passes(directory, layers):
    plain = generate(directory, disabled=True)
    for gamma in (1, 2, 5, 20, "auto"):
        run = generate(directory, load={"early_exit": layers, "gamma": gamma})
        assert run.token_ids == plain.token_ids
        assert (run.lossless, run.stats.fallbacks) == (True, 0)
        assert gamma == "auto" or run.stats.target_passes < 40
        assert run.stats.drafted > 0


def test_a_seed_gives_the_same_text_again(directory):
    for load in ({"early_exit": 2}, {"early_exit": "auto"}, {"early_exit": "auto", "gamma": "auto"}):
        texts = [generate(directory, load=load, temperature=0.9, seed=seed).token_ids for seed in (4, 4, 4, 5)]
        assert texts[0] == texts[1] == texts[2] != texts[3]


@pytest.mark.parametrize(
    ("prompt", "options"), [([5 + i % 40 for i in range(280)], {}), ([7], {}), (PROMPT, {"max_tokens": 1})]
)
def test_the_ends_of_context_and_text(directory, prompt, options):
    plain = generate(directory, prompt, disabled=True, **options)
    for layers in (1, "auto"):
        for gamma in (1, 20):
            run = generate(directory, prompt, load={"early_exit": layers, "gamma": gamma}, **options)
            assert (run.token_ids, run.finish_reason, run.stats.fallbacks) == (plain.token_ids, plain.finish_reason, 0)


def test_no_layer_is_run_twice_for_a_token(directory):
    """All rows of prompt and drafts once through all four layers, and no others."""
    engine = specfast.load(directory, early_exit=2, gamma=5)
    stream = engine.stream(PROMPT, max_tokens=40, temperature=0.0, ignore_eos=True)
    for _ in stream:
        pass
    stats = stream.stats
    rows = stats.prompt_tokens - 1 + stats.drafted + stats.target_passes
    assert stream._target.cache.layer_rows == 4 * rows


def test_auto_takes_the_exit_after_which_nothing_happens(tmp_path):
    for last in (1, 2, 3):
        matter = tuple(1.0 if layer < last else 0.0 for layer in (1, 2, 3))
        write_model(tmp_path, deep(3, matter=matter))
        write_tokenizer(tmp_path, byte_level())
        told = []
        run = generate(tmp_path, load={"early_exit": "auto", "gamma": 3}, notify=told.append)
        assert told == [f"early exit after layer {last} of 4"]
        assert run.stats.acceptance_rate == 1.0


def test_the_measured_exit_has_the_most_expected_tokens_per_cost():
    model = native(deep(5))
    text = list(range(100))
    acceptance = measure_acceptance(model, text, GREEDY, candidate_exits(4))
    assert acceptance == measure_acceptance(model, text[-MOST_ROWS:], GREEDY, candidate_exits(4))
    assert sorted(acceptance) == [1, 2, 3]
    assert choose_exit(model, {1: 0.5, 2: 0.5, 3: 0.5}, (5,)).layers == 1  # equal chances: the cheapest
    assert choose_exit(model, {1: 0.0, 2: 1.0, 3: 1.0}, (5,)).layers == 2
    found = choose_exit(model, {1: 0.0, 2: 0.9, 3: 0.0}, range(21))
    assert (found.layers, found.acceptance) == (2, 0.9)
    cost = model.early_bytes(2) / model.weight_bytes + 0.05
    speedups = [sum(0.9**i for i in range(gamma + 1)) / (1 + gamma * cost) for gamma in range(21)]
    assert found.gamma == speedups.index(max(speedups))
    assert found.speedup == pytest.approx(max(speedups))
    assert choose_exit(model, {1: 0.0, 2: 0.0}, range(21))[1:] == (0, 0.0, 1.0)


def test_a_short_text_is_continued_before_it_is_measured():
    model = native(deep(5))
    greedy, cache = [3], _core.Cache(model)
    while len(greedy) < 16:
        greedy.append(int(model.forward(cache, np.array(greedy[-1:], np.int32), 1).argmax()))
        cache.commit(1)
    law = _core.Law(temperature=0.7)
    assert measure_acceptance(model, [3], law, (1, 2)) == measure_acceptance(model, greedy, law, (1, 2))
    short = native(deep(5), max_context=4)
    assert len(measure_acceptance(short, [3], law, (1, 2, 3))) == 3


def test_candidates_are_spread_over_the_layers():
    assert candidate_exits(2) == (1,)
    assert candidate_exits(5) == (1, 2, 3, 4)
    for layers in (9, 16, 80):
        exits = candidate_exits(layers)
        assert (len(exits), exits[0], exits[-1]) == (MOST_EXITS, 1, layers - 1)


def test_layers_that_are_not_there_are_named(directory, tmp_path):
    for layers in (4, 90):
        with pytest.raises(ConfigurationError, match=rf"early_exit is {layers}, outside 1 to 3: .* has 4 layers"):
            specfast.load(directory, early_exit=layers)
    shallow = deep(5)
    shallow.layers = shallow.layers[:1]
    write_model(tmp_path, shallow)
    write_tokenizer(tmp_path, byte_level())
    for layers in (1, "auto"):
        with pytest.raises(ConfigurationError, match=r"has 1 layer .* give a draft model"):
            specfast.load(tmp_path, early_exit=layers)


def test_a_draft_besides_is_an_error_that_names_both(tmp_path):
    target, draft = write_pair(tmp_path)
    with pytest.raises(ConfigurationError, match=f"early_exit 1 and draft_model {draft} are two ways"):
        specfast.load(target, draft, early_exit=1)
    engine = specfast.load(target, early_exit=1)
    with pytest.raises(ConfigurationError, match="two ways"):
        engine.set_models(str(target), str(draft))
    with pytest.raises(ConfigurationError, match="cannot change with a request"):
        engine.generate("x", early_exit=1)


def test_it_says_what_it_does(directory):
    engine = specfast.load(directory, early_exit=2, lenience=1.5)
    assert "draft early exit 2 (typed)" in engine.describe()
    stats = engine.get_speculation_stats()
    assert (stats["model_family_compatibility"], stats["lossless"]) == ("compatible", False)
    assert not engine.generate("x", max_tokens=3).lossless
    assert engine.generate("x", max_tokens=3, disabled=True).lossless
    assert specfast.load(directory, early_exit=2, disabled=True).get_speculation_stats()["lossless"]
    assert "draft none" in specfast.load(directory, early_exit=2, disabled=True).describe()


def test_the_embedded_target_drafts_for_itself():
    engine = specfast.load(temperature=0.0, early_exit=4)
    assert engine.pair.draft is None
    plain = engine.generate(PROMPT, max_tokens=40, disabled=True, ignore_eos=True)
    run = engine.generate(PROMPT, max_tokens=40, ignore_eos=True)
    assert run.token_ids == plain.token_ids
    assert run.stats.acceptance_rate > 0


def test_a_damaged_target_raises_whoever_finds_it(tmp_path):
    write_tokenizer(tmp_path, byte_level())
    for damaged in (0, 3):
        write_model(tmp_path, deep(5, damaged=damaged))
        for layers in (2, "auto"):
            with pytest.raises(NumericalError, match="not finite"):
                generate(tmp_path, load={"early_exit": layers})


def test_a_seeds_text_under_the_coupled_rule_is_the_plain_one(directory):
    plain = generate(directory, temperature=0.9, seed=3, rule="coupled", disabled=True)
    for layers in (1, 3, "auto"):
        for gamma in (1, 4, "auto"):
            run = generate(
                directory, load={"early_exit": layers, "gamma": gamma, "rule": "coupled"}, temperature=0.9, seed=3
            )
            assert run.token_ids == plain.token_ids


def test_penalties_come_before_the_exits_law_too(directory):
    edits = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {17: 2.0}}
    plain = generate(directory, **edits, disabled=True)
    assert plain.token_ids != generate(directory, disabled=True).token_ids
    run = generate(directory, load={"early_exit": 3, "gamma": 4}, **edits)
    assert run.token_ids == plain.token_ids
    assert run.stats.acceptance_rate > 0.2

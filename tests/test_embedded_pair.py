"""The pair that ships with the package: greedy tokens with speculation equal those without, on real text."""

import os
from pathlib import Path

import pytest
import specfast
from specfast import _core, embedded

FULL = os.environ.get("SPECFAST_FULL") == "1"
HERE = Path(__file__).parent
PROMPTS, TOKENS = 40, 128


def prompts(count):
    """Beginnings of Python code, of several lengths, from this repository: the pair was not trained on it."""
    lines = [line for file in sorted(HERE.glob("test_*.py")) for line in file.read_text(encoding="utf-8").splitlines()]
    starts = [i for i, line in enumerate(lines) if line.startswith(("def ", "class ", "    def "))]
    step = len(starts) // count
    return ["\n".join(lines[max(0, at - 5 * (k % 4)) : at + 1]) + "\n" for k, at in enumerate(starts[::step][:count])]


@pytest.fixture(scope="module")
def engine():
    return specfast.load(temperature=0.0)


@pytest.fixture(autouse=True)
def threads():
    before = _core.num_threads()
    yield
    _core.set_num_threads(before)


def assert_identical(engine, prompt, gammas, tokens, threads):
    options = {"max_tokens": tokens, "ignore_eos": True}
    _core.set_num_threads(1)
    plain = engine.generate(prompt, disabled=True, **options)
    assert len(plain.token_ids) == tokens
    passes = []
    for count in threads:
        _core.set_num_threads(count)
        for gamma in gammas:
            run = engine.generate(prompt, gamma=gamma, **options)
            assert run.token_ids == plain.token_ids, f"gamma {gamma}, {count} threads"
            passes.append(run.stats.target_passes)
    return passes


@pytest.mark.parametrize("number", range(PROMPTS))
def test_greedy_tokens_are_the_same(engine, number):
    gammas = range(1, 21) if FULL else (1 + number % 20, 1 + (number + 7) % 20)
    assert_identical(engine, prompts(PROMPTS)[number], gammas, TOKENS, (1, 2) if FULL else (1 + (number % 10 == 9),))


def test_drafting_saves_target_passes(engine):
    passes = [assert_identical(engine, prompt, (5,), 64, (1,))[0] for prompt in prompts(8)]
    assert sum(passes) < 0.8 * 64 * len(passes)


@pytest.mark.parametrize(
    "isa", [isa for isa in _core.build_info()["isas_supported"] if isa != _core.build_info()["isa"]]
)
def test_greedy_tokens_are_the_same_on_the_other_instruction_sets(isa):
    engine = specfast.load(temperature=0.0, isa=isa)
    for prompt in prompts(3):
        assert_identical(engine, prompt, (1, 5, 20), 32, (1,))


@pytest.mark.parametrize("precision", ["bf16", "f32"])
def test_greedy_tokens_are_the_same_at_other_precisions(precision):
    engine = specfast.load(temperature=0.0, precision=precision)
    for prompt in prompts(2):
        assert_identical(engine, prompt, (1, 6), 32, (1,))


def test_a_seed_gives_the_same_text_for_any_number_of_threads(engine):
    texts = []
    for count in (1, 2):
        _core.set_num_threads(count)
        texts.append(engine.generate("import os\n", max_tokens=64, temperature=0.8, seed=5).token_ids)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("gamma", range(1, 9))
def test_a_seeds_text_does_not_depend_on_max_tokens(engine, gamma):
    def run(count):
        return engine.generate("def parse(line):\n", max_tokens=count, gamma=gamma, temperature=0.8, seed=11).token_ids

    long = run(60)
    assert len(long) == 60
    for count in range(1, 60, 1 if FULL else 3):
        assert run(count) == long[:count]


def test_it_is_small_and_its_tokens_agree():
    size = sum(file.stat().st_size for role in ("target", "draft") for file in embedded.path(role).rglob("*"))
    assert size < 25_000_000
    verdict = specfast.compatibility.compare_models(embedded.path("target"), embedded.path("draft"))
    assert (verdict.status, verdict.vocab_match) == ("compatible", True)

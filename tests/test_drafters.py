"""Every drafter on small native pairs: the plain text when greedy, the law when sampled, and who drafts when."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import specfast
from oracle.chi_square import excess
from specfast import ConfigurationError, _core
from specfast.context import Context
from specfast.controllers import AutoGamma, FixedGamma
from specfast.drafters import CombinedDrafter, CopyDrafter, ModelDrafter, NoDrafter
from specfast.generation import Generation
from specfast.targets import NativeTarget
from tiny_directories import byte_level, decoder_weights, write_model, write_pair, write_tokenizer
from tiny_models import native, random_decoder

DRAFTERS = ("model", "suffix", "prompt-lookup", "combined")
COPYING = [5, 6, 7, 8, 9, 10] * 6


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), max_context=300)


@pytest.fixture(scope="module")
def engine(directories):
    return specfast.load(*directories)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("prompt", ["def main(path):", COPYING])
def test_greedy_tokens_are_the_plain_ones(engine, drafter, prompt):
    options = {"max_tokens": 120, "temperature": 0.0, "ignore_eos": True}
    plain = engine.generate(prompt, **options, disabled=True)
    for gamma in (1, 4, 20, "auto"):
        result = engine.generate(prompt, **options, drafter=drafter, gamma=gamma)
        assert result.token_ids == plain.token_ids
        assert (result.terms.drafter, result.terms.gamma) == (drafter, gamma)
    names = {name for name, gamma in result.stats.decisions if gamma}
    assert names <= ({"suffix", "model"} if drafter == "combined" else {drafter})
    assert engine.generate(prompt, **options, drafter="none").stats.drafted == 0


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_seed_gives_the_beginning_of_the_same_text_for_fewer_tokens(engine, drafter):
    def text(max_tokens):
        options = {"seed": 3, "drafter": drafter, "gamma": 4, "temperature": 0.3, "ignore_eos": True}
        return engine.generate(COPYING, max_tokens=max_tokens, **options).token_ids

    whole = text(60)
    assert all(text(n) == whole[:n] for n in (1, 2, 3, 7, 20, 31, 59))


def test_a_text_that_repeats_itself_is_copied(directories):
    # A target whose greedy text has a short period: copying it is always right.
    engine = specfast.load(directories[0], drafter="none")
    options = {"max_tokens": 250, "temperature": 0.0, "ignore_eos": True}
    text = engine.generate("x", **options).token_ids
    for drafter in ("suffix", "prompt-lookup"):
        made = engine.generate("x", **options, drafter=drafter, gamma=5)
        copying = _core.SuffixAutomaton() if drafter == "suffix" else _core.PromptLookup()
        copying.append(np.array([*engine.pair.encode("x"), *text], dtype=np.int32))
        positions = made.stats.by_drafter()[drafter]["positions"]
        assert made.stats.accepted == sum(position["accepted"] for position in positions)
        assert [p["tested"] for p in positions[1:]] <= [p["accepted"] for p in positions[:-1]]
        assert all(p["low"] <= p["acceptance_rate"] <= p["high"] for p in positions)


class Recorded:
    """A drafter that remembers the gamma and the offer of each round."""

    def __init__(self, inner):
        self.inner, self.proposed = inner, []
        self.prefill, self.offers, self.commit = inner.prefill, inner.offers, inner.commit

    def propose(self, context, offer, gamma):
        self.proposed.append((offer.drafter, offer.kind))
        return self.inner.propose(context, offer, gamma)


def run(target, drafter, law, prompt, *, gamma=3, seed=0, max_tokens=40):
    capacity = len(prompt) + max_tokens + 8
    context = Context(list(prompt), max_tokens, capacity)
    made = Generation(context, NativeTarget(target, law, 1.0, seed, capacity), drafter, FixedGamma(gamma))
    list(made)
    return made


def test_the_combined_drafter_copies_where_enough_matches_and_the_model_catches_up():
    target, draft = native(random_decoder(3, V=12)), native(random_decoder(4, V=12, layers=1))
    law = _core.Law(0.0)
    model = ModelDrafter(draft, law, 0, 400)
    drafter = Recorded(CombinedDrafter({"suffix": CopyDrafter("suffix"), "model": model}))
    made = run(target, drafter, law, [1, 2, 3], max_tokens=200)
    assert made.stats.fallbacks == 0
    by_name = Counter(name for name, _ in drafter.proposed)
    assert by_name["suffix"] > 0
    assert by_name["model"] > 0
    assert {kind for name, kind in drafter.proposed if name == "suffix"} <= {f"suffix/{n}" for n in range(3, 7)}
    plain = run(target, NoDrafter(), law, [1, 2, 3], max_tokens=200)
    assert made.result().token_ids == plain.result().token_ids


def test_what_the_model_sat_out_is_read_in_tiles():
    draft = native(random_decoder(4, V=12, layers=1))
    law = _core.Law(0.0)
    model = ModelDrafter(draft, law, 0, 400)
    context = Context([1, 2, 3], 300, 400)
    model.prefill(context.tokens[:-1], None)
    for token in np.random.default_rng(0).integers(0, 12, 100).tolist():
        context.keep([token])
    (offer,) = model.offers(context)
    assert offer.unread == 101
    late = model.propose(context, offer, 4).tokens.tolist()
    fresh = ModelDrafter(draft, law, 0, 400)
    fresh.prefill(context.tokens[:-1], None)
    (offer,) = fresh.offers(context)
    assert offer.unread == 1
    assert fresh.propose(context, offer, 4).tokens.tolist() == late


def exact(target, prompt, length, temperature):
    """The probability of every text."""
    law = _core.Law(temperature)
    chances = {}
    for text in product(range(target.vocab), repeat=length):
        tokens = np.array([*prompt, *text[:-1]], dtype=np.int32)
        rows = _core.law_rows(target.forward(_core.Cache(target), tokens, length), law)
        chances[text] = float(np.prod([rows[i, token] for i, token in enumerate(text)], dtype=np.float64))
    return chances


@pytest.mark.parametrize("drafter", ["suffix", "prompt-lookup"])
def test_sampled_texts_follow_the_law(drafter):
    target, law = native(random_decoder(9, V=4)), _core.Law(1.0)
    prompt, length, texts = [1, 2, 3, 1, 2], 3, 4000
    counts = Counter()
    accepted = 0
    for seed in range(texts):
        made = run(target, CopyDrafter(drafter), law, prompt, gamma=2, seed=seed, max_tokens=length)
        counts[tuple(made.result().token_ids)] += 1
        accepted += made.stats.accepted
    assert accepted > texts / 20

    def far(temperature):
        chances = exact(target, prompt, length, temperature)
        return excess([counts[text] for text in chances], list(chances.values()))

    assert far(1.0) < 1 < far(1.3)  # the other law is told apart


def test_without_a_draft_the_suffix_drafter_is_the_default(directories):
    told = []
    engine = specfast.load(directories[0], notify=told.append)
    options = {"max_tokens": 150, "ignore_eos": True}
    greedy = engine.generate(COPYING, **options, temperature=0.0)
    assert (greedy.terms.drafter, greedy.terms.gamma, greedy.lossless) == ("suffix", "auto", True)
    assert greedy.token_ids == engine.generate(COPYING, **options, temperature=0.0, disabled=True).token_ids
    seeded = engine.generate("x", max_tokens=30, seed=4)
    assert seeded.terms.drafter == "none"
    assert seeded.token_ids == engine.generate("x", max_tokens=30, seed=4, disabled=True).token_ids
    asked = engine.generate("x", max_tokens=30, seed=4, drafter="suffix")
    assert (asked.terms.drafter, asked.terms.gamma, asked.terms.rule) == ("suffix", "auto", "coupled")
    coupled = engine.generate("x", max_tokens=30, seed=4, disabled=True, rule="coupled")
    assert asked.token_ids == coupled.token_ids  # shared noise: the plain text, whatever was copied
    assert "drafter suffix (default)" in engine.describe()
    for drafter in ("model", "combined"):
        with pytest.raises(ConfigurationError, match="needs a draft model"):
            engine.generate("x", drafter=drafter)


def test_a_refused_draft_means_plain_decoding_and_a_typed_copying_drafter_needs_none(directories, tmp_path):
    write_model(tmp_path, decoder_weights(3), max_context=300)
    write_tokenizer(tmp_path, byte_level(vocab=280))
    told = []
    engine = specfast.load(directories[0], tmp_path, notify=told.append)
    assert "incompatible" in told[0]
    for options in ({}, {"drafter": "model"}, {"drafter": "combined"}):
        assert engine.generate("x", max_tokens=5, **options).terms.drafter == "none"
    assert engine.generate("x", max_tokens=5, drafter="suffix").terms.drafter == "suffix"
    engine = specfast.load(*directories, drafter="suffix")
    assert engine.pair.draft is None
    assert engine.generate("x", max_tokens=5, gamma=2).terms.drafter == "suffix"


def test_drafters_that_do_not_exist_are_refused(engine):
    with pytest.raises(ConfigurationError, match="drafter is 'eagle'"):
        engine.generate("x", drafter="eagle")
    assert isinstance(engine.stream("x", gamma="auto")._controller, AutoGamma)

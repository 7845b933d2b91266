"""Drafting with the target's first layers: the draft of the truncated model, the bits of plain decoding, and no layer run twice."""

from dataclasses import replace

import numpy as np
import pytest
from oracle import law as law_oracle
from oracle.model import forward
from specfast import _core
from tiny_models import native, quantised, random_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

L, V = 5, 70
SIZES = {"V": V, "hidden": 64, "layers": L, "heads": 4, "kv_heads": 2}
GREEDY = _core.Law(temperature=0.0)
LAWS = {"greedy": GREEDY, "sampled": _core.Law(temperature=0.9), "top-k": _core.Law(top_k=9, vocab_limit=66)}
PROMPT = np.random.default_rng(0).integers(0, 66, 40).astype(np.int32)
LONG = np.random.default_rng(1).integers(0, 66, 251).astype(np.int32)  # generation crosses a page
DECODER = random_decoder(4, architecture="qwen3", **SIZES)


def int8(architecture="qwen2"):
    decoder, build = quantised(
        random_decoder(5, architecture=architecture, tied=False, **SIZES | {"hidden": 128}), 4, 64
    )
    return decoder, build("int8")


MODELS = {"f32": (DECODER, native(DECODER)), "int8": int8()}


def threads_for(gamma):
    """More threads now and then: they have the same bits, and are slow on a busy machine."""
    return {3: 2, 13: 3, 20: 2}.get(gamma, 1)


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param][1]


def ready(model, tokens=PROMPT[:-1]):
    cache = _core.Cache(model)
    model.prefill(cache, np.asarray(tokens, np.int32))
    return cache


def write(model, law, gamma, layers, count, *, prompt=PROMPT, seed=3):
    """Texts and cache of `count` tokens or more; with layers 0 every proposal is verified by a pass that starts anew."""
    cache, other = ready(model, prompt[:-1]), None if layers else ready(model, prompt[:-1])
    proposal, pending, tokens, kept = _core.Proposal(), prompt[-1:], [], 0
    rounds = 0
    while len(tokens) < count:
        drafting = cache if layers else other
        model.draft_early(drafting, pending, gamma, layers or 2, law, seed, rounds, proposal)
        verdict = model.verify(cache, pending, proposal, law, 1.0, seed, rounds)
        new = [*proposal.tokens[: verdict.tau].tolist(), verdict.next_token]
        cache.commit(len(pending) + verdict.tau)
        if not layers:
            model.prefill(other, np.array([*pending, *new[:-1]], np.int32))
        tokens += new
        kept += verdict.tau
        pending, rounds = np.array([new[-1]], np.int32), rounds + 1
    return tokens, cache, kept


def plain(model, count):
    cache, pending, tokens = ready(model), PROMPT[-1:], []
    for _ in range(count):
        verdict = model.verify(cache, pending, None, GREEDY, 1.0, 0, 0)
        cache.commit(1)
        tokens.append(verdict.next_token)
        pending = np.array([verdict.next_token], np.int32)
    return tokens


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
@pytest.mark.parametrize("layers", range(1, L))
def test_it_drafts_what_the_truncated_model_drafts(law, layers):
    """Tokens and q are those of a model that has the first layers only, bit for bit."""
    whole = native(DECODER)
    short = native(replace(DECODER, layers=DECODER.layers[:layers]))
    early, alone = _core.Proposal(), _core.Proposal()
    for pending in (PROMPT[-1:], PROMPT[-20:]):
        whole.draft_early(ready(whole, PROMPT[: -len(pending)]), pending, 7, layers, law, 5, 2, early)
        short.draft(ready(short, PROMPT[: -len(pending)]), pending, 7, law, 5, 2, alone)
        assert early.tokens.tolist() == alone.tokens.tolist()
        if law.temperature:
            assert np.array_equal(early.q, alone.q)


def test_the_first_drafted_law_is_the_oracles():
    proposal, law = _core.Proposal(), _core.Law()
    whole = native(DECODER)
    for layers in range(1, L):
        whole.draft_early(ready(whole), PROMPT[-1:], 1, layers, law, 0, 0, proposal)
        logits = forward(replace(DECODER, layers=DECODER.layers[:layers]), PROMPT)[-1:]
        assert np.abs(proposal.q[0] - law_oracle.law_rows(logits)[0]).max() < 1e-5


@pytest.mark.parametrize("layers", range(1, L))
def test_greedy_text_is_that_of_plain_decoding(model, layers):
    expected = plain(model, 60)
    for gamma in range(1, 21):
        _core.set_num_threads(threads_for(gamma))
        tokens, _, _ = write(model, GREEDY, gamma, layers, 30)
        assert tokens[:30] == expected[:30], (gamma, layers)


def valid(model, cache):
    """The bytes of the cache's pages that are not of positions behind its last."""
    other = ready(model, [0])
    behind = [np.zeros(cache.kv_bytes(layer).shape, bool) for layer in range(L)]
    for seed in range(4):
        random = np.random.default_rng(seed)
        other.truncate(0)
        model.prefill(other, random.integers(0, V, cache.length).astype(np.int32))
        before = [other.kv_bytes(layer) for layer in range(L)]
        model.forward(other, random.integers(0, V, 512 - cache.length).astype(np.int32), 0)
        for layer in range(L):
            after = other.kv_bytes(layer)[: len(before[layer])]
            behind[layer] |= before[layer] != after
    return [np.where(behind[layer], 0, cache.kv_bytes(layer)) for layer in range(L)]


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
def test_keys_and_values_have_the_bytes_of_plain_decoding(model, law):
    for layers, gamma in ((1, 3), (2, 20), (4, 5)):
        tokens, cache, _ = write(model, law, gamma, layers, 20, prompt=LONG)
        assert cache.length == len(LONG) - 1 + len(tokens) > 256
        reference, pending = ready(model, LONG[:-1]), LONG[-1:]
        for token in tokens:
            model.forward(reference, pending, 0)
            reference.commit(1)
            pending = np.array([token], np.int32)
        for mine, other in zip(valid(model, cache), valid(model, reference), strict=True):
            assert np.array_equal(mine, other)
            assert mine.any()
        model.forward(reference, pending, 0)  # one position more, or bytes that say nothing
        reference.commit(1)
        assert not np.array_equal(valid(model, cache)[3], valid(model, reference)[3])


@pytest.mark.parametrize("law", [LAWS["sampled"], LAWS["top-k"]], ids=["sampled", "top-k"])
def test_sampled_text_and_cache_are_those_of_a_pass_that_starts_anew(model, law):
    """The same proposals, verified once from the drafting layers and once from the embeddings."""
    for gamma in range(1, 21):
        _core.set_num_threads(threads_for(gamma))
        ours, cache, kept = write(model, law, gamma, 2, 40)
        theirs, reference, other = write(model, law, gamma, 0, 40)
        assert (ours, kept) == (theirs, other)
        for layer in range(L):
            assert np.array_equal(cache.kv_bytes(layer), reference.kv_bytes(layer))  # rejected rows too


@pytest.mark.parametrize("pending", [1, 3, 30])
def test_logits_are_those_of_a_pass_that_starts_anew(model, pending):
    """Also where fewer or other tokens follow than were drafted, or more: what is the same is used again."""
    base, proposal = PROMPT[:-pending], _core.Proposal()
    tail = PROMPT[-pending:]
    for layers in range(1, L):
        for gamma in (1, 6, 20):
            cache = ready(model, base)
            model.draft_early(cache, tail, gamma, layers, GREEDY, 0, 0, proposal)
            drafted = proposal.tokens
            other = (drafted + 1) % 66
            for tokens in (
                [*tail, *drafted],
                [*tail, *drafted, 1, 2, 3],
                [*tail, *drafted[: gamma // 2], *other[gamma // 2 :]],
                [*tail[:-1], (tail[-1] + 1) % 66],
                [*tail],
            ):
                tokens = np.array(tokens, np.int32)
                model.draft_early(cache, tail, gamma, layers, GREEDY, 0, 0, proposal)
                logits = model.forward(cache, tokens, len(tokens))
                assert np.array_equal(logits, model.forward(ready(model, base), tokens, len(tokens)))
                cache.rollback()


def window_model(kv_bits):
    decoder = random_decoder(4, architecture="qwen3", windows=(None, 9), **SIZES)
    return native(decoder, kv_bits=kv_bits)


@pytest.mark.parametrize("pending", [1, 4, 25])
@pytest.mark.parametrize("gamma", [1, 2, 5, 20])
@pytest.mark.parametrize(
    "model",
    [*(model for _, model in MODELS.values()), native(DECODER, kv_bits=8), window_model(16), window_model(8)],
    ids=[*MODELS, "8-bit cache", "windows", "windows in 8 bits"],
)
def test_no_layer_runs_twice_for_a_row(model, pending, gamma):
    proposal = _core.Proposal()
    for layers in range(1, L):
        cache = ready(model, PROMPT[:-pending])
        before = cache.layer_rows
        assert before == L * (len(PROMPT) - pending)
        model.draft_early(cache, PROMPT[-pending:], gamma, layers, LAWS["sampled"], 0, 0, proposal)
        assert cache.layer_rows - before == layers * (pending + gamma - 1)
        model.verify(cache, PROMPT[-pending:], proposal, LAWS["sampled"], 1.0, 0, 0)
        assert cache.layer_rows - before == L * (pending + gamma)
        model.draft_early(cache, PROMPT[-pending:], gamma, layers, GREEDY, 0, 0, proposal)
        once = cache.layer_rows
        cache.truncate(cache.length - 1)
        model.forward(cache, PROMPT[-1:], 0)  # somewhere else: the drafted rows are of no use
        assert cache.layer_rows - once == L


def test_what_was_drafted_is_used_only_where_nothing_came_between():
    model = MODELS["f32"][1]
    proposal = _core.Proposal()
    tokens = PROMPT[-6:]
    expected = model.forward(ready(model), tokens, 6)

    def after(disturb):
        cache = ready(model)
        model.draft_early(cache, tokens, 4, 3, GREEDY, 0, 0, proposal)
        disturb(cache)
        before = cache.layer_rows
        logits = model.forward(cache, tokens, 6)
        assert np.array_equal(logits, expected)
        return cache.layer_rows - before

    def overwrite(cache):
        model.forward(cache, np.array([9, 9, 9, 9, 9, 9, 9, 9], np.int32), 0)
        cache.rollback()

    def draft_others(cache):
        model.draft(cache, np.array([9], np.int32), 7, GREEDY, 0, 0, proposal)
        cache.truncate(len(PROMPT) - 1)

    def refuse(cache):
        with pytest.raises(_core.ShapeError, match="vocabulary"):
            model.forward(cache, np.array([1, 99], np.int32), 1)

    assert after(lambda cache: None) == (L - 3) * 6
    assert after(refuse) == (L - 3) * 6
    assert after(overwrite) == after(draft_others) == L * 6


def test_failures_leave_the_cache_as_it_was():
    decoder = random_decoder(1, **SIZES)
    decoder.layers[1].up[0, 0] = np.nan
    damaged, proposal = native(decoder), _core.Proposal()
    cache = _core.Cache(damaged)
    with pytest.raises(_core.NumericalError, match="not finite"):
        damaged.draft_early(cache, PROMPT[:3], 4, 2, GREEDY, 0, 0, proposal)
    assert (cache.length, cache.provisional, proposal.gamma) == (0, 0, 0)
    damaged.draft_early(cache, PROMPT[:3], 4, 1, GREEDY, 0, 0, proposal)  # the layer before is sound
    for _ in range(2):
        with pytest.raises(_core.NumericalError, match="not finite"):
            damaged.verify(cache, PROMPT[:3], proposal, GREEDY, 1.0, 0, 0)
        assert (cache.length, cache.provisional) == (0, 0)

    model = MODELS["f32"][1]
    cache = _core.Cache(model, 20)
    model.prefill(cache, PROMPT[:12])
    expected = model.forward(cache, PROMPT[12:13], 1)
    cache.rollback()
    for pending, gamma, layers, error, match in (
        (PROMPT[:2], 7, 2, _core.ContextFullError, "20 tokens; 12 are in it and 9"),
        ([99], 2, 2, _core.ShapeError, "vocabulary of 70"),
        ([], 2, 2, _core.ShapeError, "at least one"),
        ([1], 65, 2, _core.ShapeError, "gamma 65"),
        ([1], 2, 0, _core.ShapeError, "layer 0 is outside 1 to 4: the model has 5 layers"),
        ([1], 2, 5, _core.ShapeError, "layer 5 is outside 1 to 4"),
    ):
        with pytest.raises(error, match=match):
            model.draft_early(cache, np.array(pending, np.int32), gamma, layers, GREEDY, 0, 0, proposal)
        assert (cache.length, cache.provisional) == (12, 0)
    model.draft_early(cache, PROMPT[:2], 6, 2, GREEDY, 0, 0, proposal)  # exactly full
    model.verify(cache, PROMPT[:2], proposal, GREEDY, 1.0, 0, 0)
    cache.rollback()
    assert np.array_equal(model.forward(cache, PROMPT[12:13], 1), expected)


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
def test_measured_acceptance_is_the_overlap_of_the_laws(law):
    model = native(DECODER)
    exits = np.array([1, 2, 4], np.int32)

    def laws(model, tokens):
        return _core.law_rows(model.forward(_core.Cache(model), tokens, len(tokens)), law)

    for count in (1, 16, 40):
        tokens = LONG[:count]
        p = laws(model, tokens)
        shorts = [laws(native(replace(DECODER, layers=DECODER.layers[:layers])), tokens) for layers in exits]
        expected = [np.minimum(p, q).astype(np.float64).sum(1).mean() for q in shorts]
        for threads in (1, 2):
            _core.set_num_threads(threads)
            cache = _core.Cache(model)
            measured = model.exit_acceptance(cache, tokens, exits, law)
            assert np.allclose(measured, expected, rtol=1e-12, atol=1e-12)
            assert (cache.length, cache.provisional) == (0, count)
            assert cache.layer_rows == L * count
    cache = ready(model, LONG[:200])  # and after a context, in parts
    whole = model.exit_acceptance(ready(model, LONG[:200]), LONG[200:216], exits, law)
    parts = []
    for first in range(200, 216, 4):
        parts.append(model.exit_acceptance(cache, LONG[first : first + 4], exits, law))
        cache.commit(4)
    assert np.allclose(np.mean(parts, 0), whole, rtol=1e-12)
    with pytest.raises(_core.ShapeError, match="ascend"):
        model.exit_acceptance(cache, PROMPT[:3], np.array([2, 2], np.int32), law)
    with pytest.raises(_core.ShapeError, match="outside 1 to 4"):
        model.exit_acceptance(cache, PROMPT[:3], np.array([5], np.int32), law)


def test_the_bytes_of_early_layers_add_up():
    model = MODELS["int8"][1]
    steps = [model.early_bytes(layers) for layers in range(1, L)]
    assert len(set(np.diff([*steps, model.weight_bytes]))) == 1
    assert steps[0] < model.weight_bytes / 2

"""The cache as a transaction: random appends, commits, rollbacks, truncations and wraps equal recomputation from the
tokens kept, bit for bit, in every kind of cache."""

import os
from dataclasses import dataclass, field

import numpy as np
import pytest
from specfast import _core
from tiny_models import native, random_decoder

CONTEXT = 1400
SEQUENCES = 10_000 if os.environ.get("SPECFAST_FULL") else 200
KINDS = {
    "full": {},
    "full in bf16": {"precision": "bf16"},
    "full in 8 bits": {"kv_bits": 8},
    "window": {"windows": (70,)},
    "wide window in bf16": {"windows": (300,), "precision": "bf16"},
    "window in 8 bits": {"windows": (70,), "kv_bits": 8},
    "windows of some layers": {"windows": (None, 9, 260)},
    "windows of some layers in 8 bits": {"windows": (None, 9, 260), "kv_bits": 8},
    "sinks": {"cache": {"windows": [66, 66], "sinks": [4, 4], "undo": 64}},
    "many sinks in bf16": {"cache": {"windows": [20, 20], "sinks": [300, 300]}, "precision": "bf16"},
    "sinks in 8 bits": {"cache": {"windows": [300, 300], "sinks": [1, 1], "undo": 1}, "kv_bits": 8},
    "sinks of some layers": {"windows": (None, 9, 260), "cache": {"windows": [0, 9, 250], "sinks": [0, 3, 257]}},
}


@dataclass
class Kind:
    """A model and the kind of caches it has."""

    model: _core.Model
    options: dict = field(default_factory=dict)  # of caches

    def cache(self, capacity=0):
        return _core.Cache(self.model, capacity, **self.options)

    def logits_after(self, tokens):
        return self.model.forward(self.cache(), np.asarray(tokens, dtype=np.int32), 1)[0]


def kind_of(windows=(None,), cache=None, **options):
    decoder = random_decoder(3, V=40, hidden=32, architecture="qwen3", layers=max(2, len(windows)), windows=windows)
    return Kind(native(decoder, max_context=CONTEXT, **options), cache or {})


KIND = {kind: kind_of(**options) for kind, options in KINDS.items()}
MODEL = KIND["full"].model
GREEDY = _core.Law(temperature=0.0)
ACTIONS = ("append", "append", "append", "commit", "commit", "rollback", "truncate", "end", "fail", "draft", "draft")


def draft_early(model, cache, pending, rng):
    """Drafts with some first layers, and reads none, some or all of that: the tokens that are provisional."""
    gamma, exit_layer, proposal = int(rng.integers(1, 21)), int(rng.integers(1, model.layers)), _core.Proposal()
    model.draft_early(cache, pending, gamma, exit_layer, GREEDY, 0, 0, proposal)
    if rng.random() < 0.3:
        return []
    tokens = [*pending.tolist(), *proposal.tokens[: rng.choice([0, 1, gamma])].tolist()]
    model.forward(cache, np.array(tokens, dtype=np.int32), 0)
    return tokens


def run_random_steps(kind, rng):
    model, cache, kept, open_tokens = kind.model, kind.cache(), [], []
    for _ in range(rng.integers(5, 25)):
        action, n = rng.choice(ACTIONS), int(rng.integers(1, rng.choice([22, 400])))
        if action == "append":
            tokens = rng.integers(0, 40, min(n, CONTEXT - len(kept) - len(open_tokens)))
            if len(tokens):
                model.forward(cache, tokens.astype(np.int32), 0)
                open_tokens += tokens.tolist()
        elif action == "draft":
            most = min(n, CONTEXT - len(kept) - 20)
            if most > 0:
                open_tokens = draft_early(model, cache, rng.integers(0, 40, most).astype(np.int32), rng)
        elif action in ("commit", "end"):
            n = min(n, len(open_tokens))
            cache.commit(n)
            kept, open_tokens = kept + open_tokens[:n], []
            if action == "end":  # the text ended inside the round; the next one starts
                cache.truncate(0)
                kept = []
        elif action == "rollback":
            cache.rollback()
            open_tokens = []
        elif action == "truncate":
            length = max(0, len(kept) - n)
            try:
                cache.truncate(length)
                kept, open_tokens = kept[:length], []
            except _core.ShapeError as error:
                assert "window has moved on" in str(error)
                assert n > kind.options.get("undo", 0)
        else:
            with pytest.raises(_core.SpecfastError):
                model.forward(cache, np.array([1, 99], dtype=np.int32), 1)  # no such token
        assert (cache.length, cache.provisional) == (len(kept), len(open_tokens))
    if len(kept) + len(open_tokens) < CONTEXT:
        last = model.forward(cache, np.array([7], dtype=np.int32), 1)[0]
        assert np.array_equal(last, kind.logits_after([*kept, *open_tokens, 7]))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KIND.values(), ids=KIND)
def test_random_transactions_equal_recomputation(kind):
    for seed in range(SEQUENCES):
        run_random_steps(kind, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", KIND.values(), ids=KIND)
def test_rounds_far_beyond_a_window(kind):
    """Rounds of gamma + 1 rows of which some are kept, as speculation makes them, over many wraps."""
    model, rng = kind.model, np.random.default_rng(1)
    cache, kept = kind.cache(), []
    while len(kept) < CONTEXT - 30:
        M = int(rng.integers(1, 22))
        rows = rng.integers(0, 40, M).astype(np.int32)
        logits = model.forward(cache, rows, M)
        n = int(rng.integers(0, M + 1))
        cache.commit(n)
        kept += rows[:n].tolist()
        if rng.random() < 0.1:
            assert np.array_equal(logits[0], kind.logits_after([*kept[: len(kept) - n], rows[0]]))
    assert np.array_equal(model.forward(cache, np.array([7], dtype=np.int32), 1)[0], kind.logits_after([*kept, 7]))


@pytest.mark.parametrize("kind", KIND.values(), ids=KIND)
def test_provisional_rows_push_nothing_out(kind):
    """However many rows are provisional, a rollback finds all that the next row sees."""
    model, tokens = kind.model, np.arange(200, dtype=np.int32) % 40
    cache = kind.cache()
    model.prefill(cache, tokens)
    for count in (400, 300, 100, 21):
        model.forward(cache, np.full(count, 3, dtype=np.int32), 0)
    cache.rollback()
    last = model.forward(cache, np.array([7], dtype=np.int32), 1)[0]
    assert np.array_equal(last, kind.logits_after([*tokens, 7]))


def test_memory_is_that_of_the_window():
    model = KIND["window"].model
    cache, one = _core.Cache(model), _core.Cache(model)
    model.forward(one, np.zeros(1, dtype=np.int32), 0)
    for _ in range(CONTEXT // 20):
        model.prefill(cache, np.zeros(20, dtype=np.int32))
    assert (
        cache.nbytes <= 3 * one.nbytes
    )  # a window of 70 and a round of 20 lie in two pages, and a third is freed late
    assert cache.kv_bytes(0).size <= cache.nbytes // 2  # of two layers
    full = _core.Cache(MODEL)
    MODEL.prefill(full, np.zeros(CONTEXT, dtype=np.int32))
    assert full.nbytes == 6 * one.nbytes


def test_8_bits_are_a_quarter_of_32_and_half_of_16():
    decoder = random_decoder(3, head_dim=64)
    position = {
        (precision, bits): native(decoder, precision=precision, kv_bits=bits).kv_bytes_per_position
        for precision in ("f32", "bf16")
        for bits in (8, 16)
    }
    vectors = 2 * 2 * 2  # keys and values, layers, heads
    assert position["f32", 16] == vectors * 64 * 4
    assert position["bf16", 16] == vectors * 64 * 2
    assert position["f32", 8] == position["bf16", 8] == vectors * (64 + 4)
    with pytest.raises(_core.ShapeError, match="4 bits are not supported"):
        native(decoder, kv_bits=4)


def test_undo_and_sinks_need_little_memory():
    kind = KIND["sinks"]
    cache = kind.cache()
    kind.model.prefill(cache, np.zeros(1, dtype=np.int32))
    one = cache.nbytes
    for _ in range(CONTEXT // 20 - 1):
        kind.model.prefill(cache, np.zeros(20, dtype=np.int32))
    assert cache.nbytes <= 4 * one  # a page of sinks besides


@pytest.mark.parametrize("kind", ["sinks", "sinks in 8 bits"])
def test_what_can_be_undone(kind):
    """Also by calls of many rows, and then again up to the same length."""
    kind = KIND[kind]
    cache, undo = kind.cache(), kind.options["undo"]
    tokens = np.arange(1380, dtype=np.int32) * 7 % 40
    kind.model.prefill(cache, tokens[:300])
    while cache.length < 1380:
        first = cache.length
        kind.model.prefill(cache, tokens[first : first + 30])
        if cache.length < 1300:
            cache.truncate(first + 30 - undo % 30)
    cache.truncate(cache.length - undo)
    last = kind.model.forward(cache, np.array([7], dtype=np.int32), 1)[0]
    assert np.array_equal(last, kind.logits_after([*tokens[: 1380 - undo], 7]))
    assert not np.array_equal(last, kind.logits_after([*tokens[: 1381 - undo], 7]))


def test_sinks_are_the_oracles():
    from oracle.model import forward

    decoder = random_decoder(3, V=40, hidden=32, architecture="qwen3", layers=2)
    tokens = np.random.default_rng(2).integers(0, 40, 903).astype(np.int32)
    for layer in decoder.layers:
        layer.window, layer.sinks = 66, 4
    exact = forward(decoder, tokens)
    kind = KIND["sinks"]
    cache = kind.cache()
    for first in range(0, 903, 21):
        logits = kind.model.forward(cache, tokens[first : first + 21], 21)
        assert np.abs(logits - exact[first : first + 21]).max() < 1e-4 * np.abs(exact).max()
        cache.commit(21)
    for layer in decoder.layers:
        layer.sinks = 3
    assert np.abs(logits - forward(decoder, tokens)[-len(logits) :]).max() > 1e-3 * np.abs(exact).max()


def test_impossible_windows_are_refused():
    for options, words in (
        ({"windows": [1]}, "of 2 layers are needed, got 1 and 1"),
        ({"windows": [1, 1], "sinks": [1]}, "got 2 and 1"),
        ({"windows": [1, -1]}, "are -1, outside"),
        ({"windows": [1, 1], "sinks": [1 << 31, 0]}, "are 2147483648, outside"),
        ({"sinks": [1, 1]}, "are those of windows"),
        ({"undo": -1}, "undo is -1"),
    ):
        with pytest.raises(_core.ShapeError, match=words):
            _core.Cache(MODEL, **options)


def test_what_a_window_gave_up_cannot_come_back():
    kind = KIND["window"]
    model, cache = kind.model, kind.cache()
    model.prefill(cache, np.arange(700, dtype=np.int32) % 40)
    model.prefill(cache, np.zeros(1, dtype=np.int32))
    with pytest.raises(_core.ShapeError, match="shortest possible length is 581, or 0"):
        cache.truncate(580)  # the next row would see from 511, and 512 is the first there is
    assert cache.length == 701
    cache.truncate(581)
    tokens = np.arange(582) % 40
    assert np.array_equal(model.forward(cache, np.array([581 % 40], dtype=np.int32), 1)[0], kind.logits_after(tokens))


@pytest.mark.parametrize("kind", KIND.values(), ids=KIND)
def test_a_lost_rollback_would_be_caught(kind):
    model, cache = kind.model, kind.cache()
    model.forward(cache, np.array([1, 2, 3], dtype=np.int32), 0)
    cache.commit(3)
    wrong = model.forward(cache, np.array([7], dtype=np.int32), 1)[0]
    assert not np.array_equal(wrong, kind.logits_after([1, 2, 7]))


def test_a_full_cache_is_refused_and_unchanged():
    cache = _core.Cache(MODEL, 10)
    MODEL.prefill(cache, np.arange(8, dtype=np.int32))
    for call in (
        lambda: MODEL.forward(cache, np.arange(3, dtype=np.int32), 1),
        lambda: MODEL.prefill(cache, np.arange(3, dtype=np.int32)),
        lambda: MODEL.draft(cache, np.arange(1, dtype=np.int32), 4, _core.Law(0.0), 0, 0, _core.Proposal()),
    ):
        with pytest.raises(_core.ContextFullError, match="10 tokens"):
            call()
        assert (cache.length, cache.provisional) == (8, 0)


BROKEN = 39  # a token of which nothing but NaN comes


def broken_kind_of(windows=(None,), cache=None, **options):
    decoder = random_decoder(
        3, V=40, hidden=32, architecture="qwen3", layers=max(2, len(windows)), windows=windows, tied=False
    )
    decoder.embed[BROKEN] = np.nan
    return Kind(native(decoder, max_context=CONTEXT, **options), cache or {})


@pytest.mark.parametrize("length", [1, 255, 256, 700])
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_that_raises_leaves_the_cache_as_it_was(kind, length):
    """Whatever raises, and in whatever row: lengths, and the bits of a draft and a pass afterwards."""
    kind = broken_kind_of(**KINDS[kind])
    tokens, pending = np.arange(length, dtype=np.int32) % 39, np.array([7, 8, 9], dtype=np.int32)
    damaged = np.array([7, BROKEN, 9], dtype=np.int32)
    model, cache, proposal = kind.model, kind.cache(length + 24), _core.Proposal()
    fresh = kind.cache()
    model.prefill(fresh, tokens)
    model.draft_early(fresh, pending, 20, 1, GREEDY, 0, 0, proposal)
    drafted = proposal.tokens.tolist()
    logits = model.forward(fresh, pending, 3)
    model.prefill(cache, tokens)

    def verify_drafted_in_part():
        model.draft_early(cache, pending, 20, 1, GREEDY, 0, 0, proposal)
        tokens = proposal.tokens
        tokens[13] = BROKEN
        proposal.set_tokens(tokens)
        model.verify(cache, pending, proposal, GREEDY, 1.0, 0, 0)

    numerical, full = (_core.NumericalError, "not finite"), (_core.ContextFullError, "context")
    for call, (error, match) in (
        (lambda: model.verify(cache, damaged, None, GREEDY, 1.0, 0, 0), numerical),
        (lambda: model.draft(cache, damaged, 4, GREEDY, 0, 0, proposal), numerical),
        (lambda: model.draft_early(cache, damaged, 20, 1, GREEDY, 0, 0, proposal), numerical),
        (verify_drafted_in_part, numerical),
        (lambda: model.draft(cache, pending, 60, GREEDY, 0, 0, proposal), full),
        (lambda: model.draft_early(cache, pending, 60, 1, GREEDY, 0, 0, proposal), full),
        (lambda: model.forward(cache, np.full(600, 3, np.int32), 1), full),
    ):
        with pytest.raises(error, match=match):
            call()
        assert (cache.length, cache.provisional) == (length, 0)
        assert np.array_equal(model.forward(cache, pending, 3), logits)
        cache.rollback()
        model.draft_early(cache, pending, 20, 1, GREEDY, 0, 0, proposal)
        assert proposal.tokens.tolist() == drafted
        assert np.array_equal(model.forward(cache, pending, 3), logits)
        cache.rollback()


def test_impossible_commits_are_refused():
    cache = _core.Cache(MODEL)
    MODEL.forward(cache, np.arange(3, dtype=np.int32), 0)
    with pytest.raises(_core.ShapeError, match="3 are provisional"):
        cache.commit(4)
    with pytest.raises(_core.ShapeError, match="holds 0"):
        cache.truncate(1)
    with pytest.raises(_core.ShapeError, match=f"context of {CONTEXT}"):
        _core.Cache(MODEL, CONTEXT + 1)

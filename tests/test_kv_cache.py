"""The cache as a transaction: random appends, commits, rollbacks and truncations equal recomputation from the tokens kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specfast import _core
from tiny_models import native, random_decoder

MODEL = native(random_decoder(3, V=40, hidden=32, architecture="qwen3"), max_context=600)
STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "commit", "rollback", "truncate", "fail"]), st.integers(1, 90)), max_size=25
)


def logits_after(tokens):
    cache = _core.Cache(MODEL)
    return MODEL.forward(cache, np.asarray(tokens, dtype=np.int32), 1)[0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(STEPS, st.integers(0, 2**31))
def test_random_transactions_equal_recomputation(steps, seed):
    rng = np.random.default_rng(seed)
    cache, kept, open_tokens = _core.Cache(MODEL), [], []
    for action, n in steps:
        if action == "append":
            tokens = rng.integers(0, 40, min(n, 600 - len(kept) - len(open_tokens)))
            if len(tokens):
                MODEL.forward(cache, tokens.astype(np.int32), 0)
                open_tokens += tokens.tolist()
        elif action == "commit":
            n = min(n, len(open_tokens))
            cache.commit(n)
            kept, open_tokens = kept + open_tokens[:n], []
        elif action == "rollback":
            cache.rollback()
            open_tokens = []
        elif action == "truncate":
            cache.truncate(max(0, len(kept) - n))
            kept, open_tokens = kept[: max(0, len(kept) - n)], []
        else:
            with pytest.raises(_core.SpecfastError):
                MODEL.forward(cache, np.array([1, 99], dtype=np.int32), 1)  # no such token
        assert (cache.length, cache.provisional) == (len(kept), len(open_tokens))
    if len(kept) + len(open_tokens) < 600:
        last = MODEL.forward(cache, np.array([7], dtype=np.int32), 1)[0]
        assert np.array_equal(last, logits_after([*kept, *open_tokens, 7]))


def test_a_lost_rollback_would_be_caught():
    cache = _core.Cache(MODEL)
    MODEL.forward(cache, np.array([1, 2, 3], dtype=np.int32), 0)
    cache.commit(3)
    wrong = MODEL.forward(cache, np.array([7], dtype=np.int32), 1)[0]
    assert not np.array_equal(wrong, logits_after([1, 2, 7]))


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


def test_impossible_commits_are_refused():
    cache = _core.Cache(MODEL)
    MODEL.forward(cache, np.arange(3, dtype=np.int32), 0)
    with pytest.raises(_core.ShapeError, match="3 are provisional"):
        cache.commit(4)
    with pytest.raises(_core.ShapeError, match="holds 0"):
        cache.truncate(1)
    with pytest.raises(_core.ShapeError, match="context of 600"):
        _core.Cache(MODEL, 601)

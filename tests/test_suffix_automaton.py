"""Suffix automaton and prompt lookup: what they find is what looking everywhere finds, at a constant cost a token."""

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import seen_text
from specfast import _core

LONGEST = {_core.SuffixAutomaton: None, _core.PromptLookup: 3}
BOTH = pytest.mark.parametrize("kind", LONGEST, ids=lambda kind: kind.__name__)


def ids(tokens):
    return np.array(tokens, dtype=np.int32)


def agrees(kind, tokens, *, latest=True):
    """Checks every prefix of a text."""
    text, proposal = kind(), _core.Proposal()
    for n in range(1, len(tokens) + 1):
        pushed = text.push(tokens[n - 1])
        so_far = tokens[:n]
        length, ends = seen_text.match(so_far, LONGEST[kind])
        if (
            pushed != length
            or text.match_length != length
            or (text.match_end not in ends if length else text.match_end != -1)
        ):
            return False
        if latest and length and text.match_end != ends[-1]:
            return False
        drafted = text.propose(7, 1, proposal)
        expected = seen_text.continuation(so_far, text.match_end, 7) if length else []
        if proposal.tokens.tolist() != expected or drafted != len(expected):
            return False
    return True


@BOTH
@given(tokens=st.lists(st.integers(0, 3), max_size=60))
@settings(max_examples=300, deadline=None)
def test_small_alphabets(kind, tokens):
    assert agrees(kind, tokens, latest=False)


@BOTH
@given(parts=st.lists(st.sampled_from([[1, 2, 3, 4], [1, 2, 9], [5, 5, 5], [7], [2**31 - 1, 0]]), max_size=25))
@settings(max_examples=200, deadline=None)
def test_texts_of_repeated_parts(kind, parts):
    assert agrees(kind, [token for part in parts for token in part], latest=False)


@BOTH
def test_the_latest_earlier_occurrence_is_found(kind):
    draw = random.Random(3)
    words = [[draw.randrange(50) for _ in range(draw.randrange(1, 7))] for _ in range(12)]
    text = [token for _ in range(60) for token in draw.choice(words)]
    assert agrees(kind, text)
    assert agrees(kind, [5] * 70)
    assert agrees(kind, [1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3])


def test_the_oracle_can_disagree():
    class Shifted(_core.PromptLookup):
        match_end = property(lambda self: max(super().match_end - 1, -1))

    LONGEST[Shifted] = 3
    try:
        assert not agrees(Shifted, [1, 2, 1, 2, 3, 1, 2])
    finally:
        del LONGEST[Shifted]


@BOTH
def test_tokens_may_come_in_pieces_of_any_size(kind):
    draw = random.Random(5)
    tokens = [draw.randrange(6) for _ in range(3000)]
    one, many = kind(), kind()
    one.append(ids(tokens))
    done = 0
    while done < len(tokens):
        count = draw.randrange(0, 40)
        many.append(ids(tokens[done : done + count]))
        done += count
    assert len(one) == len(many) == 3000
    assert (one.match_length, one.match_end) == (many.match_length, many.match_end)


@BOTH
def test_what_is_proposed_has_no_law_and_knows_its_limits(kind):
    text, proposal = kind(), _core.Proposal()
    assert (len(text), text.match_length, text.match_end) == (0, 0, -1)
    assert text.propose(5, 1, proposal) == 0
    text.append(ids([1, 2, 3, 4, 1, 2]))
    assert text.propose(3, 2, proposal) == 3
    assert proposal.tokens.tolist() == [3, 4, 1]
    assert proposal.q is None
    assert text.propose(3, 3, proposal) == 0
    assert proposal.tokens.tolist() == []
    assert text.propose(0, 1, proposal) == 0
    assert text.propose(1000, 0, proposal) == 64
    assert proposal.tokens.tolist()[:8] == [3, 4, 1, 2, 3, 4, 1, 2]  # it goes on periodically


TEXTS = {
    "one token": np.zeros,
    "two tokens": lambda n: np.random.default_rng(0).integers(0, 2, n),
    "never again": np.arange,
    "many tokens": lambda n: np.random.default_rng(1).integers(0, 100_000, n),
    "fibonacci word": lambda n: np.array(fibonacci(n)),
    "a block, copied": lambda n: np.tile(np.random.default_rng(2).integers(0, 999, n // 4), 4),
}


def fibonacci(n):
    a, b = [0], [0, 1]
    while len(b) < n:
        a, b = b, b + a
    return b[:n]


@BOTH
@pytest.mark.parametrize("text", TEXTS)
def test_time_and_memory_grow_with_the_text_only(kind, text):
    def seconds(n):
        tokens, best = ids(TEXTS[text](n)), float("inf")
        for _ in range(3):
            grown = kind()
            start = time.thread_time()
            grown.append(tokens)
            best = min(best, time.thread_time() - start)
            assert grown.nbytes < {_core.SuffixAutomaton: 216, _core.PromptLookup: 104}[kind] * n + 4096
        return best

    assert seconds(160_000) < 60 * seconds(10_000) + 0.05  # quadratic would be 256


def test_calls_from_several_threads_wait_for_each_other():
    from concurrent.futures import ThreadPoolExecutor

    text = _core.SuffixAutomaton()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: text.append(ids([i] * 500)), range(40)))
    assert len(text) == 20_000

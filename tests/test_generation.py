"""The loop on a toy: what is kept, what the caches hold, what is counted, whatever happens in the middle."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from specfast import _core
from specfast.context import Context
from specfast.controllers import FixedGamma
from specfast.drafters import NoDrafter, Offer
from specfast.errors import NumericalError
from specfast.generation import Generation

V, EOS = 23, 22


def follow(tokens):
    """The toy's law: the one token that follows a text. It depends on all of it."""
    state = 7
    for token in tokens:
        state = (state * 31 + token * 17 + 5) % 1009
    return state % (V - 1)


class Toy:
    """Caches as the native ones: provisional rows, of which a commit keeps the first."""

    def __init__(self):
        self.cached, self.provisional = [], []

    def prefill(self, tokens, progress):
        self.cached = list(tokens)
        if progress:
            progress(len(tokens), len(tokens))

    def read(self, context):
        """The tokens to read: what follows the cache, which must be a part of the context."""
        assert self.cached == context.tokens[: len(self.cached)], "the cache holds what the context does not"
        pending = context.tokens[len(self.cached) :]
        assert pending, "the last token is in the cache already"
        return pending


class ToyTarget(Toy):
    def verify(self, context, proposal):
        pending, drafted = self.read(context), proposal.tokens.tolist() if proposal else []
        assert len(pending) == 1, "the target fell behind"
        self.provisional = [*pending, *drafted]
        text = list(context.tokens)
        tau = 0
        while tau < len(drafted) and drafted[tau] == follow(text):
            text.append(drafted[tau])
            tau += 1
        return SimpleNamespace(tau=tau, next_token=follow(text))

    def commit(self, kept):
        assert 1 <= kept <= len(self.provisional)
        self.cached += self.provisional[:kept]


class ToyDrafter(Toy):
    """Right with a given probability."""

    def __init__(self, right=0.7, seed=0):
        super().__init__()
        self.random, self.right = random.Random(seed), right
        self.behind = []

    def offers(self, context):
        return [Offer("model", "model", 0.7, 64, len(context.tokens) - len(self.cached))]

    def propose(self, context, offer, gamma):
        pending = self.read(context)
        self.behind.append(len(pending))
        self.cached += pending
        drafted = []
        for _ in range(gamma):
            token = follow(self.cached + drafted)
            drafted.append(token if self.random.random() < self.right else (token + 1) % V)
        self.provisional = drafted[:-1]
        proposal = _core.Proposal()
        proposal.set_tokens(np.asarray(drafted, np.int32))
        return proposal

    def commit(self, kept):
        self.cached += self.provisional[: kept - 1]
        self.provisional = []


def plain(prompt, count, eos=()):
    text = list(prompt)
    while len(text) < len(prompt) + count:
        text.append(follow(text))
        if text[-1] in eos:
            break
    return text[len(prompt) :]


def generation(prompt, drafter, gamma, *, max_tokens=30, capacity=200, eos=(), text=None, **options):
    context = Context(list(prompt), max_tokens, capacity, eos, text)
    return Generation(context, ToyTarget(), drafter, FixedGamma(gamma), **options)


class Words:
    """A text stream that stops after a given number of tokens, or never."""

    def __init__(self, stop_after=None):
        self.count, self.stop_after = 0, stop_after

    @property
    def stopped(self):
        return self.count == self.stop_after

    def push(self, token):
        self.count += 1
        return f"{token} "

    def flush(self):
        return "."


@given(
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=6),
    gamma=st.integers(1, 20),
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    max_tokens=st.integers(1, 60),
    capacity=st.integers(10, 70),
    eos=st.sets(st.integers(0, V - 2), max_size=2),
    seed=st.integers(0, 99),
)
def test_any_drafter_gives_the_plain_text(prompt, gamma, right, max_tokens, capacity, eos, seed):
    drafter = ToyDrafter(right, seed)
    run = generation(prompt, drafter, gamma, max_tokens=max_tokens, capacity=capacity, eos=eos)
    room = min(max_tokens, capacity - len(prompt))
    expected = plain(prompt, room, eos)
    chunks = list(run)
    result, stats = run.result(), run.stats

    assert result.token_ids == expected == [token for chunk in chunks for token in chunk.token_ids]
    if expected[-1] in eos:
        assert result.finish_reason == "eos"
    else:
        assert result.finish_reason == ("context" if len(prompt) + len(expected) == capacity else "length")

    assert (stats.prompt_tokens, stats.tokens, stats.target_passes) == (len(prompt), len(expected), len(chunks))
    assert stats.accepted <= stats.drafted
    assert len(expected) - len(chunks) <= stats.accepted <= len(expected)
    assert stats.drafted <= gamma * len(chunks)
    if right == 0.0:
        assert stats.accepted == 0
    if right == 1.0:
        assert stats.target_passes <= -(-len(expected) // (gamma + 1)) + 1 or eos
    assert set(drafter.behind) <= {1, 2}

    # Everything kept is in the target's cache but the last token, and nothing else.
    target = run._target
    assert target.cached == [*prompt, *expected][:-1]


def test_nothing_is_drafted_that_could_not_be_kept():
    for max_tokens in range(1, 12):
        run = generation([1, 2], ToyDrafter(1.0), 4, max_tokens=max_tokens)
        list(run)
        assert run.stats.tokens == max_tokens
        assert (
            run.stats.drafted == run.stats.accepted == max_tokens - max_tokens // 5
        )  # full rounds have a token of their own


def test_an_end_token_inside_a_round_ends_it():
    text = plain([3], 30)
    end = next(i for i, token in enumerate(text) if i >= 7 and token not in text[:i])
    run = generation([3], ToyDrafter(1.0), 20, eos={text[end]}, text=Words())
    (chunk,) = run
    assert chunk.token_ids == tuple(text[: end + 1])
    assert chunk.text == "".join(f"{token} " for token in text[:end]) + "."  # an end token has no text
    assert (run.stats.tokens, run.stats.accepted, run.stats.drafted) == (end + 1, end + 1, 20)
    assert run.result().finish_reason == "eos"


@pytest.mark.parametrize("stop_after", [1, 3, 6, 7, 12])
def test_a_stop_string_inside_a_round_ends_it(stop_after):
    run = generation([3], ToyDrafter(1.0), 5, text=Words(stop_after))
    chunks = list(run)
    assert run.result().token_ids == plain([3], stop_after)
    assert run.result().finish_reason == "stop"
    assert len(chunks) == -(-stop_after // 6)
    assert run._target.cached == [3, *plain([3], stop_after)][:-1]


def test_a_request_without_room_generates_nothing():
    run = generation([1] * 8, ToyDrafter(), 4, capacity=8)
    assert list(run) == []
    assert run.result().finish_reason == "context"


class FailingDrafter(ToyDrafter):
    def __init__(self, fail_in, after=3, error=NumericalError):
        super().__init__(1.0)
        self.fail_in, self.after, self.error = fail_in, after, error

    def _maybe_fail(self, name):
        self.after -= name == self.fail_in
        if name == self.fail_in and self.after <= 0:
            raise self.error("logits of row 0 are not finite")

    def prefill(self, tokens, progress):
        self._maybe_fail("prefill")
        super().prefill(tokens, progress)

    def offers(self, context):
        self._maybe_fail("offers")
        return super().offers(context)

    def propose(self, context, offer, gamma):
        self._maybe_fail("propose")
        return super().propose(context, offer, gamma)

    def commit(self, kept):
        self._maybe_fail("commit")
        super().commit(kept)


@pytest.mark.parametrize("fail_in", ["prefill", "offers", "propose", "commit"])
@pytest.mark.parametrize("error", [NumericalError, RuntimeError])
def test_a_failing_drafter_is_told_once_and_plain_decoding_goes_on(fail_in, error):
    told = []
    drafter = FailingDrafter(fail_in, 1 if fail_in == "prefill" else 3, error)
    run = generation([5, 6], drafter, 4, max_tokens=40, on_draft_failure=told.append)
    list(run)
    assert run.result().token_ids == plain([5, 6], 40)
    assert [type(failure) for failure in told] == [error]
    assert run.stats.fallbacks == 1
    assert run.stats.fallback_reasons == {f"{error.__name__}: logits of row 0 are not finite": 1}
    assert run.stats.rounds == {"prefill": 0, "offers": 2, "propose": 2, "commit": 3}[fail_in]


class FailingTarget(ToyTarget):
    def __init__(self, fail_at, error):
        super().__init__()
        self.fail_at, self.error, self.calls = fail_at, error, 0

    def verify(self, context, proposal):
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error
        return super().verify(context, proposal)


@pytest.mark.parametrize("error", [NumericalError, KeyboardInterrupt])
def test_a_failing_target_or_ctrl_c_ends_the_request_with_everything_consistent(error):
    target, ended = FailingTarget(3, error), []
    context = Context([4, 4], 40, 200)
    run = Generation(context, target, ToyDrafter(1.0), FixedGamma(4), on_end=ended.append)
    with pytest.raises(error):
        list(run)
    result = run.result()
    assert result.token_ids == plain([4, 4], 10)
    assert result.finish_reason == "interrupted"
    assert target.cached == context.tokens[:-1]
    assert ended == [run.stats]
    assert run.stats.tokens == 10
    assert list(run) == []


def test_closing_early_keeps_the_counts():
    ended = []
    run = generation([1], ToyDrafter(1.0), 3, on_end=ended.append)
    next(run)
    run.close()
    run.close()
    assert ended == [run.stats]
    assert (run.stats.tokens, run.result().finish_reason) == (4, "interrupted")


@pytest.mark.parametrize(("position", "lacking"), [(0, "verify"), (1, "propose"), (2, "update")])
def test_parts_that_lack_a_method_are_refused_at_once(position, lacking):
    parts = [ToyTarget(), NoDrafter(), FixedGamma(3)]
    known = {
        name: getattr(parts[position], name)
        for name in ("prefill", "offers", "commit", "plan")
        if hasattr(parts[position], name)
    }
    parts[position] = SimpleNamespace(**known)
    with pytest.raises(TypeError, match=f"lacks {lacking}"):
        Generation(Context([1], 2, 9), *parts)


def test_a_wrong_commit_would_be_caught():
    class Forgetful(ToyTarget):
        def commit(self, kept):
            self.cached += self.provisional[: kept + 1]

    run = Generation(Context([1, 2], 30, 99), Forgetful(), ToyDrafter(0.5), FixedGamma(4))
    with pytest.raises(AssertionError):
        list(run)


def test_time_between_chunks_is_not_counted(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def tick():
        clock.now += 1.0
        return clock.now

    monkeypatch.setattr("specfast.generation.time", SimpleNamespace(perf_counter=tick))
    run = generation([1], NoDrafter(), 4, max_tokens=5)
    before = next(run).token_ids
    after_one = run.stats.total_seconds
    clock.now += 1000
    assert before
    list(run)
    assert run.stats.total_seconds < 10 * after_one

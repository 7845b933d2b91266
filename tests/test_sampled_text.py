"""What draft and verify write on real models follows the target's law, computed from the oracle's forward pass."""

import itertools
import os

import numpy as np
import pytest
from oracle import law as law_oracle
from oracle.chi_square import excess
from oracle.model import forward
from specfast import _core
from tiny_models import native, random_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

V, LENGTH = 8, 3
PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
TEXTS = 200_000 if os.environ.get("SPECFAST_FULL") == "1" else 5_000
LAWS = {
    "plain": {},
    "cool top-k": {"temperature": 0.75, "top_k": 5},
    "top-p": {"top_p": 0.85},
    "warm min-p of a padded vocabulary": {"temperature": 1.5, "min_p": 0.125, "vocab_limit": 7},
}


@pytest.fixture(scope="module")
def pair():
    """A target and a draft that is a noisy copy of it, so that they agree often and not always."""
    target, draft = random_decoder(1, V=V), random_decoder(1, V=V)
    rng = np.random.default_rng(2)
    draft.embed = draft.embed + rng.normal(0, 0.1, draft.embed.shape)
    return target, draft


def text_law(target, options, edits=None, allowed=None):
    """The law of the first LENGTH tokens after the prompt, (V,) * LENGTH, by running the oracle on every text."""
    law = np.zeros((V,) * LENGTH)
    for text in itertools.product(range(V), repeat=LENGTH):
        logits = forward(target, [*PROMPT, *text[:-1]])[-LENGTH:]
        if edits is not None:
            before = [[*PROMPT, *text[:k]] for k in range(LENGTH)]
            masks = [allowed(tokens) if allowed else None for tokens in before]
            logits = [
                law_oracle.adjust_logits(logits[k], before[k], len(PROMPT), allowed=masks[k], **edits)
                for k in range(LENGTH)
            ]
        law[text] = np.prod(law_oracle.law_rows(logits, **options)[range(LENGTH), text])
    return law


class Writer:
    """Writes texts round by round, as the engine does; with early_exit the target drafts with so many of its layers."""

    def __init__(
        self, pair, options, *, gamma=2, lenience=1.0, with_q=True, early_exit=0, rule="token", adjustments=lambda: None
    ):
        self.target, self.draft = (native(decoder) for decoder in pair)
        self.caches = [_core.Cache(model) for model in (self.target, self.draft)]
        self.target.prefill(self.caches[0], PROMPT[:-1])
        self.draft.prefill(self.caches[1], PROMPT[:-1])
        self.law, self.gamma, self.lenience, self.with_q = _core.Law(**options), gamma, lenience, with_q
        self.early_exit = early_exit
        self.rule, self.adjustments = rule, adjustments
        self.kept = self.drafted = 0

    def text(self, seed, round_of=lambda number: number):
        for cache in self.caches:
            cache.truncate(len(PROMPT) - 1)
        kv, draft_kv = self.caches
        pending = draft_pending = PROMPT[-1:]
        text, proposal, adjustments = [], _core.Proposal(), self.adjustments()
        if adjustments:
            adjustments.follow(PROMPT)
        for number in itertools.count():
            key = round_of(number)
            draws = self.law, seed, key, proposal, self.rule, adjustments
            if self.early_exit:
                self.target.draft_early(kv, pending, self.gamma, self.early_exit, *draws)
            else:
                self.draft.draft(draft_kv, draft_pending, self.gamma, *draws)
            tokens = proposal.tokens
            if not self.with_q:
                proposal.set_tokens(tokens)
            verdict = self.target.verify(
                kv, pending, proposal, self.law, self.lenience, seed, key, self.rule, adjustments
            )
            kv.commit(len(pending) + verdict.tau)
            draft_kv.commit(min(verdict.tau, draft_kv.provisional))
            self.kept += verdict.tau
            self.drafted += len(tokens)
            text += [*tokens[: verdict.tau].tolist(), verdict.next_token]
            if adjustments:
                adjustments.follow(np.array(text[adjustments.length - len(PROMPT) :], np.int32))
            if len(text) >= LENGTH:
                return tuple(text[:LENGTH])
            pending = np.array([verdict.next_token], np.int32)
            draft_pending = np.append(tokens[-1:], pending) if verdict.tau == len(tokens) > 0 else pending
        raise AssertionError

    def counts(self, texts, **keys):
        counts = np.zeros((V,) * LENGTH)
        for seed in range(texts):
            counts[self.text(seed, **keys)] += 1
        return counts


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
@pytest.mark.parametrize("options", LAWS.values(), ids=list(LAWS))
@pytest.mark.parametrize("gamma", [1, 3])
def test_sampled_text_follows_the_target(pair, options, gamma, rule):
    writer = Writer(pair, options, gamma=gamma, rule=rule)
    assert excess(writer.counts(TEXTS), text_law(pair[0], options)) < 1
    assert 0.2 < writer.kept / writer.drafted < 0.99


@pytest.mark.parametrize("options", LAWS.values(), ids=list(LAWS))
@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_text_drafted_by_the_targets_first_layer_follows_the_target(pair, options, rule):
    writer = Writer(pair, options, early_exit=1, rule=rule)
    assert excess(writer.counts(TEXTS), text_law(pair[0], options)) < 1
    assert 0.05 < writer.kept / writer.drafted < 0.99


def test_drafted_tokens_without_a_law_follow_the_target(pair):
    assert excess(Writer(pair, {}, with_q=False).counts(TEXTS), text_law(pair[0], {})) < 1


EDITS = {
    "repetition_penalty": 1.25,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "penalty_window": 4,
    "logit_bias": {2: 1.5, 4: -1.0},
}


def rising_or_even(tokens):
    """A grammar that depends on the token before: after an odd one only larger ones or even ones may follow."""
    last = tokens[-1]
    return np.array([last % 2 == 0 or token > last or token % 2 == 0 for token in range(V)])


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_penalties_biases_and_masks_change_target_and_draft_position_by_position(pair, rule):
    law = text_law(pair[0], {}, EDITS, rising_or_even)
    edits = {**EDITS, "mask": rising_or_even}
    writer = Writer(pair, {}, rule=rule, adjustments=lambda: _core.Adjustments(prompt_length=len(PROMPT), **edits))
    assert excess(writer.counts(TEXTS), law) < 1
    assert 0.2 < writer.kept / writer.drafted < 0.99
    if rule == "token":
        assert (
            excess(
                writer.counts(TEXTS),
                text_law(pair[0], {}, {**EDITS, "presence_penalty": 0.0, "frequency_penalty": 0.0}, rising_or_even),
            )
            > 1
        )
        del edits["mask"]
        assert excess(writer.counts(TEXTS), law) > 1


@pytest.mark.parametrize("early_exit", [0, 1])
@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_proposals_that_stop_after_drafted_end_tokens_follow_the_target(pair, rule, early_exit):
    ends = [1, 4]
    stopping = {"gamma": 3, "rule": rule, "early_exit": early_exit}
    writer = Writer(pair, {}, adjustments=lambda: _core.Adjustments(prompt_length=len(PROMPT), ends=ends), **stopping)
    assert excess(writer.counts(TEXTS), text_law(pair[0], {})) < 1
    whole = Writer(pair, {}, **stopping)
    whole.counts(TEXTS)
    assert writer.drafted < 0.95 * whole.drafted  # some did stop
    assert 0.05 < writer.kept / writer.drafted < 0.99


def test_lenience_below_one_is_exact_and_above_one_is_not(pair):
    law = text_law(pair[0], {})
    assert excess(Writer(pair, {}, lenience=0.6).counts(TEXTS), law) < 1
    assert excess(Writer(pair, {}, lenience=2.0).counts(TEXTS), law) > 1


def test_draws_used_again_in_a_later_round_are_caught(pair):
    counts = Writer(pair, {}).counts(TEXTS, round_of=lambda number: 0)
    assert excess(counts, text_law(pair[0], {})) > 1


def test_the_drafts_law_is_caught(pair):
    assert excess(Writer(pair, {}).counts(TEXTS), text_law(pair[1], {})) > 1


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_gives_the_same_text_again(pair, seed):
    writer = Writer(pair, {})
    assert len({writer.text(seed) for _ in range(3)}) == 1

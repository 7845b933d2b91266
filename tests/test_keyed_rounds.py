"""Rounds on real random keys follow the law: small laws over several rounds, and the embedded pair's, by chi-square.

A false alarm has probability 1e-6 for each comparison; every comparison has controls that must fail.
"""

import os

import numpy as np
import pytest
import specfast
from oracle import verify as oracle
from oracle.chi_square import excess
from specfast import _core, ops

FULL = os.environ.get("SPECFAST_FULL") == "1"
DRAFT, ACCEPT, RESIDUAL = 0, 1, 2
RULES = ("token", "block")

# --- four tokens over several rounds, V = 2 ---

P, Q = np.float32([0.3, 0.7]), np.float32([0.7, 0.3])
LENGTH, GAMMA = 4, 2


def texts(rule, runs, *, with_round=True, dropping=False):
    """Counts of LENGTH tokens, (2,) * LENGTH, each run with its own seed and its rounds keyed by their numbers."""
    counts = np.zeros((2,) * LENGTH)
    for seed in range(runs):
        text, number = [], 0
        while len(text) < LENGTH:
            key = number if with_round else 0
            tokens = [_core.sample_token(Q, _core.uniform(seed, key, i, DRAFT)) for i in range(GAMMA)]
            if dropping:
                tokens = tokens[: next((i for i, x in enumerate(tokens) if Q[x] < 0.5), GAMMA)]
            gamma = len(tokens)
            u = [_core.uniform(seed, key, i, ACCEPT) for i in range(gamma)]
            u.append(_core.uniform(seed, key, gamma, RESIDUAL))
            p, q = np.tile(P, (gamma + 1, 1)), np.tile(Q, (gamma, 1))
            tau, token = ops.verify_tokens(p, q, np.array(tokens, np.int32), np.array(u), rule=rule)
            text += [*tokens[:tau], token]
            number += 1
        counts[tuple(text[:LENGTH])] += 1
    return counts


LAW = oracle.joint([np.broadcast_to(np.float64(P), (2,) * (k + 1)) for k in range(LENGTH)])


@pytest.mark.parametrize("rule", RULES)
def test_four_tokens_follow_the_law(rule):
    assert excess(texts(rule, 1_000_000 if FULL else 10_000), LAW) < 1


def test_keys_without_the_round_are_caught():
    """The block rule looks at draws beyond tau; used again in a later round they bias it."""
    assert excess(texts("block", 10_000, with_round=False), LAW) > 1


@pytest.mark.parametrize("rule", RULES)
def test_dropping_a_drawn_token_for_its_own_low_q_is_caught(rule):
    assert excess(texts(rule, 10_000, dropping=True), LAW) > 1


@pytest.mark.parametrize("lenience", [1.1, 2.0])
def test_the_bound_on_a_lenience_above_one_is_reached(lenience):
    """Exactly, over the draft: a token drafted more than lenience times too often gets lenience times its probability."""
    p, q = np.array([0.25, 0.75]), np.array([0.75, 0.25])
    text = np.zeros(2)
    for x in range(2):
        law = oracle.verdict_law(kernel, np.array([p, p]), q[None], [x], lenience)
        text += q[x] * law[0]
        text[x] += q[x] * law[1].sum()
    assert (text <= lenience * p + 1e-12).all()
    assert text[0] == pytest.approx(lenience * p[0], abs=1e-12)


def kernel(p, q, tokens, u, lenience):
    return ops.verify_tokens(
        np.float32(p), np.float32(q), np.array(tokens, np.int32), np.array(u), rule="token", lenience=lenience
    )


# --- laws of the embedded pair in fixed contexts ---

PROMPTS = ("def add(a, b):\n    return", "import os\nimport", "class Stack:\n    def __init__(self", "for i in range(")
ROUNDS = 20_000 if FULL else 4_000
SAMPLING = _core.Law(temperature=0.9)


@pytest.fixture(scope="module")
def pair():
    return specfast.load().pair


@pytest.fixture(scope="module")
def rows(pair):
    """Laws of the target in three contexts and of the draft in two, used as if each followed the one before."""

    def law(model, prompt):
        tokens = np.array(pair.encode(prompt, raw=True, system=None), np.int32)
        logits = model.forward(_core.Cache(model), tokens, 1)
        return _core.law_rows(logits, SAMPLING)

    p = np.concatenate([law(pair.target.model, prompt) for prompt in PROMPTS[:3]])
    return p, np.concatenate([law(pair.draft.model, prompt) for prompt in PROMPTS[:2]])


def bins_of(law):
    """A bin for each of the seven likeliest tokens, one for the rest."""
    bins = np.full(law.size, 7)
    bins[np.argsort(-law)[:7]] = range(7)
    return bins


def binned(law):
    return np.bincount(bins_of(law), law, minlength=8)


def two_tokens(rows, rule, verdict=None, sampled=None, reuse=False):
    """Counts (8, 8) of the first two tokens, binned, of many rounds; `sampled` are laws drawn from that are not told."""
    p, q = rows
    verdict = verdict or (lambda tokens, u: ops.verify_tokens(p, q, tokens, u, rule=rule))
    counts, bins = np.zeros((8, 8)), [bins_of(row) for row in p[:2]]
    for i in range(ROUNDS):
        laws = q if sampled is None else sampled
        tokens = np.array([_core.sample_token(laws[k], _core.uniform(1, i, k, DRAFT)) for k in range(2)], np.int32)
        u = np.array([*(_core.uniform(1, i, k, ACCEPT) for k in range(2)), _core.uniform(1, i, 2, RESIDUAL)])
        if reuse:  # the draws that chose the drafted tokens also test them
            u[:2] = [_core.uniform(1, i, k, DRAFT) for k in range(2)]
        tau, token = verdict(tokens, u)
        text = [*tokens[:tau], token]
        if len(text) == 1:  # the next round is plain
            text.append(_core.sample_token(p[1], _core.uniform(2, i, 0, RESIDUAL)))
        counts[bins[0][text[0]], bins[1][text[1]]] += 1
    return counts


@pytest.mark.parametrize("rule", RULES)
def test_the_embedded_pairs_rounds_follow_the_target(rows, rule):
    p, q = rows
    law = np.outer(binned(np.float64(p[0])), binned(np.float64(p[1])))
    assert excess(two_tokens(rows, rule), law) < 1

    def wrong_residual(tokens, u):
        tau, token = ops.verify_tokens(p, q, tokens, u, rule=rule)
        return tau, token if tau == 2 else _core.sample_token(p[tau], u[2])

    assert excess(two_tokens(rows, rule, wrong_residual), law) > 1
    assert excess(two_tokens(rows, rule, sampled=np.sqrt(q)), law) > 1
    assert excess(two_tokens(rows, rule, reuse=True), law) > 1


@pytest.mark.parametrize("rule", [*RULES, "coupled"])
def test_rounds_of_the_native_decoder_follow_the_target(pair, rule):
    """Draft and verify end to end; the first token kept, over seeds."""
    prompt = np.array(pair.encode(PROMPTS[3], raw=True, system=None), np.int32)
    target, draft = pair.target.model, pair.draft.model
    caches = _core.Cache(target), _core.Cache(draft)
    logits = target.forward(caches[0], prompt, 1)
    law = np.float64(_core.law_rows(logits, SAMPLING)[0])
    caches[0].rollback()
    for model, cache in zip((target, draft), caches, strict=True):
        model.prefill(cache, prompt[:-1])
    proposal, first, kept = _core.Proposal(), [], 0
    for seed in range(500):
        caches[1].truncate(len(prompt) - 1)
        draft.draft(caches[1], prompt[-1:], 3, SAMPLING, seed, 0, proposal, rule)
        verdict = target.verify(caches[0], prompt[-1:], proposal, SAMPLING, 1.0, seed, 0, rule)
        caches[0].rollback()
        first.append(proposal.tokens[0] if verdict.tau else verdict.next_token)
        kept += verdict.tau
    assert excess(np.bincount(bins_of(law)[first], minlength=8), binned(law)) < 1
    drafts = [_core.sample_token(np.float32(np.sqrt(law)), _core.uniform(seed, 0, 0, DRAFT)) for seed in range(500)]
    assert excess(np.bincount(bins_of(law)[drafts], minlength=8), binned(law)) > 1
    assert 0 < kept < 1500

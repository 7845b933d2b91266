"""A whole speculative decoder on Metal kernels: its tokens are the native host's at precision f32."""

import os

import numpy as np
import pytest
from metal_decoder import MetalLoop, MetalModel
from metal_launch import RandomMatrix, run
from specfast import _core, metal
from tiny_models import MATRICES, native, random_decoder

FULL = os.environ.get("SPECFAST_FULL") == "1"
TOKENS = 60 if FULL else 16
GAMMA, SEED = 3, 20


def native_text(target, draft, prompt, *, temperature, rule):
    """What the native host decodes, with the verdicts' tau."""
    law = _core.Law(temperature=temperature)
    caches = _core.Cache(target), _core.Cache(draft)
    proposal, text, taus = _core.Proposal(), [int(t) for t in prompt], []
    target.prefill(caches[0], prompt[:-1])
    caches[0].commit(caches[0].provisional)
    number = 0
    while len(text) < len(prompt) + TOKENS:
        pending = np.array(text[caches[1].length :], np.int32)
        draft.draft(caches[1], pending, GAMMA, law, SEED, number, proposal, rule)
        verdict = target.verify(caches[0], np.array(text[-1:], np.int32), proposal, law, 1.0, SEED, number, rule)
        caches[0].commit(verdict.tau + 1)
        caches[1].commit(min(verdict.tau, GAMMA - 1))
        text += [*map(int, proposal.tokens[: verdict.tau]), verdict.next_token]
        taus.append(verdict.tau)
        number += 1
    return text[len(prompt) :], taus


def metal_text(target, draft, matrices, prompt, rounds, *, temperature, rule, execute):
    schedule = iter(range(1 << 30))

    def one(launch, *buffers):
        execute(launch, *buffers, schedule=next(schedule) % 5)

    on_metal = [MetalModel(decoder, matrices, one, 128) for decoder in (target, draft)]
    loop = MetalLoop(*on_metal, prompt, gamma=GAMMA, rule=rule, temperature=temperature, seed=SEED)
    for number in range(rounds):
        loop.round(number)  # nothing is read in between
    return loop.text[: loop.state[2]].tolist()


@pytest.mark.parametrize(
    ("architecture", "temperature", "rule"),
    [("llama", 0.0, "token"), ("qwen2", 0.8, "token"), ("qwen3", 1.0, "block"), ("llama", 1.0, "coupled")],
)
def test_tokens_are_the_native_ones(architecture, temperature, rule):
    target = random_decoder(
        3, V=600, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, architecture=architecture, tied=False
    )
    draft = random_decoder(
        3, V=600, hidden=64, layers=1, heads=4, kv_heads=2, head_dim=32, architecture=architecture, tied=False
    )
    draft.head, draft.embed = target.head, target.embed
    prompt = np.random.default_rng(1).integers(0, 600, 12).astype(np.int32)
    wanted, taus = native_text(native(target), native(draft), prompt, temperature=temperature, rule=rule)
    found = metal_text(target, draft, {}, prompt, len(taus), temperature=temperature, rule=rule, execute=run)
    assert found == wanted
    assert len(set(taus)) > 1 or temperature == 0


def quantise(decoder, weights):
    """Gives a decoder random quantised matrices; returns them as the kernels and as the native model take them."""
    rng, matrices, packs = np.random.default_rng(9), {}, {}

    def made(w, spread=2.0):
        matrix = RandomMatrix(rng, weights, "f32", *w.shape, spread)
        matrices[id(matrix.floats)] = (weights, matrix.buffers)
        packs[id(matrix.floats)] = matrix.native
        return matrix.floats

    for layer in decoder.layers:
        for name in MATRICES:
            setattr(layer, name, made(getattr(layer, name)))
    decoder.embed, decoder.head = made(decoder.embed), made(decoder.head)
    return matrices, packs


@pytest.mark.parametrize("rule", ["block", "coupled"])
def test_generated_sources_give_the_same_tokens(rule):
    pytest.importorskip("mlx.core")
    from mlx_metal import run_generated

    made = [random_decoder(3, V=300, hidden=64, layers=n, heads=2, kv_heads=1, head_dim=32) for n in (2, 1)]
    prompt = np.random.default_rng(2).integers(0, 300, 6).astype(np.int32)
    texts = [
        metal_text(*made, {}, prompt, 4, temperature=0.9, rule=rule, execute=execute)
        for execute in (run, run_generated)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) >= 4


def test_quantised_weights_and_a_perfect_draft():
    target = random_decoder(5, V=300, hidden=64, layers=1, heads=2, kv_heads=1, head_dim=32, tied=False)
    matrices, packs = quantise(target, metal.Weights(4, 32))
    prompt = np.random.default_rng(1).integers(0, 300, 15).astype(np.int32)
    model = native(target, packs=packs)
    wanted, taus = native_text(model, model, prompt, temperature=1.0, rule="block")
    found = metal_text(target, target, matrices, prompt, len(taus), temperature=1.0, rule="block", execute=run)
    assert found == wanted
    assert taus == [GAMMA] * len(taus)  # every round ends with a token that the draft has not read

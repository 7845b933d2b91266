"""Every drafter writes the plain text: over caches whose windows move on many times, and under edits and stop strings."""

import functools
import os

import numpy as np
import pytest
import specfast
from tiny_directories import byte_level, write_model, write_tokenizer
from tiny_models import random_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = os.environ.get("SPECFAST_FULL") == "1"
DRAFTERS = ("model", "suffix", "prompt-lookup", "combined", "early-exit")
LAYERS, WINDOW, CONTEXT = 4, 20, 2000
CONFIGS = {
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "llama": {},
}
EDITS = {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.1, "penalty_window": 30}
BIAS = {17: 4.0, 90: 4.0, 40: -2.0, 41: -np.inf}  # with two favourites even a penalised text has something to copy
PROMPT = [5 + i * i % 61 for i in range(700)]
GAMMAS = range(1, 21) if FULL else (1, 5, 20)
TOKENS = 1200 if FULL else 400  # beyond 700 of the prompt: pages of 256 positions are given up, and used again


def deep(architecture, layers=LAYERS):
    """Layers after the first matter little: the first alone is a draft, and an exit, that often agrees."""
    decoder = random_decoder(5, V=320, layers=LAYERS, tied=False, architecture=architecture)
    for layer in decoder.layers[1:]:
        layer.o, layer.down = 0.15 * layer.o, 0.15 * layer.down
    decoder.layers = decoder.layers[:layers]
    return decoder


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root, tokenizer = tmp_path_factory.mktemp("pairs"), byte_level()
    for kind, config in CONFIGS.items():
        for role, layers in (("target", LAYERS), ("draft", 1)):
            decoder = deep("qwen2" if kind == "qwen2" else "llama", layers)
            write_model(root / kind / role, decoder, max_context=CONTEXT, **config)
            write_tokenizer(root / kind / role, tokenizer)
    return root


@pytest.fixture(scope="module")
def load(directories):
    @functools.cache
    def load(kind, drafter, exit_layer=1, **options):
        target, draft = directories / kind / "target", directories / kind / "draft"
        if drafter == "early-exit":
            return specfast.load(target, early_exit=exit_layer, **options)
        return specfast.load(target, draft, drafter=drafter, **options)

    return load


def write(engine, prompt=PROMPT, **options):
    """A request's result, and its target's cache."""
    stream = engine.stream(prompt, **{"max_tokens": TOKENS, "ignore_eos": True, **options})
    for _ in stream:
        pass
    return stream.result(), stream._target.cache


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.8, "rule": "coupled", "seed": 6}], ids=["greedy", "coupled"]
)
def test_text_over_windows_that_move_on(load, kind, kv_bits, drafter, options):
    engine = load(kind, drafter, kv_bits=kv_bits)
    plain, cache = write(engine, disabled=True, **options)
    bytes_of_plain = cache.nbytes
    assert cache.length == len(PROMPT) + TOKENS - 1
    accepted = 0
    for gamma in (*GAMMAS, "auto"):
        run, cache = write(engine, gamma=gamma, **options)
        assert run.token_ids == plain.token_ids, gamma
        assert (run.terms.drafter, run.stats.fallbacks) == (drafter, 0)
        accepted += run.stats.accepted
        assert cache.nbytes <= 1.5 * bytes_of_plain
        if drafter == "early-exit":  # every row once through every layer
            rows = run.prompt_tokens - 1 + run.stats.drafted + run.stats.target_passes
            assert cache.layer_rows == LAYERS * rows
    assert accepted > 0


def test_the_windows_are_seen(load):
    """The window decides the text: without it another one is written."""
    texts = [write(load(kind, "none"), temperature=0.0)[0].token_ids for kind in ("mistral", "llama")]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("kv_bits", [16, 8])
def test_text_under_penalties_biases_and_stop_strings(load, kv_bits, drafter):
    """Greedy, and 8 seeds under the coupled rule; each text is cut by a string from its own middle, too."""
    engine = load("mistral", drafter, exit_layer=2, kv_bits=kv_bits)
    prompt = PROMPT[:60]
    accepted = 0
    for seed in (None, *range(8)):
        law = {"temperature": 0.0} if seed is None else {"temperature": 0.7, "rule": "coupled", "seed": seed}
        options = {**EDITS, **law, "logit_bias": BIAS, "max_tokens": 60}
        plain, _ = write(engine, prompt, disabled=True, **options)
        free, _ = write(engine, prompt, disabled=True, **law, max_tokens=60)
        assert plain.token_ids != free.token_ids  # the edits are seen
        stop = next(
            plain.text[at : at + 2] for at in range(12, len(plain.text)) if "\ufffd" not in plain.text[at : at + 2]
        )
        cut, _ = write(engine, prompt, disabled=True, stop=[stop], **options)
        assert cut.finish_reason == "stop"
        for gamma in range(1, 21) if FULL else (2, 7, 20):
            run, _ = write(engine, prompt, gamma=gamma, **options)
            assert run.token_ids == plain.token_ids, (seed, gamma)
            stopped, _ = write(engine, prompt, gamma=gamma, stop=[stop], **options)
            assert (stopped.token_ids, stopped.text, stopped.finish_reason) == (cut.token_ids, cut.text, "stop")
            accepted += run.stats.accepted
    assert accepted > 0

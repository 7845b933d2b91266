"""Sliding windows from config.json to text: which layers have one, Mistral end to end, and a bounded cache."""

import numpy as np
import pytest
import specfast
from oracle.model import forward
from specfast import _core
from specfast.architecture import read_config
from specfast.checkpoint import load_model
from specfast.errors import ModelFormatError, UnsupportedModelError
from tiny_directories import byte_fallback, decoder_weights, write_model, write_tokenizer

INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
SLIDING = {**QWEN, "use_sliding_window": True, "sliding_window": 20}


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({**MISTRAL, "sliding_window": 20}, (20, 20)),
        ({**MISTRAL, "sliding_window": None}, (0, 0)),
        ({**MISTRAL, "max_position_embeddings": 8000}, (4096, 4096)),
        ({**MISTRAL, "sliding_window": 512}, (0, 0)),  # no context outgrows it
        ({**MISTRAL, "sliding_window": 511}, (511, 511)),
        ({"sliding_window": 20}, (0, 0)),
        ({**QWEN, "sliding_window": 20}, (0, 0)),
        ({**QWEN, "sliding_window": 20, "use_sliding_window": False}, (0, 0)),
        (SLIDING, (0, 0)),  # from layer 28 on
        ({**SLIDING, "max_window_layers": 1}, (0, 20)),
        ({**SLIDING, "max_window_layers": 0}, (20, 20)),
        ({**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}, (20, 0)),
        ({**QWEN, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}, (0, 0)),  # not used
        ({**MISTRAL, "sliding_window": 20, "layer_types": ["full_attention", "sliding_attention"]}, (0, 20)),
        ({**MISTRAL, "sliding_window": None, "layer_types": ["full_attention", "sliding_attention"]}, (0, 0)),
        ({"layer_types": ["full_attention", "full_attention"]}, (0, 0)),
        ({**QWEN, "layer_types": None}, (0, 0)),
    ],
)
def test_windows_of_layers(tmp_path, config, windows):
    write_model(tmp_path, decoder_weights(1), **config)
    assert read_config(tmp_path).windows == windows


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**MISTRAL, "sliding_window": 0}, "'sliding_window' is 0"),
        ({**MISTRAL, "sliding_window": "x"}, "'sliding_window' is 'x'"),
        ({**SLIDING, "use_sliding_window": "yes"}, "'use_sliding_window' is 'yes'.*true or false"),
        ({**SLIDING, "use_sliding_window": 1}, "'use_sliding_window' is 1"),
    ],
)
def test_impossible_windows(tmp_path, config, message):
    write_model(tmp_path, decoder_weights(1), **config)
    with pytest.raises(ModelFormatError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("base", [{}, QWEN, SLIDING, MISTRAL, {**MISTRAL, "sliding_window": None}])
@pytest.mark.parametrize(
    ("kinds", "error", "message"),
    [
        (["sliding_attention"], ModelFormatError, "must name 2 layers"),
        (["full_attention"] * 3, ModelFormatError, "must name 2 layers"),
        ([], ModelFormatError, "must name 2 layers"),
        ([1, []], ModelFormatError, "must name 2 layers"),
        ("full_attention", ModelFormatError, "must name 2 layers"),
        ({"0": "full_attention"}, ModelFormatError, "must name 2 layers"),
        (
            ["full_attention", "linear_attention"],
            UnsupportedModelError,
            "'linear_attention'.*supported: full_attention",
        ),
        (["chunked_attention", "full_attention"], UnsupportedModelError, "'chunked_attention'"),
        (["recurrent", "recurrent"], UnsupportedModelError, "'recurrent'"),
    ],
)
def test_layers_of_other_types_are_refused_whatever_the_window(tmp_path, base, kinds, error, message):
    write_model(tmp_path, decoder_weights(1), **base, layer_types=kinds)
    with pytest.raises(error, match=message):
        read_config(tmp_path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A Mistral target and a draft of one layer, both with a window of 20."""
    root = tmp_path_factory.mktemp("mistral")
    for role, layers in (("target", 2), ("draft", 1)):
        write_model(
            root / role, decoder_weights(5, layers=layers), max_context=2000, eos=2, **MISTRAL, sliding_window=20
        )
        write_tokenizer(root / role, byte_fallback(), bos_token="<s>", eos_token="</s>", chat_template=INSTRUCT)
    return root / "target", root / "draft"


def test_a_mistral_directory_is_the_oracle(pair):
    decoder = decoder_weights(5)
    for layer in decoder.layers:
        layer.window = 20
    tokens = np.random.default_rng(0).integers(0, 275, 90).astype(np.int32)
    model = load_model(pair[0]).model
    logits = model.forward(_core.Cache(model), tokens, 90)
    exact = forward(decoder, tokens)
    assert np.abs(logits - exact).max() < 1e-4 * np.abs(exact).max()
    for layer in decoder.layers:
        layer.window = None
    assert np.abs(logits - forward(decoder, tokens)).max() > 0.01 * np.abs(exact).max()


@pytest.mark.parametrize("kv_bits", [8, 16])
def test_text_far_beyond_the_window(pair, kv_bits):
    engine = specfast.load(*pair, kv_bits=kv_bits)
    plain = engine.generate("hello", max_tokens=600, temperature=0.0, disabled=True, ignore_eos=True)
    for gamma in (1, 5, 20):
        run = engine.generate("hello", max_tokens=600, temperature=0.0, gamma=gamma, ignore_eos=True)
        assert run.token_ids == plain.token_ids
        assert run.stats.accepted > 0
    sampled = [engine.generate("hello", max_tokens=300, seed=3, ignore_eos=True).token_ids for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_chat_of_mistral(pair):
    target = specfast.load(pair[0], disabled=True).pair
    turns = [
        {"role": "user", "content": "he"},
        {"role": "assistant", "content": "wo"},
        {"role": "user", "content": "lo"},
    ]
    text = "<s>[INST] he [/INST]wo</s>[INST] lo [/INST]"
    assert target.encode(turns) == target.tokenizer.encode(text, special=False)
    assert target.encode(turns)[0] == 1
    with pytest.raises(ModelFormatError, match="take turns"):
        target.encode(turns[:1] * 2)
    assert target.eos_ids == (2,)


def test_a_long_text_needs_a_bounded_cache(pair):
    model = load_model(pair[0]).model
    cache = _core.Cache(model)
    model.prefill(cache, np.zeros(250, dtype=np.int32))
    one = cache.nbytes
    for _ in range(7):
        model.prefill(cache, np.zeros(250, dtype=np.int32))
    assert cache.length == 2000
    assert cache.nbytes <= 3 * one

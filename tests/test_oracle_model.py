"""The oracle's decoder and the native one are the same function, with exact and with int8 activations."""

import numpy as np
import pytest
from oracle.model import dequantise, forward, round_to_int8
from specfast import _core
from tiny_models import native, quantised, random_decoder

ARCHITECTURES = ["llama", "qwen2", "qwen3"]


def error(native_logits, expected):
    """Largest difference relative to the largest logit."""
    return np.abs(native_logits - expected).max() / np.abs(expected).max()


def all_logits(model, tokens):
    return model.forward(_core.Cache(model), tokens, len(tokens))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_exact_weights(architecture, tied):
    decoder = random_decoder(7, V=50, hidden=64, heads=6, kv_heads=2, architecture=architecture, tied=tied)
    tokens = np.random.default_rng(8).integers(0, 50, 300).astype(np.int32)
    assert error(all_logits(native(decoder), tokens), forward(decoder, tokens)) < 1e-4


@pytest.mark.parametrize("windows", [(1,), (37,), (300,), (None, 37), (257, 5)])
def test_logits_of_windows(windows):
    """Tiles, decoding and a rejected tail, far beyond the window; a window that is one off is caught."""
    decoder = random_decoder(7, V=50, hidden=64, heads=6, kv_heads=2, windows=windows)
    tokens = np.random.default_rng(8).integers(0, 50, 700).astype(np.int32)
    model = native(decoder, max_context=1000)
    cache, rows = _core.Cache(model), []
    for first in range(0, 700, 20):
        model.forward(cache, 49 - tokens[first : first + 20], 0)
        cache.rollback()
        rows.append(model.forward(cache, tokens[first : first + 20], 20))
        cache.commit(20)
    logits = np.concatenate(rows)
    assert error(logits, forward(decoder, tokens)) < 1e-4
    for wrong in (-1, 1) if 1 not in windows else (1,):
        for layer, window in zip(decoder.layers, windows, strict=False):
            layer.window = window and window + wrong
        assert error(logits, forward(decoder, tokens)) > 1e-4


@pytest.mark.parametrize("windows", [(None,), (70,)])
def test_logits_of_8_bit_keys_and_values(windows):
    decoder = random_decoder(9, V=50, hidden=64, heads=6, kv_heads=2, head_dim=32, windows=windows)
    tokens = np.random.default_rng(8).integers(0, 50, 300).astype(np.int32)
    exact = forward(decoder, tokens)
    logits = all_logits(native(decoder, kv_bits=8), tokens)
    assert error(all_logits(native(decoder), tokens), exact) < 1e-4
    decoder.int8_kv = True
    # Values on the edge of a step are rounded the other way now and then: most logits are the oracle's, none is far.
    expected = forward(decoder, tokens)
    assert np.median(np.abs(logits - expected)) < 0.2 * np.median(np.abs(expected - exact))
    assert error(logits, expected) < 0.02


def test_a_wrong_layer_is_caught():
    decoder = random_decoder(7, V=50, hidden=64, heads=6, kv_heads=2)
    model = native(decoder)
    decoder.layers[1].o = decoder.layers[1].o * 1.01
    tokens = np.arange(20, dtype=np.int32)
    assert error(all_logits(model, tokens), forward(decoder, tokens)) > 1e-4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_quantised_weights(architecture, bits, group):
    decoder = random_decoder(
        3, V=40, hidden=128, heads=4, kv_heads=2, head_dim=32, architecture=architecture, tied=False
    )
    decoder, model_of = quantised(decoder, bits, group)
    tokens = np.random.default_rng(8).integers(0, 40, 40).astype(np.int32)
    assert error(all_logits(model_of("f32"), tokens), forward(decoder, tokens)) < 1e-4
    exact = forward(decoder, tokens)
    decoder.group_of = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down", "head"), group)
    rounded = forward(decoder, tokens)
    logits = all_logits(model_of("int8"), tokens)
    # A rounding that falls to the other side moves all that follows: equal in size of error, not in value.
    assert np.std(logits - exact) < 1.5 * np.std(rounded - exact)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int8_rounding_is_the_kernels(bits, group):
    rng = np.random.default_rng(group)
    N, K = 48, 3 * 128
    q = rng.integers(0, 2**bits, (N, K), np.uint32)
    packed = (q.reshape(N, -1, 32 // bits) << np.arange(0, 32, bits, dtype=np.uint32)).sum(-1).astype(np.uint32)
    scales, biases = rng.normal(0, 1, (2, N, K // group)).astype(np.float32)
    matrix = _core.Matrix(
        f"q{bits}",
        N,
        K,
        packed.view(np.uint8).ravel(),
        group=group,
        scales=scales.view(np.uint8).ravel(),
        biases=biases.view(np.uint8).ravel(),
        scale_format="f32",
    )
    x = rng.normal(0, 1, (5, K)).astype(np.float32)
    x[1, :64] = 0
    weights = dequantise(packed, scales, biases, bits, group)
    for precision, inputs in (("int8", round_to_int8(np.float64(x), group)), ("f32", np.float64(x))):
        y = _core.matmul_rows(x, matrix, precision, None)
        assert error(y, inputs @ weights.T) < 1e-5

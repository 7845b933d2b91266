"""Keys and values read out of a cache and put into another, in the cache's own precision."""

import numpy as np
import pytest
from specfast import ShapeError, _core
from tiny_models import native, random_decoder

TOKENS = np.random.default_rng(0).integers(0, 8, 600).astype(np.int32)


def model(precision, head_dim=16):
    return native(random_decoder(1, head_dim=head_dim), precision=precision, max_context=1024)


def widened(rows):
    """Stored elements as float32: they are already, or they are the bits of bf16."""
    return rows if rows.dtype == np.float32 else (rows.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 80, 128])  # one slice of values, a narrow second one, two
def test_a_copy_continues_with_the_same_bits(precision, head_dim):
    decoder = model(precision, head_dim)
    ours, copy = _core.Cache(decoder), _core.Cache(decoder)
    decoder.prefill(ours, TOKENS)
    keys, values = ([widened(read(layer)) for layer in range(2)] for read in (ours.keys, ours.values))
    assert keys[0].shape == values[1].shape == (2, len(TOKENS), head_dim)
    decoder.prefill(copy, TOKENS[:3])  # is replaced
    copy.assign(keys, values)
    assert copy.length == len(TOKENS)
    for layer in range(2):
        np.testing.assert_array_equal(copy.keys(layer), ours.keys(layer))
        np.testing.assert_array_equal(copy.values(layer), ours.values(layer))
    following = np.array([3, 1, 4], np.int32)
    expected = decoder.forward(ours, following, 3)
    np.testing.assert_array_equal(decoder.forward(copy, following, 3), expected)
    copy.rollback()
    values[1][0, 17, 5] += 1  # one wrong element is seen
    copy.assign(keys, values)
    assert not np.array_equal(decoder.forward(copy, following, 3), expected)


def test_values_of_the_first_layer_are_its_projection():
    """Against the definition: values are Wv times the normed embedding, and keys at position 0 are not rotated."""
    from oracle.model import rmsnorm

    decoder = random_decoder(1)
    cache = _core.Cache(loaded := native(decoder))
    loaded.prefill(cache, TOKENS[:9])
    w = decoder.layers[0]
    h = rmsnorm(decoder.embed[TOKENS[:9]], w.input_norm, decoder.rms_eps)
    np.testing.assert_allclose(cache.values(0), (h @ w.v.T).reshape(9, 2, 16).swapaxes(0, 1), atol=1e-5)
    np.testing.assert_allclose(cache.keys(0)[:, 0], (h[0] @ w.k.T).reshape(2, 16), atol=1e-5)


def test_forward_into_writes_what_forward_returns():
    decoder = model("f32")
    expected = decoder.forward(_core.Cache(decoder), TOKENS[:40], 40)
    out = np.full((40, 8), np.nan, np.float32)
    decoder.forward_into(_core.Cache(decoder), TOKENS[:40], out)
    np.testing.assert_array_equal(out, expected)
    last = np.full((3, 8), np.nan, np.float32)
    decoder.forward_into(_core.Cache(decoder), TOKENS[:40], last)
    np.testing.assert_array_equal(last, expected[-3:])


def test_bad_rows_are_refused():
    decoder = model("f32")
    cache = _core.Cache(decoder, 8)
    rows = np.zeros((2, 3, 16), np.float32)
    for keys, values in (
        ([rows, rows], [rows, "x"]),
        ([rows], [rows]),
        ([rows, rows], [rows]),
        ([rows, rows[:, :2]], [rows, rows]),
    ):
        with pytest.raises(ShapeError):
            cache.assign(keys, values)
    with pytest.raises(ShapeError, match="layer 2 is outside"):
        cache.keys(2)
    for shape in ((4, 8), (1, 7)):
        with pytest.raises(ShapeError, match="out must be"):
            decoder.forward_into(cache, TOKENS[:3], np.zeros(shape, np.float32))
    from specfast import ContextFullError

    long = np.zeros((2, 9, 16), np.float32)
    with pytest.raises(ContextFullError, match="9 more were asked for"):
        cache.assign([long, long], [long, long])
    assert cache.length == 0


def test_8_bits_are_refused():
    decoder = native(random_decoder(1), kv_bits=8)
    cache = _core.Cache(decoder)
    decoder.prefill(cache, TOKENS[:9])
    rows = [np.zeros((2, 9, 16), np.float32)] * 2
    for read, arguments in ((cache.keys, (0,)), (cache.values, (1,)), (cache.assign, (rows, rows))):
        with pytest.raises(ShapeError, match="in bf16 and f32"):
            read(*arguments)


WINDOWS = {"windows": [40, 0], "sinks": [5, 0], "undo": 1}


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("length", [30, 45, 46, 300, 600])
def test_rows_of_a_window(precision, length):
    """They are the sinks and the last ones; a copy of these continues with the same bits."""
    decoder = model(precision)
    every, ours, copy = _core.Cache(decoder), _core.Cache(decoder, **WINDOWS), _core.Cache(decoder, **WINDOWS)
    for cache in (every, ours):
        for first in range(0, length, 7):
            decoder.prefill(cache, TOKENS[first : min(first + 7, length)])
    keys, values = ([widened(read(layer)) for layer in range(2)] for read in (ours.keys, ours.values))
    kept = [*range(5), *range(length - 40, length)] if length > 45 else list(range(length))
    np.testing.assert_array_equal(ours.keys(0), every.keys(0)[:, kept])
    np.testing.assert_array_equal(ours.values(0), every.values(0)[:, kept])
    decoder.prefill(copy, TOKENS[:500])  # is replaced
    copy.assign(keys, values, length)
    assert copy.length == length
    for step in range(3):  # of 1, 100 and 200 rows
        following = TOKENS[: 100 * step or 1]
        expected = decoder.forward(ours, following, len(following))
        np.testing.assert_array_equal(decoder.forward(copy, following, len(following)), expected)
        ours.commit(1), copy.commit(1)
    assert copy.length == length + 3
    values[0][0, 2, 5] += 1  # a sink
    copy.assign(keys, values, length)
    assert not np.array_equal(decoder.forward(copy, TOKENS[:200], 200), expected)
    if length > 45:
        with pytest.raises(ShapeError, match="window has moved on"):
            copy.truncate(length - 2)  # which needs more than was assigned

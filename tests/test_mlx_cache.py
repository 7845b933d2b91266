"""KV caches on both sides of an accelerated model: mlx-lm's interface, and what it does with it, over specfast's pages."""

import copy
import importlib.metadata

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.models import cache as stock  # noqa: E402
from mlx_models import CACHE, PATH, logits_of, random_model  # noqa: E402
from specfast import ShapeError  # noqa: E402
from specfast.mlx import accelerate, report, restore  # noqa: E402

TOKENS = np.random.default_rng(4).integers(0, 96, 320)
FIRST, NEXT = TOKENS[:300], TOKENS[300:]


@pytest.fixture(autouse=True)
def _cpu():
    mx.set_default_device(mx.cpu)


@pytest.fixture
def model():
    """Accelerated, at precision f32 unless a test does it again."""
    return accelerate(random_model("llama", "q8g32"), "f32")


@pytest.fixture
def plain():
    """The same weights in mlx-lm's own layers."""
    other = random_model("llama", "q8g32")
    other.set_dtype(mx.float32)
    return other


def filled(model, tokens=FIRST):
    cache = stock.make_prompt_cache(model)
    logits_of(model, tokens, cache)
    return cache


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-3)


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_user_code_reads(model, plain):
    ours, theirs = filled(model), filled(plain)
    for mine, other in zip(ours, theirs, strict=True):
        assert isinstance(mine, stock.KVCache)
        assert type(mine) is CACHE
        assert mine.offset == other.offset == 300
        assert mine.is_trimmable()
        assert mine.nbytes > 0
        close(mine.keys, other.keys[:, :, :300])
        close(mine.values, other.values[:, :, :300])
        for a, b in zip(mine.state[:2], other.state[:2], strict=True):
            close(a[:, :, :300], b[:, :, :300])
        if hasattr(other, "empty"):
            assert not mine.empty()
        if hasattr(other, "size"):
            assert mine.size() == other.size()
    assert report(model).native_calls + report(model).graph_calls == 1


def test_a_cache_no_one_used(model):
    cache = stock.make_prompt_cache(model)
    logits_of(model, FIRST[:1], cache)
    assert stock.trim_prompt_cache(cache, 1) == 1
    assert cache[0].offset == 0
    same(logits_of(model, FIRST, cache), logits_of(model, FIRST))


def test_trim_is_a_rollback(model):
    cache = filled(model)
    expected = logits_of(model, NEXT, cache)
    for dropped in (20, 19, 5, 1):
        stock.trim_prompt_cache(cache, 20)
        logits_of(model, NEXT[::-1], cache)  # other tokens, which are dropped again
        stock.trim_prompt_cache(cache, 20)
        logits_of(model, NEXT, cache)
        assert stock.trim_prompt_cache(cache, dropped) == dropped
        assert cache[1].keys.shape[2] == 320 - dropped
        same(logits_of(model, NEXT[20 - dropped :], cache), expected[20 - dropped :])
    wrong = logits_of(model, NEXT, filled(model, FIRST[:-1]))  # a row that was not dropped would be seen
    assert not np.array_equal(wrong, expected)


def test_stock_caches_are_taken_over(model, plain):
    """What mlx-lm's layers put into a cache continues natively, and back."""
    expected = logits_of(plain, NEXT, filled(plain))
    cache = filled(plain)
    objects = list(cache)
    close(logits_of(model, NEXT[:10], cache), expected[:10])
    assert all(a is b for a, b in zip(cache, objects, strict=True))
    assert type(cache[0]) is CACHE
    close(logits_of(plain, NEXT[10:], cache), expected[10:])
    assert type(cache[0]) is stock.KVCache
    assert cache[0].offset == 320
    assert set(vars(cache[0])) == set(vars(filled(plain, FIRST[:1])[0]))
    stock.trim_prompt_cache(cache, 3)
    close(logits_of(model, NEXT[17:], cache), expected[17:])
    assert not report(model).stock_calls


def test_restored_models_go_on(model):
    cache = filled(model)
    expected = logits_of(model, NEXT, cache)
    stock.trim_prompt_cache(cache, 20)
    restore(model)
    model.set_dtype(mx.float32)
    close(logits_of(model, NEXT, cache), expected)
    assert type(cache[0]) is stock.KVCache


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_saved_and_loaded(model, precision, tmp_path):
    accelerate(model, precision)
    cache = filled(model)
    stock.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    expected = logits_of(model, NEXT, cache)
    loaded = stock.load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert type(loaded[0]) is stock.KVCache
    assert loaded[0].offset == 300
    same(logits_of(model, NEXT, loaded), expected)


def test_copies_are_independent(model):
    cache = filled(model)
    for duplicate in (copy.deepcopy(cache), [copy.copy(c) for c in cache]):
        expected = logits_of(model, NEXT, cache)
        other = logits_of(model, NEXT[::-1], duplicate)
        assert not np.array_equal(other, expected)
        stock.trim_prompt_cache(cache, 20)
        same(logits_of(model, NEXT, cache), expected)
        stock.trim_prompt_cache(duplicate, 20)
        same(logits_of(model, NEXT, duplicate), expected)
        stock.trim_prompt_cache(cache, 20)


def test_written_caches_are_stock(model):
    cache = filled(model)
    expected = logits_of(model, NEXT, cache)
    stock.trim_prompt_cache(cache, 20)
    state = [c.state for c in cache]
    for c, s in zip(cache, state, strict=True):
        c.state = s
        assert type(c) is stock.KVCache
    same(logits_of(model, NEXT, cache), expected)
    stock.trim_prompt_cache(cache, 20)
    cache[1].keys = cache[1].keys * 2
    assert not np.array_equal(logits_of(model, NEXT, cache), expected)


def test_quantising(model):
    cache = filled(model)
    quantised = cache[0].to_quantized(group_size=32, bits=8)
    assert quantised.offset == 300
    keys = mx.dequantize(*quantised.keys, group_size=32, bits=8)[:, :, :300]
    assert np.abs(np.asarray(keys) - np.asarray(cache[0].keys)).max() < 0.1


def test_two_models_take_turns(model):
    """The caches of one model in another of the same shape: the contents are what counts, as in mlx-lm."""
    other = accelerate(random_model("llama", "q8g32"), "f32")
    cache = filled(model)
    expected = logits_of(model, NEXT, filled(model))
    same(logits_of(other, NEXT, cache), expected)
    stock.trim_prompt_cache(cache, 20)
    same(logits_of(model, NEXT, cache), expected)


def test_layers_in_the_wrong_order(model):
    cache = filled(model)
    expected = logits_of(model, NEXT, [copy.copy(c) for c in reversed(cache)])
    same(logits_of(model, NEXT, cache[::-1]), expected)
    assert not np.array_equal(expected, logits_of(model, NEXT, filled(model)))


def test_impossible_offsets(model):
    cache = filled(model)
    for c in cache:
        c.offset = 301
    with pytest.raises(ShapeError, match="offset is 301, but they hold 300"):
        logits_of(model, NEXT, cache)
    for offset in (1.5, -1):
        for c in cache:
            c.offset = offset
        with pytest.raises(ShapeError, match=f"offset is {offset}, but must be a whole number, at least 0"):
            logits_of(model, NEXT, cache)
    for c in cache:
        c.offset = 300
    expected = logits_of(model, NEXT, filled(model))
    if PATH == "native":
        with pytest.raises(ShapeError, match="outside the vocabulary"):
            logits_of(model, [1, 96], cache)
    same(logits_of(model, NEXT, cache), expected)


def test_other_shapes_are_left_to_mlx_lm(model):
    cache = filled(random_model("llama", "f32", num_key_value_heads=4))
    with pytest.raises(ValueError):  # mlx-lm's own error  # noqa: PT011
        mx.eval(model(mx.array([[1]]), cache=cache))
    assert any("a cache of shape (1, 4, " in reason for reason in report(model).stock_calls)


def test_batches_of_prompts(model, plain):
    """mlx-lm's batch generation runs in its own layers."""
    if tuple(map(int, importlib.metadata.version("mlx-lm").split(".")[:2])) < (0, 31):
        pytest.skip("the batch interface changed")
    model.set_dtype(mx.float32)
    accelerate(model, "f32")
    cache = filled(model)
    merged = [type(c).merge([c, copy.deepcopy(c)]) for c in cache]
    assert merged[0].keys.shape[0] == 2
    tokens = mx.array(np.stack([NEXT[:1], NEXT[:1]]))
    close(model(tokens, cache=merged)[1, 0].astype(mx.float32), logits_of(plain, NEXT[:1], filled(plain))[0])

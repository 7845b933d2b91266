"""mlx-lm's quantised caches on specfast's kernels: its affine codes, taken over and given back to the bit."""

import copy
import pickle

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import specfast.mlx  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from mlx_models import generate_step, logits_of, random_model  # noqa: E402
from specfast import ShapeError, _core  # noqa: E402
from specfast.context import Context  # noqa: E402
from specfast.controllers import FixedGamma  # noqa: E402
from specfast.drafters import ModelDrafter, NoDrafter  # noqa: E402
from specfast.generation import Generation  # noqa: E402
from specfast.mlx import accelerate, report, restore  # noqa: E402
from specfast.mlx.accelerate import native_model_of  # noqa: E402
from specfast.mlx.cache import make_cache  # noqa: E402
from specfast.targets import NativeTarget  # noqa: E402

TOKENS = np.random.default_rng(6).integers(0, 96, 400)
FORMATS = [(8, 32), (8, 64), (4, 32), (4, 64)]
same = np.testing.assert_array_equal


@pytest.fixture(autouse=True)
def _cpu():
    mx.set_default_device(mx.cpu)


@pytest.fixture(scope="module")
def model():
    return accelerate(random_model("mistral", "q8g32"), "f32")  # head_dim 64


@pytest.fixture(scope="module")
def plain():
    """The same weights in mlx-lm's own layers."""
    other = random_model("mistral", "q8g32")
    other.set_dtype(mx.float32)
    return other


def quantized(bits=8, group=64, layers=2):
    return [stock.QuantizedKVCache(group_size=group, bits=bits) for _ in range(layers)]


def relative(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def arrays(cache, rows):
    return [np.asarray(part.astype(mx.float32) if part.dtype == mx.bfloat16 else part)[:, :, :rows]
            for c in cache for part in (*c.keys, *c.values)]  # fmt: skip


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_rows_are_mlx_lms(model, plain, bits, group):
    """Close to its own layers, and far from what no code or another one gives; bitwise for every number of rows."""
    theirs = logits_of(plain, TOKENS[:300], quantized(bits, group))
    cache = quantized(bits, group)
    ours = logits_of(model, TOKENS[:300], cache)
    assert type(cache[1]) is specfast.mlx.QuantizedKVCache
    distance = relative(ours, theirs)
    assert distance < (1e-2 if bits == 8 else 3e-2)  # a value beside a tie takes the other code
    assert relative(logits_of(plain, TOKENS[:300], stock.make_prompt_cache(plain)), theirs) > 3 * distance
    rng, cache, first = np.random.default_rng(bits), quantized(bits, group), 0
    while first < 300:
        rows = TOKENS[first : min(first + int(rng.integers(1, 22)), 300)]
        same(logits_of(model, rows, cache), ours[first : first + len(rows)])
        first += len(rows)
    stock.trim_prompt_cache(cache, 21)
    for M in range(1, 22):
        same(logits_of(model, TOKENS[279 : 279 + M], cache), ours[279 : 279 + M])
        assert stock.trim_prompt_cache(cache, M) == M
    assert not report(model).stock_calls


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_codes_are_taken_over_and_given_back(model, plain, bits, group):
    cache = quantized(bits, group)
    logits_of(plain, TOKENS[:300], cache)
    before, theirs = arrays(cache, 300), copy.deepcopy(cache)
    expected = logits_of(plain, TOKENS[300:340], theirs)
    assert relative(logits_of(model, TOKENS[300:320], cache), expected[:20]) < (1e-2 if bits == 8 else 3e-2)
    for ours, other in zip(arrays(cache, 300), before, strict=True):
        same(ours, other)
    assert (cache[0].bits, cache[0].group_size, cache[0].offset) == (bits, group, 320)
    restored = logits_of(plain, TOKENS[320:340], cache)
    assert type(cache[0]) is stock.QuantizedKVCache
    assert relative(restored, expected[20:]) < (1e-2 if bits == 8 else 3e-2)
    for ours, other in zip(arrays(cache, 300), before, strict=True):
        same(ours, other)
    assert set(vars(cache[0])) == set(vars(theirs[0]))


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_in_bfloat16(bits):
    """As a model of 16 bits has them; what our kernels quantised is given back to the bit too."""
    model = accelerate(random_model("mistral", "bf16"))
    cache = quantized(bits, 32)
    logits_of(model, TOKENS[:50], cache)
    assert cache[0].keys[1].dtype == mx.bfloat16
    before = arrays(cache, 50)
    expected = logits_of(model, TOKENS[50:60], copy.deepcopy(cache))
    given = list(cache)
    for c in given:
        c.keys = c.keys
        assert type(c) is stock.QuantizedKVCache
    same(logits_of(model, TOKENS[50:60], given), expected)
    for ours, other in zip(arrays(given, 50), before, strict=True):
        same(ours, other)


@pytest.mark.parametrize("bits", [4, 8])
def test_saved_and_copied(model, tmp_path, bits):
    cache = quantized(bits)
    logits_of(model, TOKENS[:100], cache)
    stock.trim_prompt_cache(cache, 10)
    copies = [copy.deepcopy(cache), [copy.copy(c) for c in cache], pickle.loads(pickle.dumps(cache))]
    stock.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    copies.append(stock.load_prompt_cache(str(tmp_path / "cache.safetensors")))
    expected = logits_of(model, TOKENS[90:120], cache)
    for other in copies:
        assert type(other[0]) is stock.QuantizedKVCache
        same(logits_of(model, TOKENS[90:120], other), expected)
    wrong = copy.deepcopy(cache)
    wrong[0].values = (wrong[0].values[0], wrong[0].values[1] * 2, wrong[0].values[2])
    assert not np.array_equal(logits_of(model, TOKENS[120:125], wrong), logits_of(model, TOKENS[120:125], cache))


def test_quantising_on_the_way(plain):
    """mlx-lm's kv_bits and quantized_kv_start: plain pages first, codes then, and the same greedy tokens."""
    model = accelerate(random_model("mistral", "q8g32"), "f32")
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 20, "max_tokens": 60}
    tokens = {}
    for name, which in (("ours", model), ("theirs", plain)):
        cache = stock.make_prompt_cache(which)
        steps = generate_step(mx.array(TOKENS[:9]), which, prompt_cache=cache, **options)
        tokens[name] = [int(token) for token, *_ in steps]
    assert tokens["ours"] == tokens["theirs"]
    assert report(model).native_calls > 60
    assert not report(model).stock_calls


def test_memory():
    model = accelerate(random_model("mistral", "bf16"))
    native, bytes_of = native_model_of(model), {}
    for codes in (None, (8, 64), (4, 64)):
        cache = make_cache(native, codes=codes)
        native.prefill(cache, np.zeros(256, np.int32))
        bytes_of[codes] = cache.nbytes
    vectors = 2 * 2 * 2 * 256  # keys and values, layers, heads
    assert bytes_of == {None: vectors * 128, (8, 64): vectors * (64 + 8), (4, 64): vectors * (32 + 8)}


def test_what_mlx_lm_must_run():
    model = accelerate(random_model("mistral", "f32"), "f32")
    plain = restore(random_model("mistral", "f32"))
    for bits, group in ((2, 64), (6, 32)):
        theirs = logits_of(plain, TOKENS[:9], quantized(bits, group))
        same(logits_of(model, TOKENS[:9], quantized(bits, group)), theirs)
    mixed = [stock.KVCache(), stock.QuantizedKVCache()]
    logits_of(model, TOKENS[:9], mixed)
    assert sorted(report(model).stock_calls) == [
        "a QuantizedKVCache of 2 bits in groups of 64; supported: 4 or 8 bits in groups of 32, 64 or 128 that divide the "
        "head_dim of 64",
        "a QuantizedKVCache of 6 bits in groups of 32; supported: 4 or 8 bits in groups of 32, 64 or 128 that divide the "
        "head_dim of 64",
        "quantised caches beside others",
    ]


@pytest.mark.parametrize("codes", [(8, 64), (4, 32)])
def test_speculation_is_plain_decoding(model, codes):
    draft = accelerate(random_model("mistral", "q8g32", seed=1), "f32")

    def generated(drafting, gamma, temp):
        native, law = native_model_of(model), _core.Law(temp)
        rule, context = "coupled" if temp else "token", Context([int(t) for t in TOKENS[:9]], 150, native.max_context)
        target = NativeTarget(native, law, 1.0, 5, native.max_context, rule)
        target.cache = make_cache(native, codes=codes)
        drafter = NoDrafter()
        if drafting:
            drafter = ModelDrafter(native_model_of(drafting), law, 5, native.max_context, rule)
            drafter.cache = make_cache(native_model_of(drafting), codes=codes)
        return [t for chunk in Generation(context, target, drafter, FixedGamma(gamma)) for t in chunk.token_ids]

    for temp in (0.0, 0.7):
        expected = generated(None, 0, temp)
        for gamma in (1, 4, 20):
            for drafting in (model, draft):
                assert generated(drafting, gamma, temp) == expected


def test_bad_codes_are_refused(model):
    native = native_model_of(model)
    for codes in ((3, 64), (8, 48), (8, 128)):
        with pytest.raises(ShapeError, match="4 or 8 bits in groups of 32, 64 or 128 that divide it"):
            _core.Cache(native, kv_codes=codes)
    with pytest.raises(ShapeError, match="without a sliding window"):
        make_cache(native, 40, codes=(8, 64))
    cache = make_cache(native, codes=(8, 64))
    native.prefill(cache, TOKENS[:9].astype(np.int32))
    rows = [cache.codes(layer, True) for layer in range(2)]
    for keys, values in ((rows[:1], rows), (rows, [rows[0], (rows[0][0][:, :3], *rows[0][1:])])):
        with pytest.raises(ShapeError, match=r"are needed|must be"):
            cache.assign_codes(keys, values)
    with pytest.raises(ShapeError, match="no layer 2 of 9"):
        cache.codes(2, True)
    with pytest.raises(ShapeError, match="in bf16 and f32"):
        cache.keys(0)
    plain = _core.Cache(native)
    for call in (lambda: plain.codes(0, True), lambda: plain.assign_codes(rows, rows)):
        with pytest.raises(ShapeError, match="not made with kv_codes"):
            call()

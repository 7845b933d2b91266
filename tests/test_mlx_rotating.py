"""Rotating caches and sliding windows of mlx-lm on specfast's kernels: a row sees what it would see decoded alone, and
rejected rows leave nothing behind, also after many wraps."""

import copy
import pickle

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import specfast.mlx  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from mlx_lm.models import llama  # noqa: E402
from mlx_models import ARCHITECTURES, generate_step, logits_of, random_model, speculative_generate_step  # noqa: E402
from specfast import ConfigurationError, ShapeError, _core  # noqa: E402
from specfast.context import Context  # noqa: E402
from specfast.controllers import FixedGamma  # noqa: E402
from specfast.drafters import ModelDrafter, NoDrafter  # noqa: E402
from specfast.generation import Generation  # noqa: E402
from specfast.mlx import accelerate, report, restore  # noqa: E402
from specfast.mlx.accelerate import native_model_of  # noqa: E402
from specfast.mlx.cache import make_cache  # noqa: E402
from specfast.targets import NativeTarget  # noqa: E402

TOKENS = np.random.default_rng(6).integers(0, 96, 700)
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
SIZES = [(40, 4), (40, 0), (17, 16), (300, 4)]
needs_layer_types = pytest.mark.skipif(
    "layer_types" not in llama.ModelArgs.__dataclass_fields__, reason="this mlx-lm has no sliding layers in Llama"
)


@pytest.fixture(autouse=True)
def _cpu():
    mx.set_default_device(mx.cpu)


@pytest.fixture(scope="module")
def model():
    return accelerate(random_model("llama", "q8g32"), "f32")


@pytest.fixture(scope="module")
def plain():
    """The same weights in mlx-lm's own layers."""
    other = random_model("llama", "q8g32")
    other.set_dtype(mx.float32)
    return other


def rotating(size=40, keep=4, layers=2):
    return [stock.RotatingKVCache(max_size=size, keep=keep) for _ in range(layers)]


def alone(model, tokens, cache):
    """Logits of tokens decoded one at a time."""
    return np.concatenate([logits_of(model, [token], cache) for token in tokens])


def relative(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


same = np.testing.assert_array_equal


@pytest.mark.parametrize(("size", "keep"), SIZES)
def test_rows_see_what_one_token_at_a_time_sees(model, plain, size, keep):
    """Every M, from an empty cache to one that has wrapped many times: mlx-lm's plain decoding, bitwise equal rows."""
    length = 360 if size == 300 else 200
    theirs = alone(plain, TOKENS[:length], rotating(size, keep))
    cache = rotating(size, keep)
    ours = alone(model, TOKENS[:length], cache)
    assert type(cache[0]) is specfast.mlx.RotatingKVCache
    assert relative(ours, theirs) < 1e-3
    wrong = alone(model, TOKENS[:length], rotating(size + 1, keep))
    assert relative(wrong[size + 1 :], theirs[size + 1 :]) > 1e-2
    rng = np.random.default_rng(size)
    for _ in range(3):
        cache, first = rotating(size, keep), 0
        while first < length:
            M = int(rng.integers(1, 22))
            rows = TOKENS[first : min(first + M, length)]
            same(logits_of(model, rows, cache), ours[first : first + len(rows)])
            first += M
    for prefill in (100, length):  # prompts that are longer than the cache
        same(logits_of(model, TOKENS[:prefill], rotating(size, keep)), ours[:prefill])


def test_every_number_of_rows_after_wraps(model):
    cache = rotating()
    expected = alone(model, TOKENS[:221], rotating())
    logits_of(model, TOKENS[:200], cache)
    for M in range(1, 22):
        same(logits_of(model, TOKENS[200 : 200 + M], cache), expected[200 : 200 + M])
        assert cache[0].trim(M) == cache[1].trim(M) == M


def test_mlx_lms_own_rows_see_something_else(plain):
    """With several rows at once its layers lose the first positions; this is what ours is not compared with."""
    one, many = rotating(), rotating()
    expected = alone(plain, TOKENS[:220], one)
    logits_of(plain, TOKENS[:199], many)
    assert relative(logits_of(plain, TOKENS[199:220], many), expected[199:]) > 1e-2


def test_trim_is_a_rollback_after_wraps(model):
    cache = rotating()
    expected = alone(model, TOKENS[:300], rotating())
    logits_of(model, TOKENS[:250], cache)
    for dropped in (1, 5, 20, 64, 30):
        logits_of(model, TOKENS[::-1][:21], cache)  # other tokens
        for c in cache:
            assert c.trim(dropped + 21) == dropped + 21
            assert c.keys.shape == (1, 2, 40, 32)
        rows = TOKENS[250 - dropped : 250]
        same(logits_of(model, rows, cache), expected[250 - dropped : 250])
    assert not cache[0].is_trimmable()  # as mlx-lm says, which can not
    assert stock.trim_prompt_cache(cache, 3) == 0
    logits_of(model, TOKENS[250:251], cache)
    wrong = copy.deepcopy(cache)
    logits_of(model, [7], wrong)  # a row that is not dropped
    assert not np.array_equal(logits_of(model, TOKENS[251:260], wrong), expected[251:260])
    same(logits_of(model, TOKENS[251:260], cache), expected[251:260])


def test_what_has_left_cannot_come_back(model):
    cache = rotating()
    for first in range(0, 700, 100):
        logits_of(model, TOKENS[first : first + 100], cache)
    logits_of(model, TOKENS[:1], cache)
    with pytest.raises(ShapeError, match="500 of 701 positions cannot be dropped; at most 154 can, or all"):
        cache[0].trim(500)
    with pytest.raises(ShapeError, match="-1 positions cannot be dropped"):
        cache[0].trim(-1)
    for c in cache:
        c.offset = 101
    with pytest.raises(ShapeError, match="window has moved on"):
        logits_of(model, TOKENS[:1], cache)
    for c in cache:
        c.offset = 701
        assert c.trim(1000) == 701
    same(logits_of(model, TOKENS[:50], cache), logits_of(model, TOKENS[:50], rotating()))


def test_before_the_first_wrap_everything_can_be_dropped(model):
    cache = rotating(300)
    logits_of(model, TOKENS[:299], cache)
    assert stock.trim_prompt_cache(cache, 280) == 280
    same(logits_of(model, TOKENS[19:60], cache), logits_of(model, TOKENS[:60], rotating(300))[19:])


@pytest.mark.parametrize("history", ["short", "prompt", "wrapped", "rows", "rows and one"])
def test_stock_caches_are_taken_over(model, plain, history):
    """In whatever order mlx-lm's layers have left them, and back."""
    steps = {
        "short": [[20], [1] * 7],
        "prompt": [[130]],
        "wrapped": [[20], [1] * 63],
        "rows": [[20], [1] * 30, [20], [21]],
        "rows and one": [[100], [21], [1] * 3],
    }
    cache, first = rotating(), 0
    for part in steps[history]:
        for M in part:
            logits_of(plain, TOKENS[first : first + M], cache)
            first += M
    reference = copy.deepcopy(cache)
    objects = list(cache)
    following = TOKENS[first : first + 60]
    expected = alone(plain, following, reference)
    assert relative(logits_of(model, following[:30], cache), expected[:30]) < 1e-3
    assert all(a is b for a, b in zip(cache, objects, strict=True))
    assert type(cache[0]) is specfast.mlx.RotatingKVCache
    assert relative(alone(plain, following[30:50], cache), expected[30:50]) < 1e-3  # given back
    assert type(cache[0]) is stock.RotatingKVCache
    assert set(vars(cache[0])) == set(vars(reference[0]))
    assert relative(logits_of(model, following[50:], cache), expected[50:]) < 1e-3
    assert report(model).path == "native"


@pytest.mark.parametrize("length", [20, 39, 40, 41, 150])
def test_what_user_code_reads(model, plain, length):
    ours, theirs = rotating(), rotating()
    alone(plain, TOKENS[:length], theirs)
    logits_of(model, TOKENS[:length], ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert isinstance(mine, stock.RotatingKVCache)
        assert (mine.offset, mine.keep, mine.max_size) == (other.offset, other.keep, other.max_size)
        assert mine.is_trimmable() == other.is_trimmable()
        for name in ("keys", "values"):
            rows = other._temporal_order(getattr(other, name))
            np.testing.assert_allclose(np.asarray(getattr(mine, name)), np.asarray(rows), atol=1e-3)
        if hasattr(other, "size"):
            assert mine.size() == other.size()
        assert mine.nbytes > 0


@pytest.mark.parametrize("length", [20, 40, 150])
def test_saved_and_copied(model, plain, tmp_path, length):
    cache = rotating()
    logits_of(model, TOKENS[:length], cache)
    copies = [copy.deepcopy(cache), [copy.copy(c) for c in cache], pickle.loads(pickle.dumps(cache))]
    stock.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    expected = alone(model, TOKENS[length : length + 60], cache)
    copies.append(stock.load_prompt_cache(str(tmp_path / "cache.safetensors")))
    for other in copies:
        assert type(other[0]) is stock.RotatingKVCache
        theirs = alone(plain, TOKENS[length : length + 60], copy.deepcopy(other))
        same(logits_of(model, TOKENS[length : length + 60], other), expected)
        assert relative(theirs, expected) < 1e-3
    state = [c.state for c in cache]
    for c, s in zip(cache, state, strict=True):
        c.state = s
        assert type(c) is stock.RotatingKVCache


def test_other_sizes_of_the_same_objects(model):
    cache = rotating()
    logits_of(model, TOKENS[:100], cache)
    for c in cache:
        c.max_size = 30
    expected = rotating(30)
    logits_of(model, TOKENS[:100], expected)
    # 30 of the 40 positions that were there; deeper ones differ, and so only the first layer's rows are the same
    logits_of(model, TOKENS[100:101], cache), logits_of(model, TOKENS[100:101], expected)
    same(np.asarray(cache[0].keys), np.asarray(expected[0].keys))
    assert cache[0].keys.shape[2] == 30


def test_caches_that_mlx_lm_must_run():
    model = accelerate(random_model("llama", "f32"), "f32")
    for cache in ([stock.KVCache(), stock.RotatingKVCache(40)], rotating(40), rotating(40, 0)):
        logits_of(model, TOKENS[:50], cache)
    assert not report(model).stock_calls
    logits_of(model, TOKENS[:3], rotating(4, 4))
    assert report(model).stock_calls == {"a RotatingKVCache that keeps 4 of 4 positions": 1}


def test_restore_after_wraps():
    model = random_model("llama", "q8g32")
    cache = rotating()
    before = [logits_of(model, TOKENS[:20], cache), alone(model, TOKENS[20:100], cache)]
    accelerate(model, "f32")
    logits_of(model, TOKENS[:100], cache := rotating())
    restore(model)
    cache = rotating()
    same(logits_of(model, TOKENS[:20], cache), before[0])
    same(alone(model, TOKENS[20:100], cache), before[1])


def generated(model, prompt, size, *, draft=None, gamma=5, temp=0.0, seed=0, count=160, sound=True):
    """Tokens of specfast's own loop over caches of a size, and how many were drafted and kept."""
    native, law = native_model_of(model), _core.Law(temp)
    rule = "coupled" if temp else "token"
    target = NativeTarget(native, law, 1.0, seed, native.max_context, rule)
    target.cache = make_cache(native, size)
    drafter = NoDrafter()
    if draft is not None:
        drafter = ModelDrafter(native_model_of(draft), law, seed, native.max_context, rule)
        drafter.cache = make_cache(native_model_of(draft), size)
    if not sound:  # some row is not the one that was kept
        commit = target.cache.commit

        def commit_something_else(kept):
            commit(kept)
            target.cache.truncate(target.cache.length - 1)
            native.prefill(target.cache, np.array([7], np.int32))

        target.commit = commit_something_else
    context = Context([int(token) for token in prompt], count, native.max_context)
    generation = Generation(context, target, drafter, FixedGamma(gamma))
    return [token for chunk in generation for token in chunk.token_ids], generation.stats.accepted


@pytest.mark.parametrize("prompt", [9, 130])
@pytest.mark.parametrize("gamma", [1, 3, 8, 20])
def test_speculation_over_wraps_is_plain_decoding(model, prompt, gamma):
    """Greedy, and sampled with a seed, whatever drafts: the tokens are those of plain decoding. 16 positions wrap ten times."""
    drafts = [
        model,
        accelerate(random_model("llama", "q8g32", seed=1), "f32"),
        accelerate(random_model("llama", "q8g32")),
    ]
    for size in (16, 40):
        for temp, seed in ((0.0, 0), (0.7, 1), (0.7, 2)):
            tokens = TOKENS[seed * 10 :][:prompt]
            expected, _ = generated(model, tokens, size, temp=temp, seed=seed)
            for draft in drafts:
                ours, accepted = generated(model, tokens, size, draft=draft, gamma=gamma, temp=temp, seed=seed)
                assert ours == expected
            assert accepted > 20  # of the last, the target's own weights at another precision
    assert generated(model, tokens, 17)[0] != generated(model, tokens, 16)[0]
    broken, _ = generated(model, tokens, 16, draft=drafts[1], gamma=gamma, temp=0.7, seed=2, sound=False)
    assert broken != expected


def greedy(model, cache, prompt, count=100):
    return [int(token) for token, *_ in generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache)]


def test_generation_is_mlx_lms(model, plain):
    """Its plain decoding, whose first call here is shorter than the cache, gives the tokens of ours and of our loop."""
    prompt = TOKENS[:9]
    expected = greedy(plain, rotating(), prompt)
    assert greedy(model, rotating(), prompt) == expected
    assert generated(model, prompt, 40, count=100)[0] == expected
    assert generated(model, prompt, 40, draft=model, gamma=4, count=100)[0] == expected
    assert not report(model).stock_calls


@pytest.mark.skipif("qwen3" not in ARCHITECTURES, reason="this mlx-lm has no Qwen3")
@pytest.mark.parametrize(
    "options", [{"max_kv_size": 16}, {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 20}]
)
def test_options_of_generate_step(options):
    """As a user gives them: drafted or not, the tokens are the same, and no row runs in mlx-lm's layers."""
    model, draft, twin = (
        accelerate(random_model("qwen3", "q8g32", seed=seed), precision)
        for seed, precision in ((0, "f32"), (1, "f32"), (0, "int8"))
    )

    def tokens(options=options, **drafting):
        steps = specfast.mlx.generate_step(mx.array(TOKENS[:30]), model, max_tokens=80, **options, **drafting)
        return [int(token) for token, *_ in steps]

    expected = tokens()
    for num_draft_tokens in (1, 4, 20):
        for draft_model in (draft, twin):
            assert tokens(draft_model=draft_model, num_draft_tokens=num_draft_tokens) == expected
    assert not report(model).stock_calls
    assert tokens({}) != expected  # it matters what the caches are


def test_mlx_lms_speculation_fails_or_differs(plain):
    """What this is for: its speculative loop refuses a cache that has wrapped (before 2026 it did not), and where one wraps
    on the way it keeps what it rejected."""
    draft = random_model("llama", "f32", seed=1)
    prompt = mx.array(TOKENS[:9])

    def speculated(caches):
        steps = speculative_generate_step(prompt, plain, draft, num_draft_tokens=3, max_tokens=100, prompt_cache=caches)
        return [int(token) for token, *_ in steps]

    expected = greedy(plain, rotating(), TOKENS[:9])
    assert speculated(rotating(layers=4)) != expected
    wrapped, same_rows = rotating(layers=4), rotating()
    alone(plain, TOKENS[:60], wrapped[:2]), alone(plain, TOKENS[:60], same_rows)
    try:
        assert speculated(wrapped) != greedy(plain, same_rows, TOKENS[:9])
    except ValueError as error:
        assert "trimmable" in str(error)
    roomy = greedy(plain, rotating(400), TOKENS[:9])
    assert speculated(rotating(400, layers=4)) == roomy  # without a wrap it is right


def test_max_kv_size_bounds_memory_and_is_checked(model):
    native = native_model_of(model)
    small, large = make_cache(native, 40), make_cache(native)
    for _ in range(40):
        for cache in (small, large):
            native.prefill(cache, np.zeros(50, np.int32))
    assert small.length == large.length == 2000
    assert small.nbytes * 2 <= large.nbytes
    with pytest.raises(ConfigurationError, match="max_kv_size is 4, but must be at least 5"):
        make_cache(native, 4)


@needs_layer_types
@pytest.mark.parametrize("window", [8, 300])
def test_sliding_layers(window):
    """Windows of some layers, by layer_types: as mlx-lm's layers, for every M, and also without a cache."""
    options = {"layer_types": KINDS, "sliding_window": window, "num_hidden_layers": 3}
    theirs = random_model("mistral", "f32", **options)
    model = accelerate(random_model("mistral", "f32", **options), "f32")
    assert report(model).path == "native", report(model).reason
    expected = logits_of(theirs, TOKENS[:400])
    assert relative(logits_of(model, TOKENS[:400]), expected) < 1e-3
    cache = stock.make_prompt_cache(model)
    assert [type(c) for c in cache] == [stock.RotatingKVCache, stock.KVCache, stock.RotatingKVCache]
    first = 0
    for M in (1, 21, 2, 300, 20, 3, 17, 1, 16, 19):
        rows = logits_of(model, TOKENS[first : first + M], cache)
        assert relative(rows, expected[first : first + M]) < 1e-3
        first += M
    assert [type(c) for c in cache] == [
        specfast.mlx.RotatingKVCache,
        specfast.mlx.KVCache,
        specfast.mlx.RotatingKVCache,
    ]
    wrong = random_model("mistral", "f32", **options | {"sliding_window": window + 1})
    assert relative(logits_of(wrong, TOKENS[:400]), expected) > 1e-3
    assert not report(model).stock_calls
    tokens = greedy(theirs, stock.make_prompt_cache(theirs), TOKENS[:9])
    assert greedy(model, stock.make_prompt_cache(model), TOKENS[:9]) == tokens
    assert generated(model, TOKENS[:9], None, count=100)[0] == tokens
    assert generated(model, TOKENS[:9], None, draft=model, gamma=4, count=100)[0] == tokens


@needs_layer_types
def test_sliding_layers_in_other_caches():
    options = {"layer_types": KINDS[:2], "sliding_window": 8}
    theirs, model = (random_model("mistral", "f32", **options) for _ in range(2))
    accelerate(model, "f32")

    def caches(size, keep=0):
        return [stock.RotatingKVCache(size, keep), stock.KVCache()]

    expected = alone(theirs, TOKENS[:40], caches(6, 2))
    assert relative(logits_of(model, TOKENS[:40], caches(6, 2)), expected) < 1e-3
    assert not report(model).stock_calls
    for cache in (caches(9), [stock.KVCache(), stock.KVCache()]):
        same(logits_of(model, TOKENS[:40], cache), logits_of(theirs, TOKENS[:40], copy.deepcopy(cache)[:0] or None))
    assert set(report(model).stock_calls) == {
        "a RotatingKVCache of 9 positions for a layer with a sliding window of 8",
        "a KVCache for a layer with a sliding window of 8",
    }


@needs_layer_types
def test_a_window_in_the_config_alone_is_none():
    """mlx-lm's layers go by layer_types, and so does what they become."""
    theirs, model = (random_model("mistral", "f32", sliding_window=8) for _ in range(2))
    accelerate(model, "f32")
    assert relative(logits_of(model, TOKENS[:90]), logits_of(theirs, TOKENS[:90])) < 1e-3
    assert report(model).native_calls == 1

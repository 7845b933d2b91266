"""mlx-lm models on specfast's kernels: the logits, the weights' memory, and what is left alone."""

import ctypes
import gc
import pickle
import sys
import weakref

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import specfast.mlx  # noqa: E402
from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.cache import KVCache, make_prompt_cache, trim_prompt_cache  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from mlx_models import (  # noqa: E402
    ARCHITECTURES,
    FORMATS,
    PATH,
    generate_step,
    logits_of,
    random_model,
    reference_logits,
    speculative_generate_step,
)
from specfast import ConfigurationError, _core, embedded  # noqa: E402
from specfast.mlx import accelerate, report, restore  # noqa: E402
from specfast.mlx.weights import native_model  # noqa: E402

YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
TOKENS = np.random.default_rng(3).integers(0, 96, 321)


@pytest.fixture(autouse=True)
def _cpu():
    mx.set_default_device(mx.cpu)


def relative(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def greedy(model, count=64, **options):
    return [int(token) for token, *_ in generate_step(mx.array(TOKENS[:9]), model, max_tokens=count, **options)]


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_at_contexts(name, weights):
    """Every M at every context: close to mlx-lm in float32, and a row has the same bits whatever M is."""
    theirs = reference_logits(name, weights, TOKENS)
    model = accelerate(random_model(name, weights), "f32")
    assert report(model).path == PATH, report(model).reason
    for context in (0, 17, 300):
        cache = make_prompt_cache(model)
        if context:
            logits_of(model, TOKENS[:context], cache)
        most = None
        for M in range(21, 0, -1):
            ours = logits_of(model, TOKENS[context : context + M], cache)
            assert relative(ours, theirs[context : context + M]) <= 1e-3
            most = ours if most is None else most
            np.testing.assert_array_equal(ours, most[:M])
            assert trim_prompt_cache(cache, M) == M
    assert not report(model).stock_calls


@pytest.mark.parametrize("weights", ["q4g64", "q8g32", "bf16", "f32"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_of_generate(name, weights):
    theirs = random_model(name, weights)
    theirs.set_dtype(mx.float32)
    assert greedy(accelerate(random_model(name, weights), "f32")) == greedy(theirs)


def test_a_wrong_weight_is_seen():
    model = random_model("llama", "q8g64")
    scales = model.model.layers[1].mlp.up_proj.scales
    scales[3, 1] = scales[3, 1] * 1.5
    theirs = reference_logits("llama", "q8g64", TOKENS)
    assert relative(logits_of(accelerate(model, "f32"), TOKENS), theirs) > 1e-3


@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 0.12), ("bf16", 0.06), (None, 0.12)])
def test_default_precision(precision, tolerance):
    model = accelerate(random_model("qwen2", "q4g64"), precision)
    assert report(model).precision == (precision or "int8")
    assert relative(logits_of(model, TOKENS), reference_logits("qwen2", "q4g64", TOKENS)) < tolerance


def test_the_embedded_pair():
    """Loaded, generated and speculated with by mlx-lm."""
    plain, models = {}, {}
    for role in ("target", "draft"):
        models[role] = load_model(embedded.path(role))[0]
        models[role].set_dtype(mx.float32)
        plain[role] = greedy(models[role])
        assert report(accelerate(models[role], "f32")).path == PATH
        assert greedy(models[role]) == plain[role]
    speculated = speculative_generate_step(
        mx.array(TOKENS[:9]), models["target"], models["draft"], num_draft_tokens=4, max_tokens=64
    )
    assert [int(token) for token, *_ in speculated] == plain["target"]
    for model in models.values():
        assert not report(model).stock_calls
        assert report(model).native_calls + report(model).graph_calls > 0


@pytest.mark.parametrize("weights", ["q4g64", "f32"])
def test_restore_is_bitwise(weights):
    model = random_model("llama", weights)
    kind, before, arrays = type(model), logits_of(model, TOKENS), dict(tree_flatten(model.parameters()))
    assert accelerate(model) is model
    assert isinstance(model, kind)
    assert not np.array_equal(logits_of(model, TOKENS), before)  # it was another path
    assert restore(model) is model
    assert type(model) is kind
    np.testing.assert_array_equal(logits_of(model, TOKENS), before)
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == arrays.keys()
    assert all(after[name] is arrays[name] for name in arrays)
    assert report(restore(model)).reason == "specfast.mlx.accelerate has not been called"


def resident_bytes():
    """Memory in use: what was freed is given back first."""
    gc.collect()
    (mx if hasattr(mx, "clear_cache") else mx.metal).clear_cache()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("weights", ["q4g64", "bf16"])
def test_weights_are_used_in_place(weights):
    sizes = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    model = random_model("llama-untied", weights, **sizes)
    arrays = [array for _, array in tree_flatten(model.parameters())]
    size = sum(array.nbytes for array in arrays)
    logits_of(accelerate(random_model()), TOKENS[:1])
    before = resident_bytes()
    accelerate(model)
    logits_of(model, TOKENS[:1])
    grown = resident_bytes() - before
    assert report(model).path == PATH
    assert grown < 0.05 * size, f"{grown / 1e6:.1f} MB for {size / 1e6:.1f} MB of weights"
    copies = [np.array(array.view(mx.uint8)) for array in arrays]  # a second copy would be seen
    assert resident_bytes() - before > 0.9 * sum(copy.nbytes for copy in copies)


def test_memory_outlives_the_arrays():
    model = random_model("llama", "q4g64")
    native = native_model(model, "f32")
    tokens = TOKENS.astype(np.int32)
    before = native.forward(_core.Cache(native), tokens, 1)
    for _, array in tree_flatten(model.parameters()):
        array[:] = mx.zeros_like(array)  # written in place as Python sees it; MLX gives the array new memory
    del model, array
    gc.collect()
    scrap = [mx.full((1 << 16,), 7.0) for _ in range(64)]
    mx.eval(scrap)
    np.testing.assert_array_equal(native.forward(_core.Cache(native), tokens, 1), before)


def test_a_dropped_model_is_freed():
    def is_freed(models):
        logits_of(models[0], TOKENS[:3])
        gone = weakref.ref(models[0])
        models.clear()
        return gone() is None

    gc.disable()
    try:
        assert is_freed([accelerate(random_model())]) or not is_freed([random_model()])  # some mlx-lm have cycles
    finally:
        gc.enable()


def test_replaced_weights_are_noticed():
    def replace_array(model):
        model.model.layers[0].mlp.down_proj.scales = model.model.layers[0].mlp.down_proj.scales * 2

    def replace_module(model):
        model.model.layers[1].self_attn.q_proj = nn.Linear(128, 128, bias=False)

    def replace_layers(model):
        model.model.layers = model.model.layers[:1]

    def replace_layer(model):
        model.model.layers[0] = model.model.layers[1]

    def replace_all(model):
        model.set_dtype(mx.float32)

    for replace in (replace_array, replace_module, replace_layers, replace_layer, replace_all):
        model, other = random_model(), random_model()
        accelerate(model)
        logits_of(model, TOKENS)
        mx.random.seed(0)
        replace(model)
        mx.random.seed(0)
        replace(other)
        np.testing.assert_array_equal(logits_of(model, TOKENS), logits_of(other, TOKENS))
        assert report(model).path == "stock"
        assert "replaced" in report(model).reason
    accelerate(model, "f32")  # the last one can be had again
    assert relative(logits_of(model, TOKENS), logits_of(other, TOKENS)) < 1e-3
    assert report(model).path == PATH


def test_unsupported_models_are_left_alone():
    from mlx_lm.models import gemma, rope_utils

    lora = random_model("llama", "f32")
    from mlx_lm.tuner.lora import LoRALinear

    lora.model.layers[0].self_attn.q_proj = LoRALinear.from_base(lora.model.layers[0].self_attn.q_proj)
    three_bits = random_model("llama", "f32")
    nn.quantize(three_bits, group_size=64, bits=3)
    values = dict(vars(random_model("llama", "f32").args), head_dim=32)
    names = gemma.ModelArgs.__dataclass_fields__
    cases = [
        (gemma.Model(gemma.ModelArgs(**{k: v for k, v in values.items() if k in names})), "mlx_lm.models.gemma.Model"),
        (lora, "model.layers.0.self_attn.q_proj is a LoRALinear"),
        (three_bits, "q3"),
        (random_model("llama", "f32", attention_bias=True), "bias"),
        (random_model("llama", "f32", rope_traditional=True), "rotates neighbouring pairs"),
    ]
    if hasattr(rope_utils, "YarnRoPE"):
        cases.append((random_model("llama", "f32", rope_scaling=YARN), "YarnRoPE"))
    for model, reason in cases:
        kind, before = type(model), logits_of(model, TOKENS[:9])
        assert accelerate(model) is model
        assert type(model) is kind
        assert report(model).path == "stock"
        assert reason in report(model).reason
        np.testing.assert_array_equal(logits_of(model, TOKENS[:9]), before)


def test_calls_that_mlx_lm_must_run():
    model, plain = accelerate(random_model("llama", "f32")), random_model("llama", "f32")
    two = mx.array(TOKENS[:18].reshape(2, 9))
    mx.eval(model(two))
    np.testing.assert_array_equal(np.asarray(model(two)), np.asarray(plain(two)))
    compiled = mx.compile(model)(two[:1])
    np.testing.assert_allclose(np.asarray(compiled), np.asarray(plain(two[:1])), atol=1e-4)
    quantised = make_prompt_cache(model)
    logits_of(model, TOKENS[:9], quantised)
    quantised = [cache.to_quantized(group_size=32, bits=2) for cache in quantised]
    assert quantised[0].offset == 9
    logits_of(model, TOKENS[9:12], quantised)
    logits_of(model, TOKENS[:2], [KVCache()])
    reasons = report(model).stock_calls
    assert reasons["inputs of shape (2, 9); supported: (1, M)"] == 2
    assert (reasons.get("inside a function transformation", 0) >= 1) is (PATH == "native")
    assert sum(count for reason, count in reasons.items() if "a QuantizedKVCache of 2 bits" in reason) == 1
    assert reasons["1 caches for 2 layers"] == 1
    assert report(model).path == PATH


def test_training_runs_in_mlx():
    model, plain = accelerate(random_model("llama", "f32")), random_model("llama", "f32")
    tokens = mx.array(TOKENS[:9])[None]

    def loss(model):
        return nn.losses.cross_entropy(model(tokens)[:, :-1], tokens[:, 1:], reduction="mean")

    ours, theirs = (nn.value_and_grad(m, lambda m=m: loss(m))() for m in (model, plain))
    assert ours[0].item() == theirs[0].item()
    for (_, a), (_, b) in zip(tree_flatten(ours[1]), tree_flatten(theirs[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_copy_is_stock():
    import copy

    model = accelerate(random_model("llama", "f32"))
    other = copy.deepcopy(model)
    assert "copy" in report(other).reason
    assert report(accelerate(other)).path == PATH
    assert report(model).path == PATH
    np.testing.assert_array_equal(logits_of(other, TOKENS), logits_of(model, TOKENS))
    other = pickle.loads(pickle.dumps(model))
    assert "copy" in report(other).reason
    np.testing.assert_array_equal(logits_of(accelerate(other), TOKENS), logits_of(model, TOKENS))


def test_results_are_ordinary_arrays():
    """Lazily used, evaluated asynchronously and kept: no result is written again by a later call."""
    model = accelerate(random_model("llama", "q4g64"))
    cache = make_prompt_cache(model)
    kept, sums = [], []
    for token in TOKENS[:20]:
        logits = model(mx.array([[int(token)]]) + 0, cache=cache)
        total = logits.sum() * 2
        mx.async_eval(total)
        kept.append(logits)
        sums.append(total)
    assert logits.shape == (1, 1, 96)
    assert logits.dtype == mx.float32
    again = logits_of(model, TOKENS[:20])
    for i in range(20):
        np.testing.assert_array_equal(np.asarray(kept[i])[0, 0], again[i])
        np.testing.assert_allclose(sums[i].item(), 2 * again[i].sum(), rtol=1e-3, atol=1e-3)


def test_bad_arguments():
    with pytest.raises(ConfigurationError, match="fp8"):
        accelerate(random_model(), "fp8")
    model = accelerate(random_model())
    if PATH == "native":
        with pytest.raises(specfast.ShapeError, match="token 96 is outside the vocabulary"):
            model(mx.array([[96]]))
    else:  # not looked at before it is computed
        logits = logits_of(model, [3, 96, 3])
        assert np.isnan(logits[1]).all()
        assert np.isfinite(logits[0]).all()
    with pytest.raises(TypeError):
        model()
    for function in (accelerate, report, restore):
        with pytest.raises(ConfigurationError, match="model is None, but must be a model"):
            function(None)

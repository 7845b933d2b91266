"""mlx-lm models on the Metal kernels through `mx.fast.metal_kernel`, whose generated sources run on the CPU."""

import itertools
import re
import warnings

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import specfast.mlx  # noqa: E402
from exo_session import fake_exo  # noqa: E402
from mlx_lm.models.cache import KVCache, trim_prompt_cache  # noqa: E402
from mlx_metal import (  # noqa: E402
    ExecutedLaunches,
    ExecutedMetalKernel,
    FaultyMetalKernel,
    generated_source,
    whole,
)
from mlx_models import generate_step, random_model  # noqa: E402
from specfast import ConfigurationError, KernelTrialError, ShapeError, metal  # noqa: E402
from specfast._core import Law  # noqa: E402
from specfast.checkpoint import load_model  # noqa: E402
from specfast.exo.layers import MlxLayers, NativeLayers  # noqa: E402
from specfast.mlx import metal as mlx_metal  # noqa: E402
from specfast.mlx import primitives, trial  # noqa: E402
from specfast.mlx.command import Models  # noqa: E402
from specfast.mlx.weights import config_of  # noqa: E402
from tiny_directories import write_model  # noqa: E402
from tiny_models import random_decoder  # noqa: E402


@pytest.fixture
def on_metal(monkeypatch):
    """The package believes that MLX has a GPU; its kernels run in the executor."""
    monkeypatch.setattr(mx.fast, "metal_kernel", ExecutedMetalKernel)
    monkeypatch.setattr(mlx_metal, "available", lambda: True)
    monkeypatch.setattr(primitives, "module", lambda: None)
    mlx_metal._function.cache_clear()
    forget_launches()
    yield
    mlx_metal._function.cache_clear()


def forget_launches():
    ExecutedMetalKernel.launches.clear()
    ExecutedLaunches.launches.clear()


def traced(launch, inputs, outputs):
    """What MLX prints as the source of a launch: tracing builds it without a GPU."""
    import contextlib
    import os
    import tempfile

    made = metal.generated(launch.kernel)
    kernel = mx.fast.metal_kernel(
        name=made.name,
        input_names=list(made.inputs),
        output_names=list(made.outputs),
        source=made.body,
        header=made.header,
    )

    def call(x):
        threads = tuple(a * b for a, b in zip(launch.grid, launch.threadgroup, strict=True))
        given = [x, *inputs[1:]]
        return kernel(
            inputs=given,
            grid=threads,
            threadgroup=launch.threadgroup,
            output_shapes=[s for s, _ in outputs],
            output_dtypes=[t for _, t in outputs],
            verbose=True,
        )

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
        before = os.dup(1)
        os.dup2(out.fileno(), 1)
        with contextlib.suppress(RuntimeError):
            mx.export_function(folder + "/f.mlxfn", call, inputs[0])
        os.dup2(before, 1)
        out.seek(0)
        return made, out.read().decode()


def test_the_signature_is_mlx_own():
    launch = metal.matmul_rows(metal.Weights(4, 64), "bf16", M=2, N=16, K=128)
    w, s, x = mx.zeros((16, 16), mx.uint32), mx.zeros((16, 2), mx.bfloat16), mx.zeros((2, 128), mx.bfloat16)
    inputs = [w, s, s, x, x, mx.array(launch.dims, mx.int32)]
    made, printed = traced(launch, inputs, [((2, 16), mx.bfloat16)])
    named = list(zip(made.inputs, inputs, strict=True))
    _, rebuilt = generated_source(made.name, named, [(made.outputs[0], mx.bfloat16)], made.body, "")

    def words(text):
        signature = text[text.index("[[kernel]] void custom_kernel") :]
        return re.sub(r"\s+", " ", signature.replace("```", "")).strip()

    assert words(printed) == words(rebuilt)


def forward(model, tokens, cache):
    logits = model(mx.array([tokens]), cache=cache)
    mx.eval(logits)
    return np.array(logits.astype(mx.float32))[0]


@pytest.mark.parametrize(
    ("name", "weights"),
    [("llama", "q4g64"), ("qwen2", "f32"), ("qwen3", "q8g32"), ("mistral", "f16"), ("llama-linear", "bf16")],
)
def test_logits_are_those_of_mlx_lm(on_metal, name, weights):
    model = random_model(name, weights)
    tokens = list(range(3, 15))
    stock_cache = [KVCache() for _ in model.layers]
    wanted = forward(model, tokens, stock_cache)
    specfast.mlx.accelerate(model)
    assert specfast.mlx.report(model).path == "metal"
    cache = [KVCache() for _ in model.layers]
    parts = [forward(model, tokens[a:b], cache) for a, b in ((0, 4), (4, 5), (5, 12))]
    found = np.concatenate(parts)
    assert found.dtype == np.float32
    tolerance = {"f32": 1e-4, "f16": 2e-2}.get(weights, 8e-2)
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
    assert [c.offset for c in cache] == [12] * len(cache)
    assert specfast.mlx.report(model).metal_calls == 3
    specfast.mlx.restore(model)
    assert np.array_equal(forward(model, tokens, [KVCache() for _ in model.layers]), wanted)


def test_rows_have_the_same_bits_in_any_tiles(on_metal):
    model = specfast.mlx.accelerate(random_model("llama", "q4g64"))
    tokens = list(range(20, 32))
    results = []
    for cuts in ((0, 12), (0, 1, 12), (0, 5, 6, 12)):
        cache = [KVCache() for _ in model.layers]
        results.append(np.concatenate([forward(model, tokens[a:b], cache) for a, b in itertools.pairwise(cuts)]))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_greedy_text_is_that_of_the_native_host(on_metal):
    prompt = mx.array([5, 9, 2, 77, 30])
    model = random_model("llama-untied", "f32")

    def text(given):
        return [int(token) for token, _ in generate_step(prompt, given, max_tokens=24)]

    found = text(specfast.mlx.accelerate(model))
    assert specfast.mlx.report(model).metal_calls >= 24
    mlx_metal.available = lambda: False  # undone by the fixture
    native = specfast.mlx.accelerate(random_model("llama-untied", "f32"), precision="f32")
    assert specfast.mlx.report(native).path == "native"
    assert found == text(native)


def test_the_cache_is_appended_in_place(on_metal):
    """The array that a pass appends to is the one of the pass before; only a full cache grows by a copy, as mlx-lm's does."""
    model = specfast.mlx.accelerate(random_model("llama", "q4g64"))
    cache = [KVCache() for _ in model.layers]
    forward(model, [1, 2, 3], cache)
    places = set()
    for token in range(4, 9):
        forward(model, [token], cache)
        mx.eval(cache[0].keys)
        places.add(np.asarray(cache[0].keys.view(mx.uint16)).ctypes.data)
    assert len(places) == 1


@pytest.mark.parametrize(("name", "weights"), [("llama", "q4g64"), ("qwen3", "f16")])
def test_keys_are_written_by_their_own_kernel(on_metal, monkeypatch, name, weights):
    """With specfast._mlx: the same bits, with the append inside the launch, also when the cache grows or is trimmed."""
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, 96, 12)]

    def results():
        model = specfast.mlx.accelerate(random_model(name, weights))
        forget_launches()  # the trial's
        cache = [KVCache() for _ in model.layers]
        for layer in cache:
            layer.step = 8
        parts = [forward(model, tokens[:5], cache), forward(model, tokens[5:8], cache)]
        trim_prompt_cache(cache, 2)
        parts.append(forward(model, tokens[6:12], cache))
        assert 12 <= cache[0].keys.shape[2] <= 16
        return np.concatenate(parts), *(
            np.array(rows[..., : cache[1].offset, :].astype(mx.float32)) for rows in (cache[1].keys, cache[1].values)
        )

    expected = results()
    assert ExecutedMetalKernel.launches["qkv_rope_append"] == 3 * 2
    monkeypatch.setattr(primitives, "module", lambda: ExecutedLaunches)
    for ours, theirs in zip(results(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert ExecutedMetalKernel.launches["qkv_rope_append"] == 0
    assert ExecutedLaunches.launches["qkv_rope_append"] == 3 * 2


def test_launches_of_a_pass(on_metal):
    model = specfast.mlx.accelerate(random_model("llama", "q4g64"))
    forget_launches()  # the trial's
    cache = [KVCache() for _ in model.layers]
    forward(model, [1, 2, 3], cache)
    layers = len(model.layers)
    assert ExecutedMetalKernel.launches == {
        "embed_rows": 1,
        "norm_rows": 2 * layers + 1,
        "qkv_rope_append": layers,
        "attend_rows": layers,
        "attend_spans": layers,
        "matmul_rows": 2 * layers,
        "swiglu_rows": layers,
        "logits_rows": 1,
    }


def test_generated_sources_are_clean(on_metal):
    from metal_emulator import EmulatorUnavailableError, lint

    ExecutedMetalKernel.texts.clear()
    for weights in ("q4g64", "f16"):
        model = specfast.mlx.accelerate(random_model("qwen2", weights))
        forward(model, [1, 2, 3], [KVCache() for _ in model.layers])
    try:
        assert [finding for text in ExecutedMetalKernel.texts.values() for finding in lint.lint(whole(text))] == []
    except EmulatorUnavailableError as missing:
        pytest.skip(str(missing))
    assert len(ExecutedMetalKernel.texts) > 12


def test_what_runs_mlx_lm_s_layers(on_metal):
    model = specfast.mlx.accelerate(random_model("llama", "q4g64"))
    forward(model, list(range(40)), [KVCache() for _ in model.layers])
    assert "more than 27" in str(specfast.mlx.report(model).stock_calls)
    small = specfast.mlx.accelerate(random_model("llama", "q4g64", head_dim=16))
    assert specfast.mlx.report(small).path == "stock"
    assert "head_dim is 16" in specfast.mlx.report(small).reason


def test_speculation_over_the_metal_path(on_metal):
    """specfast's loop on a model's own call: with a draft or without, the same text."""
    model, draft = random_model("llama-untied", "q4g64"), random_model("llama-untied", "q4g64", seed=5)
    prompt = [5, 9, 2, 77, 30, 5, 9, 2]
    texts = []
    for options in (
        {"drafter": "none"},
        {"drafter": "suffix", "num_draft_tokens": 4},
        {"draft_model": draft, "num_draft_tokens": 3},
    ):
        steps = specfast.mlx.generate_step(prompt, model, max_tokens=20, temp=0.9, seed=4, rule="coupled", **options)
        texts.append([step[0] for step in steps])
        assert specfast.mlx.report(model).path == "metal"
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 3
    assert specfast.mlx.report(model).metal_calls >= 10


def piece(name, weights, layers):
    """A model of three layers with nothing in it that a range of them does not need."""
    model = random_model(name, weights, num_hidden_layers=3)
    config = config_of(model)
    inner, tied = model.model, "lm_head" not in model
    for i in set(range(3)) - set(layers):
        inner.layers[i] = None
    last = layers.stop == 3
    if layers.start and not (last and tied):
        del inner["embed_tokens"]
    if not last:
        del inner["norm"]
        model.pop("lm_head", None)
    return mlx_metal.MetalForward(model, config, layers)


@pytest.mark.parametrize(("name", "weights"), [("llama", "q4g64"), ("llama-untied", "f16")])
def test_ranges_of_layers_chain_to_the_model(on_metal, name, weights):
    whole_model = random_model(name, weights, num_hidden_layers=3)
    forward = mlx_metal.MetalForward(whole_model, config_of(whole_model))
    calls = [mx.array([[5, 9, 2]]), mx.array([[7]])]

    def through(pieces):
        caches = [one.new_caches() for one in pieces]
        results = []
        for rows in calls:
            for one, held in zip(pieces, caches, strict=True):
                assert one.why_not(rows, held) == ""
                rows = one(rows, held)
                wanted = (mx.float32, 96) if one.last else (one.dtype, 128)
                assert (rows.dtype, rows.shape[2]) == wanted
            results.append(np.array(rows)[0])
        assert [len(held) for held in caches] == [len(one.range) for one in pieces]
        return np.concatenate(results)

    expected = through([forward])
    for cuts in ((0, 1, 3), (0, 1, 2, 3)):
        pieces = [piece(name, weights, range(a, b)) for a, b in itertools.pairwise(cuts)]
        np.testing.assert_array_equal(through(pieces), expected)
        assert sum(one.weight_bytes for one in pieces) == forward.weight_bytes
    # a control: a layer left out shows
    assert not np.array_equal(through([piece(name, weights, range(1)), *pieces[2:]]), expected)


def test_a_range_says_what_it_takes(on_metal):
    model = random_model("llama", "q4g64")
    config = config_of(model)
    for layers in (range(1, 3), range(0), range(-1, 1), range(0, 3, 2), range(1, -1, -1)):
        with pytest.raises(ConfigurationError, match=r"range\(0, 2\)"):
            mlx_metal.MetalForward(model, config, layers)
    last = mlx_metal.MetalForward(model, config, range(1, 2))
    for wrong in (mx.array([[1, 2]]), mx.zeros((1, 2, 64), mx.bfloat16), mx.zeros((1, 2, 128))):
        assert "takes" in last.why_not(wrong, last.new_caches())
        with pytest.raises(ShapeError, match="takes"):
            last(wrong, last.new_caches())
    assert last.why_not(mx.zeros((1, 2, 128), mx.bfloat16), last.new_caches()) == ""
    assert "2 caches for 1 layers" in last.why_not(mx.zeros((1, 2, 128), mx.bfloat16), 2 * last.new_caches())


@pytest.fixture
def fault(monkeypatch, on_metal):
    """Makes kernels faulty: fault(names' beginning, text, other text, error)."""

    def make(kernel, old="", new="", error=""):
        for name, value in {"kernel": kernel, "text": (old, new), "error": error}.items():
            monkeypatch.setattr(FaultyMetalKernel, name, value)
        monkeypatch.setattr(mx.fast, "metal_kernel", FaultyMetalKernel)
        mlx_metal._function.cache_clear()

    return make


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_is_tried_once(on_metal, monkeypatch, in_place):
    monkeypatch.setattr(primitives, "module", lambda: ExecutedLaunches if in_place else None)
    model = random_model("llama-untied", "q4g64")
    random_state = [np.array(key) for key in mx.random.state]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specfast.mlx.accelerate(model)
    assert all(np.array_equal(np.array(key), before) for key, before in zip(mx.random.state, random_state, strict=True))
    assert specfast.mlx.report(model).path == "metal"
    assert specfast.mlx.report(model).reason == ""
    assert specfast.mlx.report(model).metal_calls == 0
    layers = len(model.layers)
    assert ExecutedMetalKernel.launches["logits_rows"] == 4
    assert (ExecutedLaunches if in_place else ExecutedMetalKernel).launches["qkv_rope_append"] == 4 * layers
    forget_launches()
    for _ in range(2):
        list(specfast.mlx.generate_step([5, 9, 2], specfast.mlx.accelerate(model), max_tokens=2, temp=0))
    calls = specfast.mlx.report(model).metal_calls
    assert ExecutedMetalKernel.launches["logits_rows"] == calls >= 4
    model.model.norm.weight = model.model.norm.weight * 2  # another model
    specfast.mlx.accelerate(model)
    assert ExecutedMetalKernel.launches["logits_rows"] == calls + 4


SUM = "sums[r][m] = simd_sum(sums[r][m])"
LANE_LOST = "sums[r][m] = simd_sum(lane == 3u ? 0.0f : sums[r][m])"
MORE = f"{SUM} * (M == {{}} ? 1.0000002f : 1.0f)"
FAULTS = {  # a kernel, what its text has and gets, and what is said
    "a compiler that refuses": ("matmul_rows", "METAL_FUNC", "no_metal", "MLX did not run them (RuntimeError: "),
    "a span left out": ("attend_spans", "/ SPAN + 1", "/ SPAN", "of 1728 logits are not finite, and none may be"),
    "a rotation the other way": ("qkv_rope_append", "ac - bs", "ac + bs", "more than the 0.25 that rounding"),
    "a lane that is not added": ("swiglu_rows", SUM, LANE_LOST, "of their deviation away"),
    "other sums at M = 1": ("logits_rows", SUM, MORE.format(1), "a row of a pass of 1 has other bits"),
    "other sums at M = 4": ("logits_rows", SUM, MORE.format(4), "a row of a pass of 4 has other bits"),
    "other sums at M = 9": ("logits_rows", SUM, MORE.format(9), "a row of a pass of 4 has other bits"),
    "a launch that fails": ("attend_rows", "", "", "MLX did not run them (RuntimeError: [METAL] no memory)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_trial_leaves_mlx_lm_s_layers(fault, monkeypatch, name):
    kernel, old, new, expected = FAULTS[name]
    fault(kernel, old, new, "" if old else "[METAL] no\n memory")
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M9"}, raising=False)
    model = random_model("llama", "q4g64")
    tokens = [3, 1, 4, 1, 5]
    wanted = forward(model, tokens, [KVCache() for _ in model.layers])
    with pytest.warns(RuntimeWarning, match="failed their trial on Apple M9") as told:
        specfast.mlx.accelerate(model)
    report = specfast.mlx.report(model)
    assert report.path == "stock"
    assert expected in report.reason
    assert report.reason.endswith("; mlx-lm's layers run instead")
    assert [str(one.message) for one in told] == [report.reason]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specfast.mlx.accelerate(model)  # not tried again
        assert np.array_equal(forward(model, tokens, [KVCache() for _ in model.layers]), wanted)
        list(specfast.mlx.generate_step(tokens, model, max_tokens=2, temp=0))
    assert report.reason in Models(model, None, ("this", "none"), None).describe()


def test_launches_that_write_the_cache_fail_alone(on_metal, monkeypatch):
    class Refused(ExecutedLaunches):
        @staticmethod
        def launch(*arguments):
            raise RuntimeError("no such encoder")

    class NotWritten(ExecutedLaunches):
        @staticmethod
        def launch(*arguments):
            queries, *_ = ExecutedLaunches.launch(*arguments)
            return [queries, *arguments[-1]]

    tokens = [3, 1, 4, 1, 5]
    model = specfast.mlx.accelerate(random_model("llama", "q4g64"))
    expected = forward(model, tokens, [KVCache() for _ in model.layers])
    for launches, said in ((Refused, "no such encoder"), (NotWritten, "of their deviation away")):
        monkeypatch.setattr(primitives, "module", lambda launches=launches: launches)
        model = random_model("llama", "q4g64")
        with pytest.warns(RuntimeWarning, match=rf"{said}.*without specfast._mlx they passed"):
            specfast.mlx.accelerate(model)
        assert specfast.mlx.report(model).path == "metal"
        assert np.array_equal(forward(model, tokens, [KVCache() for _ in model.layers]), expected)


@pytest.mark.parametrize("layers", [range(1), range(1, 2), range(2, 3), range(1, 3)])
def test_a_range_of_layers_is_tried(fault, layers):
    model = random_model("qwen3", "f16", num_hidden_layers=3)
    config = config_of(model)
    trial.run(mlx_metal.MetalForward(model, config, layers), model)
    fault("attend_rows", "weight[i] * scale", "weight[i]")
    what = "logits" if layers.stop == 3 else "hidden rows"
    with pytest.raises(KernelTrialError, match=rf"{what} are [\d.]+ of their deviation away"):
        trial.run(mlx_metal.MetalForward(model, config, layers), model)


@pytest.mark.parametrize("tied", [True, False])
def test_exos_shards_run_on_the_kernels(on_metal, tmp_path, tied):
    """Layers of a ring: the bits do not depend on the rows beside, and are the native decoder's as far as float32 goes."""
    write_model(tmp_path, random_decoder(3, V=96, head_dim=32, tied=tied), max_context=64)
    tokens, ranges = np.array([5, 17, 3], np.int32), (range(1), range(1, 2))
    with fake_exo(hook=False):
        first, last = (MlxLayers.load(tmp_path, "llama-3.1-8b", layers, 2) for layers in ranges)
    native = [NativeLayers(load_model(tmp_path, layers=layers, precision="f32").model, layers) for layers in ranges]
    forget_launches()
    rows = first.forward(first.new_cache(8), tokens)
    assert ExecutedMetalKernel.launches
    one_by_one = first.new_cache(8)
    for i, row in enumerate(rows):
        assert np.array_equal(first.forward(one_by_one, tokens[i : i + 1])[0], row)
        one_by_one.commit(1)
    expected = native[0].forward(native[0].new_cache(8), tokens)
    assert np.abs(rows - expected).max() < 1e-4 * np.abs(expected).max()
    law = Law(temperature=0.0)
    verdicts = [each.verify(each.new_cache(8), rows, tokens[1:], law, 0, "token") for each in (last, native[1])]
    assert verdicts[0].next_token == verdicts[1].next_token
    assert verdicts[0].tau == verdicts[1].tau


def test_exos_shards_whose_kernels_fail_their_trial_run_in_mlx(on_metal, monkeypatch, tmp_path):
    write_model(tmp_path, random_decoder(3, V=96, head_dim=32), max_context=64)

    def fail(*_arguments):
        raise KernelTrialError("other bits beside other rows; mlx-lm's layers run instead")

    monkeypatch.setattr(trial, "run", fail)
    with fake_exo(hook=False), pytest.warns(RuntimeWarning, match="other bits"):
        layers = MlxLayers.load(tmp_path, "llama-3.1-8b", range(1), 2)
    forget_launches()
    assert layers.forward(layers.new_cache(8), np.array([5, 17], np.int32)).shape == (2, 32)
    assert not ExecutedMetalKernel.launches

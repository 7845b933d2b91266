"""specfast._mlx: the regions as primitives of MLX's graph have the native path's bits, and stay part of the graph."""

import gc
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import mlx_primitives  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import cache as stock  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache  # noqa: E402
from mlx_models import (  # noqa: E402
    ARCHITECTURES,
    generate_step,
    logits_of,
    random_model,
    reference_logits,
    speculative_generate_step,
)
from specfast import ConfigurationError, _core, ops  # noqa: E402
from specfast.mlx import accelerate, graph, primitives, report, restore  # noqa: E402
from specfast.mlx.weights import native_model  # noqa: E402

ROOT = Path(__file__).parents[1]
FULL = bool(os.environ.get("SPECFAST_FULL"))
FORMATS = ("q4g64", "q8g32", "bf16", "f32") if FULL else ("q4g64", "f32")
ROWS = range(21, 0, -1) if FULL else (21, 17, 16, 9, 8, 5, 2, 1)
TOKENS = np.random.default_rng(3).integers(0, 96, 321)


@pytest.fixture(scope="module")
def extension():
    return mlx_primitives.build(ROOT / "build" / f"mlx-{sys.implementation.cache_tag}-{mx.__version__}")


@pytest.fixture(scope="module", autouse=True)
def _primitives(extension):
    mx.set_default_device(mx.cpu)
    with mlx_primitives.installed(extension):
        yield


def lazy(name="llama", weights="q4g64", precision="f32"):
    """A model on the primitives."""
    model = accelerate(random_model(name, weights), precision)
    assert report(model).path == "primitives", report(model).reason
    return model


def eager(name="llama", weights="q4g64", precision="f32"):
    """The same model on the native path."""
    return accelerate(random_model(name, weights), precision, "native")


def graph_of(weights="q4g64", precision="f32"):
    """The primitives themselves, and the native model."""
    model = random_model("llama", weights)
    native = native_model(model, precision)
    return primitives.graph_of(model, native), native


def filled(model, count):
    cache = make_prompt_cache(model)
    if count:
        logits_of(model, TOKENS[:count], cache)
    return cache


def address(array):
    mx.eval(array)
    return np.asarray(array).ctypes.data


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_at_contexts(name, weights):
    """Close to mlx-lm in float32; the very bits of the native path, whatever M is."""
    theirs = reference_logits(name, weights, TOKENS)
    model, native = lazy(name, weights), eager(name, weights)
    for context in (0, 17, 300):
        cache, other = filled(model, context), filled(native, context)
        for M in ROWS:
            rows = TOKENS[context : context + M]
            ours = logits_of(model, rows, cache)
            assert (
                np.abs(ours - theirs[context : context + M]).max() <= 1e-3 * np.abs(theirs[context : context + M]).max()
            )
            np.testing.assert_array_equal(ours, logits_of(native, rows, other))
            assert trim_prompt_cache(cache, M) == trim_prompt_cache(other, M) == M
        for mine, their in zip(cache, other, strict=True):
            assert mine.offset == their.offset == context
            if context:
                for ours, expected in zip(mine.state, their.state, strict=True):
                    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))
    assert (report(model).native_calls, dict(report(model).stock_calls)) == (0, {})


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_bits_of_other_precisions(precision):
    model, native = lazy("qwen2", "q4g64", precision), eager("qwen2", "q4g64", precision)
    cache, other = filled(model, 17), filled(native, 17)
    for M in (1, 8, 21):
        np.testing.assert_array_equal(logits_of(model, TOKENS[:M], cache), logits_of(native, TOKENS[:M], other))
    np.testing.assert_array_equal(*(np.asarray(c[1].keys.astype(mx.float32)) for c in (cache, other)))
    np.testing.assert_array_equal(logits_of(model, TOKENS), logits_of(native, TOKENS))


def test_a_wrong_weight_is_seen():
    model = random_model("llama", "q8g64")
    scales = model.model.layers[1].mlp.up_proj.scales
    scales[3, 1] = scales[3, 1] * 1.5
    theirs = reference_logits("llama", "q8g64", TOKENS)
    assert np.abs(logits_of(accelerate(model, "f32"), TOKENS) - theirs).max() > 1e-3 * np.abs(theirs).max()


def test_greedy_tokens_of_generate():
    def tokens(steps):
        return [int(token) for token, *_ in steps]

    theirs = random_model("llama", "q4g64")
    theirs.set_dtype(mx.float32)
    prompt = mx.array(TOKENS[:9])
    expected = tokens(generate_step(prompt, theirs, max_tokens=64))
    model = lazy()
    assert tokens(generate_step(prompt, model, max_tokens=64)) == expected
    drafted = speculative_generate_step(prompt, model, lazy("llama", "q8g64"), num_draft_tokens=4, max_tokens=64)
    assert tokens(drafted) == expected
    assert report(model).graph_calls > 64
    assert not report(model).stock_calls


def test_the_suites_of_accelerated_models(extension):
    """What is tested of models and caches on the native path holds on this one."""
    chosen = [] if FULL else ["-k", "not test_rows_at_contexts and not test_greedy_tokens"]
    files = [str(ROOT / "tests" / f"test_mlx_{name}.py") for name in ("accelerate", "cache", "generate")]
    command = [sys.executable, mlx_primitives.__file__, extension, "-q", "-p", "no:cacheprovider", *chosen, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_restore_is_bitwise():
    model = random_model("llama", "q4g64")
    kind, before, arrays = type(model), logits_of(model, TOKENS), dict(tree_flatten(model.parameters()))
    assert not np.array_equal(logits_of(accelerate(model), TOKENS), before)
    restore(model)
    assert type(model) is kind
    np.testing.assert_array_equal(logits_of(model, TOKENS), before)
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is arrays[name] for name in arrays)


def test_nothing_is_computed_before_it_is_needed(tmp_path):
    model = lazy()
    names = tmp_path / "graph.dot"
    logits = model(mx.array(TOKENS[:3])[None])
    mx.export_to_dot(str(names), logits)  # what is still to be computed
    text = names.read_text()
    counts = {name: len(re.findall(rf'label ?= ?"Specfast{name}"', text)) for name in
              ("EmbedRows", "QkvRopeAppend", "AttendRows", "MatmulRows", "SwigluRows", "LogitsRows")}  # fmt: skip
    assert counts == {
        "EmbedRows": 1,
        "QkvRopeAppend": 2,
        "AttendRows": 2,
        "MatmulRows": 4,
        "SwigluRows": 2,
        "LogitsRows": 1,
    }
    mx.eval(logits)
    mx.export_to_dot(str(names), logits)
    assert "Specfast" not in names.read_text()


def test_streams():
    """On the stream of the call, whichever that is; several at the same time."""
    model, expected = lazy(), logits_of(eager(), TOKENS)
    inputs = mx.array(TOKENS)[None]
    other = mx.new_stream(mx.cpu)
    with mx.stream(other):
        on_other = model(inputs)
    both = [on_other, model(inputs)]
    mx.async_eval(both)
    with mx.stream(mx.cpu):
        both.append(model(inputs))
    for logits in both:
        np.testing.assert_array_equal(np.asarray(logits)[0], expected)
    g, _ = graph_of()
    rows = g.embed_rows(mx.array(TOKENS[:3]), stream=other)
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(g.embed_rows(mx.array(TOKENS[:3]))))


def test_a_pipeline_of_steps():
    """A token that is not known yet is the next step's input, and no step waits for another."""
    model, native = lazy(), eager()
    cache, other = filled(model, 9), filled(native, 9)
    token, tokens = mx.array([[int(TOKENS[9])]]), []
    for _ in range(20):
        token = mx.argmax(model(token, cache=cache)[:, -1], axis=-1, keepdims=True)
        mx.async_eval(token)
        tokens.append(token)
    step, expected = int(TOKENS[9]), []
    for _ in range(20):
        step = int(logits_of(native, [step], other)[0].argmax())
        expected.append(step)
    assert [token.item() for token in tokens] == expected


def test_compiled():
    model = lazy()
    compiled = mx.compile(model)
    for M in (3, 21, 3):
        np.testing.assert_array_equal(np.asarray(compiled(mx.array(TOKENS[:M])[None]))[0], logits_of(model, TOKENS[:M]))


@pytest.mark.parametrize("shapeless", [False, True])
def test_a_compiled_step(shapeless):
    """The position is an array: one compiled function serves every step."""
    g, native = graph_of()
    traced = []

    def step(tokens, offset, *kv):
        traced.append(1)
        logits, kv = g.forward(tokens, list(kv), offset, 2)
        return logits, offset + tokens.shape[0], *kv

    compiled = mx.compile(step, shapeless=shapeless)
    store = _core.Cache(native)
    state = (mx.array(0), *[g.write_rows(mx.zeros((0,), mx.uint32), *[mx.zeros((2, 0, 32))] * 2, mx.array(0), 2)] * 2)
    for token in TOKENS[:40]:
        logits, *state = compiled(mx.array([int(token)]), *state)
        mx.async_eval(logits, *state)
        expected = native.forward(store, np.array([token], np.int32), 1)
        store.commit(1)
        np.testing.assert_array_equal(np.asarray(logits), expected)
    assert state[0].item() == 40
    assert len(traced) == 1


def test_regions_one_by_one():
    """Each primitive by itself, from arrays that are not laid out in rows, gives the whole forward pass."""
    g, native = graph_of()

    def scattered(rows):
        return mx.array(np.asarray(rows).T.copy()).T

    offset, kv = mx.array(0, mx.int64), [mx.zeros((0,), mx.uint32)] * 2
    x = scattered(g.embed_rows(mx.array(TOKENS[:21])))
    for layer in range(2):
        q, kv[layer] = g.qkv_rope_append(layer, x, kv[layer], offset, 1)
        attended = g.attend_rows(layer, scattered(q), kv[layer], offset)
        x = scattered(g.matmul_rows(layer, "o", scattered(attended), x))
        x = scattered(g.matmul_rows(layer, "down", scattered(g.swiglu_rows(layer, x)), x))
    expected = native.forward(_core.Cache(native), TOKENS[:21].astype(np.int32), 21)
    np.testing.assert_array_equal(np.asarray(g.logits_rows(x)), expected)


def test_the_cache_grows_in_place():
    model = lazy()
    cache, seen = make_prompt_cache(model), []
    for token in TOKENS[:270]:
        mx.eval(model(mx.array([[int(token)]]), cache=cache))
        seen.append(address(cache[0].kv))
    assert len(set(seen[:256])) == 1  # a page
    assert len(set(seen)) == 2
    trim_prompt_cache(cache, 5)
    logits_of(model, TOKENS[:9], cache)
    assert address(cache[0].kv) == seen[-1]


def test_the_cache_grows_in_place_in_a_pipeline():
    """Also while the step before has not been computed and holds the same memory."""
    model, cache = lazy(), None
    cache = filled(model, 9)
    first = address(cache[0].kv)
    steps = []
    for token in TOKENS[9:19]:
        steps.append(model(mx.array([[int(token)]]), cache=cache))
        mx.async_eval(steps[-1])
    assert address(cache[0].kv) == first
    assert address(cache[1].kv) != first


def test_two_continuations_of_one_cache():
    """Whoever appends second gets a copy: neither sees the other's rows."""
    g, native = graph_of()
    nothing = [mx.zeros((0,), mx.uint32)] * 2
    _, prompt = g.forward(mx.array(TOKENS[:9]), nothing, mx.array(0), 1)
    mx.eval(prompt)
    offset = mx.array(9)
    for order in ((0, 1), (1, 0)):
        branches = [g.forward(mx.array(TOKENS[at : at + 5]), prompt, offset, 1) for at in (20, 40)]
        mx.eval(*(branches[i][0] for i in order))
        for (_, kv), at in zip(branches, (20, 40), strict=True):
            logits, _ = g.forward(mx.array([7]), kv, mx.array(14), 1)
            tokens = np.concatenate([TOKENS[:9], TOKENS[at : at + 5], [7]]).astype(np.int32)
            np.testing.assert_array_equal(np.asarray(logits), native.forward(_core.Cache(native), tokens, 1))
    assert len({address(kv[0]) for _, kv in branches} | {address(prompt[0])}) >= 2


def test_rows_that_cannot_be_had_are_nan():
    g, _ = graph_of()
    nothing = mx.zeros((0,), mx.uint32)
    x = np.asarray(g.embed_rows(mx.array([3, 96, -1, 3])))
    assert np.isnan(x[1:3]).all()
    np.testing.assert_array_equal(x[0], x[3])
    rows = mx.zeros((2, 128))
    for offset in (255, -1):
        q, kv = g.qkv_rope_append(0, rows, nothing, mx.array(offset), 1)
        assert np.isnan(np.asarray(q)).all()
        assert np.isnan(np.asarray(g.attend_rows(0, q, kv, mx.array(offset)))).all()
    assert np.isfinite(np.asarray(g.qkv_rope_append(0, rows, nothing, mx.array(254), 1)[0])).all()


def test_bad_arguments():
    g, native = graph_of()
    nothing, zero = mx.zeros((0,), mx.uint32), mx.array(0)
    for call, words in (
        (lambda: g.forward(mx.array([1]), [nothing], zero, 1), "every layer"),
        (lambda: g.forward(mx.array([[1]]), [nothing] * 2, zero, 1), "tokens must be"),
        (lambda: g.qkv_rope_append(2, mx.zeros((1, 128)), nothing, zero, 1), "no such layer"),
        (lambda: g.qkv_rope_append(0, mx.zeros((1, 64)), nothing, zero, 1), "another width"),
        (lambda: g.qkv_rope_append(0, mx.zeros((1, 128)), mx.zeros((7,), mx.uint32), zero, 1), "not this model's"),
        (lambda: g.qkv_rope_append(0, mx.zeros((1, 128)), mx.zeros((7,)), zero, 1), "uint32"),
        (lambda: g.matmul_rows(0, "q", mx.zeros((1, 128)), mx.zeros((1, 128))), "projections"),
        (lambda: g.read_rows(nothing, 1), "fewer positions"),
        (lambda: primitives._load()[0].Graph(native.graph_handle(), [], [], []), "2 layers"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    size = g.qkv_rope_append(0, mx.zeros((1, 128)), nothing, zero, 1)[1].size
    for forged in (mx.zeros((size,), mx.uint32), mx.array(np.zeros(size, np.uint32))):
        mx.eval(forged)
        with pytest.raises(ValueError, match="not written by specfast"):
            mx.eval(g.read_rows(forged, 1))
    with pytest.raises(TypeError):
        g.embed_rows(np.array([1]))
    with pytest.raises(ConfigurationError, match="unknown path"):
        accelerate(random_model(), path="metal")


@pytest.mark.parametrize(("rule", "lenience"), [("block", 1.0), ("token", 1.0), ("token", 0.6), ("token", 1.7)])
def test_verify_tokens(rule, lenience):
    g, _ = graph_of()
    random = np.random.default_rng(5)
    seen = set()
    for gamma in (0, 1, 4, 7):
        for _ in range(25):
            p, q = (random.dirichlet(np.full(50, 0.3), n).astype(np.float32) for n in (gamma + 1, max(gamma, 1)))
            q, tokens = q[:gamma], random.integers(0, 50, gamma).astype(np.int32)
            u = random.random(gamma + 1).astype(np.float32)
            for law in (q, np.zeros((gamma, 0), np.float32)):
                out = g.verify_tokens(*map(mx.array, (p, law, tokens, u)), rule=rule, lenience=lenience)
                ours = tuple(int(x.item()) for x in out)
                known = law if law.size or not gamma else None
                assert ours == ops.verify_tokens(p, known, tokens, u.astype(np.float64), rule=rule, lenience=lenience)
                seen.add(ours[0])
    assert len(seen) > 2
    with pytest.raises(ValueError, match="gamma"):
        g.verify_tokens(mx.zeros((2, 50)), mx.zeros((2, 50)), mx.array([1]), mx.zeros((2,)))


def test_a_round_without_the_host():
    """How many drafted tokens are kept is an array, and so is the position of the next round."""
    g, native = graph_of()
    offset, kv = mx.array(0), [mx.zeros((0,), mx.uint32)] * 2
    _, kv = g.forward(mx.array(TOKENS[:9]), kv, offset, 1)
    offset, pending = offset + 9, mx.array([5])
    text = [*TOKENS[:9].tolist(), 5]
    decided = []
    for seed in range(4):
        drafted = mx.array(TOKENS[20 + 4 * seed : 24 + 4 * seed].astype(np.int32))
        logits, kv = g.forward(mx.concatenate([pending, drafted]), kv, offset, 1)
        u = mx.array(np.random.default_rng(seed).random(5, np.float32) ** 4)
        tau, token = g.verify_tokens(mx.softmax(logits, axis=-1), mx.zeros((4, 0)), drafted, u, rule="token")
        offset, pending = offset + 1 + tau, token[None]
        decided.append((drafted, tau, token))
    for drafted, tau, token in decided:
        text += [*drafted.tolist()[: tau.item()], token.item()]
    assert offset.item() == len(text) - 1
    store = _core.Cache(native)
    native.prefill(store, np.array(text[:-1], np.int32))
    keys = g.read_rows(kv[1], len(text) - 1)[0]
    np.testing.assert_array_equal(np.asarray(keys), store.keys(1))


def test_copies_and_conversions():
    model, native = lazy(), eager()
    expected = logits_of(native, TOKENS[300:305], filled(native, 300))
    plain = random_model("llama", "q4g64")
    plain.set_dtype(mx.float32)
    for cache in (filled(model, 300), filled(native, 300), filled(plain, 300)):  # of each path, handed to each
        assert cache[0].offset == 300
        for runner, kind in ((model, graph.KVCache), (native, None), (plain, stock.KVCache), (model, graph.KVCache)):
            ours = logits_of(runner, TOKENS[300:305], cache)
            np.testing.assert_allclose(ours, expected, atol=2e-3 * np.abs(expected).max())
            assert trim_prompt_cache(cache, 5) == 5
            assert kind is None or type(cache[0]) is kind


def test_memory_of_a_dropped_model():
    """Primitives keep the weights' memory, not the model."""
    model = lazy()
    logits = model(mx.array(TOKENS[:3])[None])
    expected = logits_of(eager(), TOKENS[:3])
    del model
    gc.collect()
    scrap = [mx.full((1 << 16,), 7.0) for _ in range(64)]
    mx.eval(scrap)
    np.testing.assert_array_equal(np.asarray(logits)[0], expected)


def test_another_mlx_is_stepped_aside_for(extension, tmp_path):
    """Built for one version and met by another: the native path, and the reason says both."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, mlx.core as mx\n"
        "sys.path[:0] = [sys.argv[2]]\n"
        "if sys.argv[3]: mx.__version__ = sys.argv[3]\n"
        "import importlib.util, specfast\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: importlib.util.spec_from_file_location(name, sys.argv[1]) if name == 'specfast._mlx' else find(name, *a)\n"
        "specfast.__path__.append(sys.argv[1].rpartition('/')[0])\n"
        "from mlx_models import random_model, logits_of\n"
        "from specfast.mlx import accelerate, report, primitives\n"
        "mx.set_default_device(mx.cpu)\n"
        "model = accelerate(random_model())\n"
        "logits_of(model, [1, 2, 3])\n"
        "print(report(model).path, report(model).graph_calls, primitives.version(), primitives.why_not(), sep='|')\n"
    )

    def run(version):
        command = [sys.executable, "-W", "error", script, extension, ROOT / "tests", version]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip().split("|")

    assert run("") == ["primitives", "1", mx.__version__, ""]
    path, calls, version, why = run("0.99.1")
    assert (path, calls, version) == ("native", "0", "None")
    assert f"built against mlx {mx.__version__}, and this is mlx 0.99.1" in why


def test_launches_need_a_gpu():
    module = primitives._load()[0]
    out = module.launch("n", "text", "f", [1, 1, 1], [32, 1, 1], [3], [mx.zeros((3,))], [[2]], [mx.float16],
                        [mx.zeros((4,))])  # fmt: skip
    assert [(x.shape, x.dtype) for x in out] == [((2,), mx.float16), ((4,), mx.float32)]
    with pytest.raises(RuntimeError, match="f is a kernel for GPUs"):
        mx.eval(out)


@pytest.fixture(scope="module")
def apple_headers(tmp_path_factory):
    """MLX's headers with Metal, of its macOS wheel."""
    folder = tmp_path_factory.mktemp("headers")
    version = re.match(r"[\d.]+\d", mx.__version__)[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--platform",
               "macosx_14_0_arm64", "--python-version", "3.11", "--dest", folder, f"mlx-metal=={version}"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=240)
    except subprocess.TimeoutExpired:
        done = None
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"mlx-metal=={version} cannot be fetched: {done.stderr.decode()[-200:] if done else 'timeout'}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("mlx/include/")])
    wheels[0].unlink()
    return folder / "mlx" / "include"


@pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang++: metal-cpp uses blocks")
def test_metal_launches_compile(apple_headers, tmp_path):
    """Against MLX's own headers for macOS, Apple's being declarations of what metal-cpp names; nothing is linked or run."""

    def errors(text):
        (tmp_path / "launch.cpp").write_text(text)
        includes = [apple_headers, apple_headers / "metal_cpp", ROOT / "tests" / "apple_stubs", ROOT / "src"]
        command = ["clang++", "-std=c++20", "-fblocks", "-fsyntax-only", "-D_METAL_", "-DACCELERATE_NEW_LAPACK",
                   *(f"-I{folder}" for folder in includes), tmp_path / "launch.cpp"]  # fmt: skip
        return re.findall("error: .*", subprocess.run(command, capture_output=True, text=True, check=False).stderr)

    text = (ROOT / "src" / "mlx_launch.cpp").read_text()
    assert errors(text) == []
    assert errors(text.replace("encoder.set_vector_bytes", "encoder.set_vector"))

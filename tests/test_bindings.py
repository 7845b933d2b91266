"""The native module refuses what does not fit, with a typed error, and no arguments at all make it crash or hang."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from specfast import _core
from specfast.errors import ShapeError

FUZZ = Path(__file__).with_name("fuzz_bindings.py")


def floats(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("q", "kv", "message"),
    [
        ((1, 0, 64), (1, 1, 64), "0 query heads"),
        ((1, 0, 64), (1, 0, 64), "0 key/value heads"),
        ((1, 3, 64), (1, 2, 64), "3 query heads cannot share 2"),
        ((1, 8192, 2), (1, 1, 2), "1 to 4096"),
        ((1, 1, 0), (1, 1, 0), "head_dim 0"),
        ((1, 1, 3), (1, 1, 3), "head_dim 3"),
        ((1, 1, 1026), (1, 1, 1026), "2 to 1024"),
        ((0, 1, 64), (1, 1, 64), "0 rows"),
        ((1, 1, 2), (2**18 + 1, 1, 2), "262145 positions"),
        ((2, 1, 64), (1, 1, 64), "do not fit"),
        ((1, 1, 64), (1, 1, 32), "do not fit"),
    ],
)
def test_attention_that_cannot_be(q, kv, message):
    with pytest.raises(ShapeError, match=message):
        _core.attend_rows(floats(*q), floats(*kv), floats(*kv))


@pytest.mark.parametrize("milliseconds", [0.0, -1.0, float("nan"), float("inf")])
def test_measurements_that_would_not_end(milliseconds):
    with pytest.raises(ShapeError, match="milliseconds"):
        _core.peak_dot("f32", milliseconds=milliseconds)
    for passes in (0, 2**31 - 1):
        with pytest.raises(ShapeError, match="passes"):
            _core.read_bandwidth(np.zeros(512, np.uint8), passes)


def small_model(**changes):
    def matrix(N, K):
        return _core.Matrix("f32", N, K, floats(N, K).view(np.uint8))

    layer = {name: matrix(4, 4) for name in ("q", "k", "v", "o", "gate", "up", "down")}
    layer |= {"input_norm": floats(4), "post_norm": floats(4)}
    sizes = {"hidden": 4, "heads": 1, "kv_heads": 1, "head_dim": 4, "intermediate": 4, "vocab": 5, "rms_eps": 1e-5}
    return _core.Model(
        **sizes, rope_inv_freq=floats(2), max_context=16, embed=matrix(5, 4), head=None, norm=floats(4), precision="f32",
        layers=changes.get("layers", [layer | changes]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, "number of layers is 0"),
        ({"layers": [1]}, "a layer is a dictionary"),
        ({"q": 1}, "'q' is not a Matrix"),
        ({"input_norm": "x"}, "'input_norm' is not a float32 array"),
        ({"input_norm": floats(3)}, "input_norm has 3 elements"),
    ],
)
def test_layers_that_are_none(changes, message):
    with pytest.raises(ShapeError, match=message):
        small_model(**changes)


@pytest.mark.parametrize("lenience", [0.0, -1.0, float("nan")])
def test_lenience_must_be_positive(lenience):
    model = small_model()
    cache = _core.Cache(model)
    with pytest.raises(ShapeError, match="lenience"):
        model.verify(cache, np.array([1], np.int32), None, _core.Law(), lenience, 0, 0)
    assert cache.length + cache.provisional == 0
    assert model.verify(cache, np.array([1], np.int32), None, _core.Law(), 1.0, 0, 0).tau == 0


def fuzz(*arguments, before="pass"):
    """Runs the fuzzer; its exit code, counts of calls that returned, and the end of its log."""
    code = (
        f"import sys; sys.path.insert(0, {str(FUZZ.parent)!r}); import fuzz_bindings as f; {before}; f.main{arguments}"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    return run.returncode, dict(word.split("=") for word in run.stdout.split()), run.stderr[-500:]


def test_no_arguments_crash():
    code, returned, log = fuzz(1, 1100)
    assert code == 0, log
    assert len(returned) == 11
    assert all(int(count) > 0 for count in returned.values()), returned  # of 100 calls each


def test_the_fuzzer_sees_a_crash():
    code, _, log = fuzz(1, 20, before="import os; f.Fuzzer.law_rows = lambda self: os.abort()")
    assert code < 0
    assert log.rstrip().endswith("law_rows")


EXIT = """
import sys, threading, time
import numpy as np
import specfast

engine = specfast.load(notify=lambda line: None)

def allow_all(tokens):
    called.set()
    return np.ones(4096, bool)

def generate():
    while True:
        engine.generate("def f(", max_tokens=500, ignore_eos=True, mask=allow_all if sys.argv[1] == "mask" else None)
        called.set()

called = threading.Event()
for _ in range(2):
    threading.Thread(target=generate, daemon=True).start()
called.wait()
"""


@pytest.mark.parametrize("calls", ["mask", "native"])
def test_python_ends_while_daemon_threads_generate(calls):
    for _ in range(4):
        run = subprocess.run(
            [sys.executable, "-c", EXIT, calls], check=False, capture_output=True, text=True, timeout=60
        )
        assert (run.returncode, run.stderr) == (0, "")


AT_THE_END = """
import sys
import specfast

engine = specfast.load(notify=lambda line: None)

def stream():
    try:
        yield from engine.stream("def f(", max_tokens=50)
    finally:
        print(sys.is_finalizing(), len(engine.generate("def f(", max_tokens=5).token_ids))

begun = stream()
next(begun)
"""


def test_the_main_thread_calls_while_python_ends():
    run = subprocess.run([sys.executable, "-c", AT_THE_END], check=False, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "True 5\n", "")

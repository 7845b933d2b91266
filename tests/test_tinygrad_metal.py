"""tinygrad models on Metal without a Mac: what would be launched, and the very text and grid of it executed in tinygrad's graph."""

import ctypes
import functools
import sys
import types
from dataclasses import replace
from itertools import islice
from typing import ClassVar

import numpy as np
import pytest

pytest.importorskip("tinygrad", reason="tinygrad is not installed; pip install 'specfast[tinygrad]'")
try:
    import specfast.tinygrad as st
except ImportError as error:
    pytest.skip(f"tinygrad cannot run here: {error}", allow_module_level=True)

from specfast import _core, metal
from specfast.errors import ConfigurationError, NumericalError, ShapeError
from specfast.tinygrad import metal as tinygrad_metal
from specfast.tinygrad import private, trial
from specfast.tinygrad.weights import read_seams
from test_metal_verify_tokens import native_draws, random_round
from tinygrad import Tensor, TinyJit, UOp, dtypes
from tinygrad.uop.ops import Ops
from tinygrad_models import ids, logits, stock_logits, tensor_of, write_model

TOLERANCE = 2e-3
PROMPT = [5, 17, 3, 99, 42]


@functools.cache
def compiled(source):
    import metal_emulator

    try:
        return metal_emulator.compile(source)
    except metal_emulator.EmulatorUnavailableError as missing:
        pytest.skip(str(missing))


class ExecutedProgram(private.Program):
    """A Metal program as one of the CPU device, whose binary runs the program's own text, name, grid and group in the executor."""

    launches: ClassVar = []
    _kept: ClassVar = []  # a graph may be replayed for as long as the process lives

    def __call__(self, buffers, variables=()):
        assert not variables
        sizes = [buffer.numel() * buffer.dtype.itemsize for buffer in buffers]
        library = compiled(self.source)

        def run(*addresses):
            arrays = [
                np.frombuffer((ctypes.c_uint8 * n).from_address(at), np.uint8)
                for n, at in zip(sizes, addresses, strict=True)
            ]
            library.run(self.name, self.grid, self.group, arrays)
            self.launches.append(self)

        function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(buffers))(run)
        self._kept.append(function)
        address = ctypes.cast(function, ctypes.c_void_p).value
        return private.Program.__call__(
            replace(self, address=address, grid=(1, 1, 1)), buffers
        )  # the CPU calls once for each


@pytest.fixture
def on_metal(monkeypatch):
    """Models on the CPU device take the way of those on METAL, and the launches are executed."""
    monkeypatch.setattr(sys.modules["specfast.tinygrad.accelerate"], "on_metal", lambda seams: True)
    stand_in = types.SimpleNamespace(**{**vars(private), "Program": ExecutedProgram})
    monkeypatch.setattr(tinygrad_metal, "private", stand_in)
    ExecutedProgram.launches.clear()


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module", params=[("llama", "F32"), ("qwen3", "F32")], ids="-".join)
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("metal") / "m.gguf"
    write_model(path, *request.param, hidden=128)
    return path


def test_a_model_on_the_executed_launches(on_metal, file):
    """tinygrad's own logits, under one jit for each number of rows, at several positions, forward and back."""
    stock, fast = st.load_gguf(file), st.accelerate(st.load_gguf(file))
    report = st.report(fast)
    assert (report.path, report.isa, report.precision) == ("graph", "metal", "f32"), report
    text = ids(40, 300)
    whole = stock_logits(stock, tensor_of(text), 0).numpy()[0]
    jits = {M: TinyJit(lambda x, at: st.logits(fast, x, at) + 0) for M in (12, 1, 3)}
    for start, M in ((0, 12), (12, 12), (24, 12), (3, 3), (6, 3), (20, 3), (23, 1), (24, 1), (9, 1), (1, 1)):
        ExecutedProgram.launches.clear()
        found = jits[M](tensor_of(text[start : start + M]), private.variable("start_pos", 255, start)).numpy()[0]
        assert len(ExecutedProgram.launches) == (38 if M > metal.MAX_ROWS else 19)  # of a tile 8 a layer, and 3 more
        assert relative(found, whole[start : start + M]) <= TOLERANCE
    assert relative(found, whole[2:3]) > 0.1


class Faulty(ExecutedProgram):
    """Launches of one kernel that go wrong."""

    kernel, fault = "", None

    def __call__(self, buffers, variables=()):
        outs = super().__call__(buffers, variables)
        if self.kernel not in self.name:
            return outs
        return [type(self).fault(out) if i == self.outs[0] else out for i, out in enumerate(outs)]


def raising(_out):
    raise RuntimeError("the compiler refused it")


FAULTS = {
    "raises": (raising, "tinygrad did not run them (RuntimeError: the compiler refused it)"),
    "not finite": (lambda out: out * float("nan"), "are not finite"),
    "wrong": (lambda out: out.flip(1), "of their deviation away from those of tinygrad's layers"),
    "depends on the rows": (
        lambda out: out * (1 + 1e-6 * (out.shape[0] == 4)),
        "has other bits than in a pass of 9",
    ),
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=list(FAULTS))
def test_kernels_that_fail_their_trial_leave_the_model_alone(on_metal, monkeypatch, file, fault, reason):
    monkeypatch.setattr(Faulty, "kernel", "logits_rows")
    monkeypatch.setattr(Faulty, "fault", staticmethod(fault))
    stock, model = st.load_gguf(file), st.load_gguf(file)
    monkeypatch.setattr(tinygrad_metal.private, "Program", Faulty)
    with pytest.warns(RuntimeWarning, match="failed their trial"):
        st.accelerate(model)
    report = st.report(model)
    assert report.path == "stock"
    assert reason in report.reason
    assert not any(hasattr(block, "cache_kv") for block in model.blk)
    tokens = [list(islice(each.generate([5, 17, 3]), 4)) for each in (stock, model)]
    assert tokens[0] == tokens[1]


def test_lazy_passes_run_in_the_order_of_their_calls(on_metal, file):
    fast = st.accelerate(st.load_gguf(file))
    text = ids(9, 300)
    expected = logits(fast, text)
    logits(fast, text[::-1].copy())  # other keys and values in their places
    ExecutedProgram.launches.clear()
    first, second = st.logits(fast, tensor_of(text[:5]), 0), st.logits(fast, tensor_of(text[5:]), 5) + 1
    assert not ExecutedProgram.launches
    assert np.array_equal(second.numpy()[0], expected[5:] + 1)
    assert np.array_equal(first.numpy()[0], expected[:5])


def test_the_number_of_tokens_may_be_a_variable(on_metal, file):
    fast = st.accelerate(st.load_gguf(file))
    text = ids(24, 300)
    expected = logits(fast, text)
    whole = Tensor(np.resize(text, (1, 64))).clone().realize()
    for start, M in ((0, 8), (8, 3), (11, 5)):
        at, count = private.variable("start_pos", 255, start), private.variable("toks", 8, M)
        found = st.logits(fast, whole[:, at : at + count], at).pad_to((1, 8, None)).numpy()[0, :M]
        assert np.array_equal(found, expected[start : start + M])


def test_bits_do_not_depend_on_the_rows(on_metal, file):
    fast = st.accelerate(st.load_gguf(file))
    text = ids(10, 300)
    together = logits(fast, text)
    for M in (1, 4):
        rows = [logits(fast, text[at : at + M], at) for at in range(0, 10, M)]
        assert np.array_equal(np.concatenate(rows), together)
    text[9] ^= 1
    assert not np.array_equal(logits(fast, text)[9], together[9])


def test_greedy_tokens_with_and_without_speculation(on_metal, file):
    stock, fast = st.load_gguf(file), st.accelerate(st.load_gguf(file))
    expected = list(islice(stock.generate(list(PROMPT)), 12))
    assert list(islice(fast.generate(list(PROMPT)), 12)) == expected
    ExecutedProgram.launches.clear()
    result = st.generate(fast, PROMPT, 12, drafter="suffix", num_draft_tokens=3)
    assert result.token_ids == expected
    assert ExecutedProgram.launches


def test_weights_of_sixteen_bits(on_metal, tmp_path):
    write_model(tmp_path / "m.gguf", "llama", "F16", hidden=128, layers=1)
    stock, fast = st.load_gguf(tmp_path / "m.gguf"), st.accelerate(st.load_gguf(tmp_path / "m.gguf"))
    assert st.report(fast).precision == "f16"
    expected = stock_logits(stock, tensor_of(PROMPT), 0).numpy()[0]
    assert relative(logits(fast, PROMPT), expected) <= 1e-2


def test_what_has_no_kernels_is_left_alone_and_told(on_metal, tmp_path, file):
    write_model(tmp_path / "m.gguf", "llama", "Q8_0", hidden=128, layers=1)
    assert "unpacked from blocks" in st.report(st.accelerate(st.load_gguf(tmp_path / "m.gguf"))).reason
    assert "precision int8" in st.report(st.accelerate(st.load_gguf(file), "int8")).reason
    fast = st.accelerate(st.load_gguf(file))
    with pytest.raises(ShapeError, match="one sequence"):
        st.logits(fast, Tensor([[1], [2]]), 0)
    for start in (250, private.variable("start_pos", 255, 3)):
        with pytest.raises(ShapeError, match="do not fit"):
            st.logits(fast, tensor_of(ids(39, 300)), start)
    fast.output.weight.replace(fast.output.weight * 2)
    with pytest.raises(ConfigurationError, match="has been replaced"):
        logits(fast, PROMPT)


def on_a_gpu(model, dtype):
    """The same model with tensors of METAL, which have no memory here."""
    for weight in read_seams(model).weights:
        tensor = weight.tensor
        tensor.replace(Tensor.empty(*tensor.shape, dtype=dtype, device="METAL"))
    return model


@pytest.mark.parametrize("activations", ["f32", "f16", "bf16"])
def test_what_would_be_launched_on_a_gpu(file, monkeypatch, activations):
    """Every program of a pass as tinygrad's renderer for METAL has it: text, signature by index, grid and group."""
    monkeypatch.setattr(private, "is_realized", lambda tensor: True)
    monkeypatch.setattr(trial, "run", lambda path, model: None)  # there is no device
    model = st.accelerate(
        on_a_gpu(
            st.load_gguf(file), {"f32": dtypes.float32, "f16": dtypes.float16, "bf16": dtypes.bfloat16}[activations]
        )
    )
    report = st.report(model)
    assert (report.path, report.isa, report.precision) == ("graph", "metal", activations), report
    tokens = Tensor.empty(1, 5, dtype=dtypes.int32, device="METAL")
    made = st.logits(model, tokens, private.variable("start_pos", 255, 7))
    calls = [node for node in made.uop.toposort() if node.op is Ops.CALL and node.src[0].op is Ops.PROGRAM]
    counts = {}
    for call in calls:
        program = call.src[0]
        (text,) = (part.arg for part in program.src if part.op is Ops.SOURCE)
        assert not any(part.op is Ops.BINARY for part in program.src)
        name = program.arg.name
        stem = name.split(f"_{activations}")[0]
        counts[stem] = counts.get(stem, 0) + 1
        assert f'host_name("{name}")' in text
        assert '#include "' not in text
        compiled_program = program.replace(src=(*program.src, UOp(Ops.BINARY, arg=b"MTLB")))
        signature = compiled_program.to_elf().signature
        assert [entry[1] for entry in signature] == list(range(len(call.src) - 1))
        assert len(signature) <= 31  # what an indirect command buffer of tinygrad's jit takes
        assert {node.device for node in call.src[1:]} == {"METAL"}
        assert signature[-1][2] == dtypes.int  # the constants
        grid, group = program.arg.launch_dims({})
        assert min(*grid, *group) >= 1
        assert np.prod(group) % 32 == 0
        written = [node for i, node in enumerate(call.src[1:]) if i in program.arg.outs]
        assert written
    assert counts == {
        "embed_rows": 1, "norm_rows": 5, "qkv_rope_append": 2, "attend_rows": 2, "attend_spans": 2, "matmul_rows": 4,
        "swiglu_rows": 2, "logits_rows": 1,
    }  # fmt: skip


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_verdict_in_a_graph(on_metal, rule):
    """The kernels of the rules as programs: the C++ kernel's tokens."""
    rng, gamma, V = np.random.default_rng(4), 3, 300
    taus = set()
    for number in range(6):
        p, q, tokens = random_round(rng, gamma, V, V)
        settings = metal.VerifySettings(gamma, V, draft_vocab=V, rule=rule, seed=9, round=number)
        held = np.zeros(8, np.int32)
        held[:gamma] = tokens
        given = [Tensor(x).clone().realize() for x in (p, q, held, settings.array())]
        prefixes, masses = (
            Tensor.zeros(n, dtype=dtypes.uint64).clone().realize() for n in (gamma + 1, (gamma + 1) * 2)
        )
        out = Tensor.zeros(8, dtype=dtypes.int32).clone().realize()
        (prefixes,) = tinygrad_metal.launch(metal.verify_scan(), given, [prefixes])
        (masses,) = tinygrad_metal.launch(metal.verify_masses(gamma=gamma, V=V), [*given, prefixes], [masses])
        out, _ = tinygrad_metal.launch(metal.verify_pick(), [*given, prefixes], [], [out, masses])
        u = native_draws(9, number, gamma)
        assert tuple(out.tolist()[:2]) == tuple(_core.verify_tokens(p, q, tokens, u, rule=rule))
        taus.add(out.tolist()[0])
    assert len(taus) > 1


def test_a_wrong_grid_is_seen(on_metal):
    """A control of the executor in the graph: one threadgroup less, and the last rows are not written."""
    K, N = 64, 16
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(N, K)).astype(np.float32), rng.normal(size=(2, K)).astype(np.float32)
    how = metal.matmul_rows(metal.Weights(), "f32", M=2, N=N, K=K)
    for grid, right in ((how.grid, True), ((how.grid[0] - 1, 1, 1), False)):
        W = Tensor(w).clone().realize()
        inputs = [W, W, W, Tensor(x).clone().realize(), Tensor(x).clone().realize()]
        (y,) = tinygrad_metal.launch(replace(how, grid=grid), inputs, [Tensor.zeros(2, N).clone().realize()])
        assert np.allclose(y.numpy(), x @ w.T, atol=1e-4) == right


def test_logits_that_are_not_finite_give_no_token(file, on_metal, monkeypatch):
    model = st.load_gguf(file)
    weight = model.output.weight
    weight.replace(Tensor.full(weight.shape, float("nan")).contiguous()).realize()
    with pytest.warns(RuntimeWarning, match="tinygrad's layers are not finite, so that nothing can be compared"):
        st.accelerate(model)
    monkeypatch.setattr(trial, "run", lambda path, model: None)
    st.accelerate(model)
    with pytest.raises(NumericalError, match="not finite"):
        next(model.generate(list(PROMPT)))

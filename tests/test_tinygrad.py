"""Models in tinygrad's graphs: tinygrad's own results, the same bits for any rows, in every way that a graph is run."""

import gc
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tinygrad", reason="tinygrad is not installed; pip install 'specfast[tinygrad]'")
try:
    import specfast.tinygrad as st
except ImportError as error:
    pytest.skip(f"tinygrad cannot run here: {error}", allow_module_level=True)

import exo_transformer
from specfast import _core
from specfast.errors import ConfigurationError, IncompatibleDraftError, ShapeError, SpecfastError, UnsupportedModelError
from specfast.tinygrad import private
from specfast.tinygrad.host import own_forward
from tinygrad import Tensor, TinyJit, UOp, dtypes, function
from tinygrad_models import ids, logits, stock_logits, tensor_of, write_model

FULL = os.environ.get("SPECFAST_FULL") == "1"
KINDS = ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K")
TOLERANCE = 2e-3  # of the largest logit: tinygrad's own keys and values are float16
PROMPT = [5, 17, 3, 99, 42]
OLD_TINYGRAD = Path(os.environ.get("SPECFAST_TINYGRAD_OLD", Path(sys.prefix) / "tinygrad-0.10.2"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tinygrad") / "target.gguf"
    write_model(path)
    return path


@pytest.fixture(scope="module")
def draft_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tinygrad") / "draft.gguf"
    write_model(path, kind="Q8_0", layers=1)
    return path


@pytest.fixture
def model(file):
    return st.accelerate(st.load_gguf(file), "f32")


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(name, kind) for name in ("llama", "qwen3") for kind in KINDS]
    if FULL
    else [("llama", "Q4_0"), ("llama", "Q6_K"), ("qwen3", "Q4_0")],
)
def test_logits_are_tinygrads(tmp_path, architecture, kind):
    """At several positions, forward and back, under one TinyJit for each number of rows."""
    whole = FULL or (architecture, kind) == (
        "llama",
        "Q4_0",
    )  # the others cost tinygrad's own compiler as much, and us as little
    write_model(tmp_path / "m.gguf", architecture, kind, tied=kind == "Q8_0", layers=2 if whole else 1)
    stock, fast = st.load_gguf(tmp_path / "m.gguf"), st.accelerate(st.load_gguf(tmp_path / "m.gguf"), "f32")
    held = st.report(fast).weights
    assert held == {"file blocks": sum(held.values())}
    text = ids(64, fast.token_embd.weight.shape[0])
    jits = {}
    for M in range(1, 17) if FULL else (16, 1) if whole else (5,):
        own = TinyJit(lambda x, at: stock_logits(stock, x, at).contiguous())
        jits[M] = TinyJit(lambda x, at: st.logits(fast, x, at) + 0)
        for start in (0, M, 2 * M, M + 1, 3):
            at = private.variable("start_pos", 255, start)
            x = tensor_of(text[start : start + M])
            expected, found = own(x, at).numpy()[0], jits[M](x, at).numpy()[0]
            assert relative(found, expected) <= TOLERANCE
    with pytest.raises(AssertionError):  # a control: the tolerance tells one token from another
        assert relative(logits(fast, text[1:2]), logits(fast, text[:1])) <= TOLERANCE


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_bits_do_not_depend_on_how_many_rows_run_together(file, precision):
    model = st.accelerate(st.load_gguf(file), precision)
    text = ids(24, 300)
    together = logits(model, text)
    for M in range(1, 22):
        rows = [logits(model, text[at : at + M], at) for at in range(0, 24, M)]
        assert np.array_equal(np.concatenate(rows), together)
    text[23] ^= 1
    assert not np.array_equal(logits(model, text)[23], together[23])


def test_64_greedy_tokens_are_tinygrads(file, draft_file):
    """tinygrad's own loop with our pass under its jits, our loop with every drafter, and stock tinygrad."""
    stock, fast = st.load_gguf(file), st.accelerate(st.load_gguf(file), "f32")
    expected = list(islice(stock.generate(list(PROMPT)), 64))
    assert list(islice(fast.generate(list(PROMPT)), 64)) == expected
    draft = st.load_gguf(draft_file)
    ways = [
        {"drafter": "none"},
        {"drafter": "suffix"},
        {"drafter": "prompt-lookup"},
        {"early_exit": 1},
        {"draft_model": draft},
    ]
    for options in [*ways, {"draft_model": st.load_gguf(file)}, {"draft_model": draft, "drafter": "combined"}]:
        for gamma in (None, 4):
            result = st.generate(fast, PROMPT, 64, num_draft_tokens=gamma, **options)
            assert result.token_ids == expected
    assert result.stats.accepted > 0
    st.restore(fast)
    assert list(islice(fast.generate(list(PROMPT)), 8)) == expected[:8]


def test_rollbacks_at_random_positions_under_a_jit(model):
    """A walk that drops and overwrites what it read: always the logits of the whole text."""
    rng = np.random.default_rng(5)
    jits = {M: TinyJit(lambda x, at: st.logits(model, x, at) + 0) for M in (1, 3, 8)}
    text = np.zeros(0, np.int32)
    fresh = st.accelerate(st.restore(model), "f32")
    for _ in range(30):
        M = int(rng.choice(list(jits)))
        at = int(rng.integers(max(0, len(text) - 9), len(text) + 1))
        text = np.concatenate([text[:at], rng.integers(0, 300, M).astype(np.int32)])
        found = jits[M](tensor_of(text[at:]), private.variable("start_pos", 255, at)).numpy()[0]
        kept = text
    assert np.array_equal(found, logits(fresh, kept)[-M:])
    assert st.report(fresh).problem == ""


def test_the_number_of_tokens_may_be_a_variable(model):
    """As in tinygrad's own prefill: one captured graph for every length."""
    text = ids(40, 300)
    expected = logits(model, text)
    jit = TinyJit(lambda x, at: st.logits(model, x, at).pad_to((1, 16, 300)) + 0)
    whole = Tensor(np.resize(text, (1, 256))).clone().realize()
    for start, M in ((0, 16), (16, 9), (25, 15), (7, 3), (10, 16)):
        at, count = private.variable("start_pos", 255, start), private.variable("toks", 16, M)
        found = jit(whole[:, at : at + count].contiguous(), at)
        assert np.array_equal(found.numpy()[0, :M], expected[start : start + M])


def test_lazy_passes_run_once_and_in_the_order_of_their_calls(model):
    text = ids(12, 300)
    expected = logits(model, text)
    before = st.report(model).native_calls
    first = st.logits(model, tensor_of(text[:5]) * 1, 0)  # from a producer
    second = st.logits(model, tensor_of(text[5:9]), 5) + 1  # for a consumer
    third = st.logits(model, tensor_of(text[9:]), 9)
    assert st.report(model).native_calls == before
    assert np.array_equal(third.numpy()[0], expected[9:])
    assert np.array_equal(first.numpy()[0], expected[:5])
    assert np.array_equal(second.numpy()[0], expected[5:9] + 1)
    assert st.report(model).native_calls == before + 3


def test_passes_within_a_precompiled_function(model):
    text = ids(9, 300)
    expected = logits(model, text)

    @function(precompile=True, allow_implicit=True)
    def block(x, at):
        return (st.logits(model, x, at) * 2).contiguous()

    jit = TinyJit(lambda x, at: block(x, at) + 0)
    for start in (0, 3, 6, 3, 6):
        found = jit(tensor_of(text[start : start + 3]), private.variable("start_pos", 255, start)).numpy()[0]
        assert np.array_equal(found, 2 * expected[start : start + 3])


def test_weights_stay_in_tinygrads_memory(tmp_path):
    write_model(tmp_path / "m.gguf", "llama", "Q8_0")
    model = st.load_gguf(tmp_path / "m.gguf")
    st.accelerate(model, "f32")
    before = logits(model, PROMPT)
    whole, _ = private.file_part(model.output.weight)
    memory = private.memory_of(whole)
    memory[-2] ^= 64  # of the last block
    assert not np.array_equal(logits(model, PROMPT), before)
    memory[-2] ^= 64
    assert np.array_equal(logits(model, PROMPT), before)


def test_realised_weights_are_used_in_place(file):
    model, lazy = st.load_gguf(file), st.accelerate(st.load_gguf(file), "f32")
    for tensor in (tensors := [block.ffn_up.weight for block in model.blk]):
        tensor.replace(tensor.cast(dtypes.float16).contiguous())
    Tensor.realize(*tensors)
    model.blk[0].ffn_gate.weight.replace(model.blk[0].ffn_gate.weight * 2)  # a computation from the file's part
    lazy.blk[0].ffn_gate.weight.replace(lazy.blk[0].ffn_gate.weight.clone().realize() * 2)
    st.accelerate(lazy, "f32")
    st.accelerate(model, "f32")
    held = st.report(model).weights
    assert (held["in place"], held["realised"]) == (2, 1)
    assert relative(logits(model, PROMPT), logits(lazy, PROMPT)) < 1e-2  # Q4_0's values rounded to f16
    memory = private.memory_of(tensors[1])
    before = logits(model, PROMPT)
    memory[1] ^= 64
    assert not np.array_equal(logits(model, PROMPT), before)


def test_keys_and_values_can_be_read(model):
    logits(model, PROMPT)
    keys, values = st.cached_keys_values(model, 1)
    assert keys.shape == values.shape == (2, len(PROMPT), 64)
    assert np.array_equal(keys.numpy(), _core_cache(model).keys(1))
    logits(model, PROMPT[:2], 2)
    assert st.cached_keys_values(model, 0)[0].shape[1] == 4


def _core_cache(model):
    from specfast.tinygrad.accelerate import _path

    return _path(model).sequence.cache


def test_a_pass_that_cannot_be_is_nan_and_told(model):
    logits(model, PROMPT)
    assert np.isnan(logits(model, [1], 40)).all()
    assert "start position 40 is beyond the 5 positions" in st.report(model).problem
    assert np.isnan(logits(model, [1, 2, 100000], 5)).all()
    assert "outside the vocabulary" in st.report(model).problem
    assert np.isfinite(logits(model, [1], 5)).all()
    assert st.report(model).problem == ""


def test_a_graph_outlives_the_model_it_calls(model):
    jit = TinyJit(lambda x, at: st.logits(model, x, at) + 0)
    at = private.variable("start_pos", 255, 0)
    for _ in range(3):
        assert np.isfinite(jit(tensor_of(PROMPT), at).numpy()).all()
    st.restore(model)
    gc.collect()
    assert np.isnan(jit(tensor_of(PROMPT), at).numpy()).all()


def test_what_cannot_run_is_left_alone_and_told(file):
    model = st.load_gguf(file)
    assert st.report(model).path == "stock"
    model.blk[0].attn_extra = model.blk[0].attn_q
    assert "block 0 with attn_extra" in st.report(st.accelerate(model)).reason
    with pytest.raises(UnsupportedModelError, match="not accelerated"):
        st.logits(model, tensor_of(PROMPT), 0)
    del model.blk[0].attn_extra
    assert st.report(st.accelerate(model)).path == "graph"
    with pytest.raises(ShapeError, match="one sequence"):
        st.logits(model, Tensor([[1], [2]]), 0)
    with pytest.raises(ShapeError, match="not a bound variable"):
        st.logits(model, tensor_of([1]), private.variable("start_pos", 9, 3) + 1)
    model.output.weight.replace(model.output.weight * 2)
    with pytest.raises(ConfigurationError, match=r"output\.weight has been replaced"):
        st.logits(model, tensor_of(PROMPT), 0)
    with pytest.raises(ConfigurationError, match="precision 'half' is unknown"):
        st.accelerate(model, "half")


def test_sampled_text_with_a_seed(model, file, draft_file):
    options = {"temperature": 0.8, "seed": 11, "max_tokens": 32}
    plain = st.generate(model, PROMPT, drafter="none", **options)
    draft = st.load_gguf(draft_file)
    assert st.generate(model, PROMPT, draft_model=draft, **options).token_ids == plain.token_ids  # coupled
    result = st.generate(model, PROMPT, draft_model=draft, num_draft_tokens=4, **options)
    assert (result.terms.rule, result.lossless) == ("block", True)
    again = st.generate(model, PROMPT, draft_model=draft, num_draft_tokens=4, **options)
    assert again.token_ids == result.token_ids
    assert not st.generate(model, PROMPT, draft_model=draft, lenience=1.5, num_draft_tokens=4, **options).lossless


def test_bad_options_are_told(model, tmp_path):
    for options, message in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"num_draft_tokens": 21}, "num_draft_tokens"),
        ({"lenience": 3.0}, "lenience"),
        ({"drafter": "model"}, "needs a draft model"),
        ({"drafter": "oracle"}, "must be one of"),
        ({"early_exit": 2}, "outside 1 to 1"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            st.generate(model, PROMPT, **options)
    with pytest.raises(ConfigurationError, match="0 tokens"):
        st.generate(model, [])
    with pytest.raises(ConfigurationError, match="token ids here"):
        st.generate(model, "text")
    with pytest.raises(ConfigurationError, match="from 1 to 5000"):
        st.generate(model, [1, 5000])
    other = exo_transformer.build()
    with pytest.raises(IncompatibleDraftError, match="96 tokens"):
        st.generate(model, PROMPT, draft_model=other)


def test_models_of_any_build_run_in_tinygrad(tmp_path):
    """The host's own forward pass with our law and rollback: the same text with and without a draft."""
    write_model(tmp_path / "m.gguf", kind="F32", hidden=64)
    stock, draft = st.load_gguf(tmp_path / "m.gguf"), st.accelerate(st.load_gguf(tmp_path / "m.gguf"))
    forward, vocab, context = own_forward(stock)
    own = {"forward": forward, "vocab": vocab, "max_context": context}
    expected = list(islice(stock.generate(list(PROMPT)), 16))
    assert st.generate(stock, PROMPT, 16, drafter="none", **own).token_ids == expected
    result = st.generate(stock, PROMPT, 16, draft_model=draft, num_draft_tokens=3, **own)
    assert result.token_ids == expected
    assert result.stats.accepted > 0
    sampled = {"temperature": 1.0, "seed": 4, "max_tokens": 8, "num_draft_tokens": 3, "draft_model": draft}
    texts = [st.generate(stock, PROMPT, **sampled, **own).token_ids for _ in range(2)]
    assert texts[0] == texts[1] != expected[:8]
    with pytest.raises(UnsupportedModelError, match="early exit needs"):
        st.generate(stock, PROMPT, early_exit=1, **own)
    stock.has_recurrent_block = True
    with pytest.raises(UnsupportedModelError, match="cannot be rolled back"):
        own_forward(stock)
    with pytest.raises(UnsupportedModelError, match="give forward="):
        own_forward(object())


@pytest.fixture
def broken(monkeypatch):
    """A tinygrad whose programs have changed, tested anew as at import."""
    private._test_graphs.cache_clear()
    monkeypatch.setattr(UOp, "placeholder_like", None)
    with pytest.warns(RuntimeWarning, match=r"do not take native programs .*through the public API") as told:
        reasons = {private.graph_problem() for _ in range(3)}
    assert len(told) == 1
    assert "TypeError" in reasons.pop()
    yield
    private._test_graphs.cache_clear()


def test_without_the_private_api_the_public_one_serves(broken, tmp_path):
    write_model(tmp_path / "m.gguf", kind="F16", hidden=64)
    stock, fast = st.load_gguf(tmp_path / "m.gguf"), st.accelerate(st.load_gguf(tmp_path / "m.gguf"), "f32")
    report = st.report(fast)
    assert (report.path, set(report.weights)) == ("public", {"copied"})
    assert "TypeError" in report.reason
    expected = list(islice(stock.generate(list(PROMPT)), 12))
    assert list(islice(fast.generate(list(PROMPT)), 12)) == expected
    assert st.generate(fast, PROMPT, 12, num_draft_tokens=3).token_ids == expected
    text = ids(9, 300)
    whole = logits(fast, text)
    assert relative(whole, stock_logits(stock, tensor_of(text), 0).numpy()[0]) <= TOLERANCE
    assert np.array_equal(logits(fast, text[4:], 4), whole[4:])
    with pytest.raises(ShapeError, match="beyond the 9 positions"):
        logits(fast, text, 40)


def test_a_probe_with_another_result_is_a_failure(monkeypatch):
    monkeypatch.setattr(private.Program, "__call__", lambda self, buffers, variables=(): [buffers[0] + 1])
    with pytest.raises(RuntimeError, match="instead of"):
        private._run_probe()


@pytest.mark.parametrize("version", [(0, 10, 1), (0, 15, 0), (1, 0)])
def test_other_versions_are_refused(monkeypatch, version):
    monkeypatch.setattr(private, "version", lambda: version)
    with pytest.raises(private.UnsupportedHostError, match=r"outside 0\.10\.2 to 0\.14.*pip install"):
        private.require_supported()


def test_a_metal_program_has_its_sources_signature():
    """What would be compiled and launched on a GPU: buffers and then variables by index, and the grid in threadgroups."""
    from tinygrad.uop.ops import Ops

    buffers = [
        Tensor.empty(8, 64, device="METAL", dtype=dtypes.half),
        Tensor.empty(64, device="METAL", dtype=dtypes.half),
    ]
    source = "kernel void rows(device half* y [[buffer(0)]], constant int& start_pos [[buffer(2)]]) {}"
    program = private.Program("rows", source=source, grid=(8, 1, 1), group=(64, 1, 1), outs=(0,))
    (made, _) = program(buffers, [private.variable("start_pos", 100, 7)])
    node = next(node for node in made.uop.toposort() if node.op is Ops.PROGRAM)
    assert [part.arg for part in node.src if part.op is Ops.SOURCE] == [source]
    assert not any(part.op is Ops.BINARY for part in node.src)
    compiled = node.replace(src=(*node.src, UOp(Ops.BINARY, arg=b"MTLB")))
    assert [entry[:3] for entry in compiled.to_elf().signature] == [
        (None, 0, dtypes.half), (None, 1, dtypes.half), ("start_pos", 2, dtypes.int),
    ]  # fmt: skip
    assert tuple(map(tuple, node.arg.launch_dims({"start_pos": 7}))) == ((8, 1, 1), (64, 1, 1))
    assert (node.arg.outs, node.arg.ins, list(node.arg.vals({"start_pos": 7}))) == ((0,), (1,), [7])


def exo_findings(path=None):
    environment = dict(os.environ)
    if path:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, str(Path(__file__).parent / "exo_transformer.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_exo(found):
    assert max(found["errors"]) <= TOLERANCE
    assert all(text == found["stock"] for text in found["texts"])


def test_exos_class_in_a_graph():
    """Its own layers' logits and text, by list of caches; with SPECFAST_EXO_CHECKOUT those of the real class."""
    found = exo_findings()
    check_exo(found)
    assert (found["path"], found["weights"]) == ("graph", {"in place": 21})


@pytest.mark.skipif(
    not OLD_TINYGRAD.is_dir(),
    reason=f"no tinygrad 0.10.2 in {OLD_TINYGRAD}, nor in SPECFAST_TINYGRAD_OLD (make test installs it)",
)
def test_exos_class_through_the_public_api_of_its_own_time():
    found = exo_findings(OLD_TINYGRAD)
    check_exo(found)
    assert (found["version"], found["path"], found["weights"]) == ([0, 10, 2], "public", {"copied": 21})


def test_damaged_files_never_reach_tinygrad(file, tmp_path):
    raw, rng = file.read_bytes(), np.random.default_rng(0)
    for i in range(200 if FULL else 40):
        damaged = tmp_path / "damaged.gguf"
        cut = bytearray(raw[: int(rng.integers(0, 3000))]) if i % 2 else bytearray(raw)
        for at in rng.integers(0, 400, 3):
            if at < len(cut):
                cut[at] ^= 1 << int(rng.integers(0, 8))
        damaged.write_bytes(cut)
        try:
            st.load_gguf(damaged)
        except SpecfastError:
            continue
        assert i % 2 == 0  # a truncated one is always told


def test_parts_of_a_file_are_known_by_their_graphs(file):
    """Not by the names that the model has for them: whatever else is computed from the file is realised."""
    stock, model, other = (st.load_gguf(file) for _ in range(3))
    for one in (stock, model):
        one.blk[0].ffn_up.weight.replace(one.blk[1].ffn_up.weight)
        one.blk[0].attn_v.weight.replace(one.blk[0].attn_v.weight.flip(0))
    st.accelerate(model, "f32")
    assert (st.report(model).weights["realised"], st.report(model).weights["file blocks"]) == (1, 20)
    expected = stock_logits(stock, tensor_of(PROMPT), 0).numpy()[0]
    assert relative(logits(model, PROMPT), expected) <= TOLERANCE
    assert relative(logits(st.accelerate(other, "f32"), PROMPT), expected) > 0.1
    model.blk[0].attn_q.weight.replace(model.blk[0].attn_q.weight.flip(0))
    assert "more than one order" in st.report(st.accelerate(model)).reason


def test_cores_forward_is_what_graphs_call():
    assert _core.GraphForward.function > 0
    assert _core.GraphForward.function != _core.GraphForward.probe

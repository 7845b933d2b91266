"""What cannot be with a tinygrad model is told: never a wrong token, never an exception of somebody else's."""

import copy
import gc
import os
import pickle
import warnings
import weakref
from itertools import islice

import numpy as np
import pytest

pytest.importorskip("tinygrad", reason="tinygrad is not installed; pip install 'specfast[tinygrad]'")
try:
    import specfast.tinygrad as st
except ImportError as error:
    pytest.skip(f"tinygrad cannot run here: {error}", allow_module_level=True)

import exo_transformer
from gguf_writer import decoder_metadata, decoder_tensors, encode, tokenizer_metadata, write_gguf
from specfast.errors import (
    ConfigurationError,
    IncompatibleDraftError,
    ModelFormatError,
    NumericalError,
    ShapeError,
    UnsupportedModelError,
)
from specfast.tinygrad import private
from tiny_directories import byte_level
from tiny_models import random_decoder
from tinygrad import Tensor, TinyJit, nn
from tinygrad_models import ids, logits, tensor_of, write_model

PROMPT = [5, 17, 3, 99, 42]
SIZE = len(byte_level().get_vocab(with_added_tokens=True))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tinygrad") / "target.gguf"
    write_model(path)
    return path


@pytest.fixture
def model(file):
    return st.accelerate(st.load_gguf(file), "f32")


def text_of(model, count=6, prompt=PROMPT):
    return list(islice(model.generate(list(prompt)), count))


@pytest.mark.parametrize("start", [-1, -5, 256, 2**70, 0.0, None, "0", Tensor([0])], ids=str)
def test_start_positions_outside_the_context(model, start):
    before = logits(model, PROMPT)
    with pytest.raises(ShapeError, match="start_pos is "):
        st.logits(model, tensor_of([1, 2]), start)
    assert np.array_equal(logits(model, PROMPT, np.int64(0)), before)


@pytest.mark.parametrize(
    "tokens", [[1, 2], np.array([[1]]), Tensor([1, 2]), Tensor([[1.0]]), Tensor([[1], [2]]), Tensor([[]])], ids=repr
)
def test_what_are_no_tokens(model, tokens):
    with pytest.raises(ShapeError, match="tokens"):
        st.logits(model, tokens, 0)
    assert np.isfinite(logits(model, PROMPT)).all()  # the pass after it is not spoilt


def replace(model):
    model.output.weight.replace(model.output.weight * 2)


def rebind(model):
    model.output.weight = Tensor.zeros(*model.output.weight.shape).contiguous().realize()


def another_layer(model):
    model.blk[0].ffn_up = nn.Linear(256, 768, bias=False)


def swapped_layers(model):
    model.blk.reverse()


def fewer_layers(model):
    model.blk.pop()


def more_layers(model):
    model.blk.append(model.blk[0])


@pytest.mark.parametrize("change", [replace, rebind, another_layer, swapped_layers, fewer_layers, more_layers])
def test_weights_that_are_no_longer_the_models_raise_everywhere(model, change):
    text_of(model)  # captured
    st.generate(model, PROMPT, 4)
    change(model)
    for use in (
        lambda: st.logits(model, tensor_of(PROMPT), 0),
        lambda: text_of(model),
        lambda: st.generate(model, PROMPT, 4),
        lambda: st.cached_keys_values(model, 0),
        lambda: model(tensor_of(PROMPT), 0, Tensor([0.0])),
    ):
        with pytest.raises(ConfigurationError, match=r"has been replaced or changed .*accelerate again"):
            use()
    if change is not fewer_layers and change is not more_layers:
        assert np.isfinite(logits(st.accelerate(model), PROMPT)).all()


def test_matrices_changed_in_place_are_followed_and_vectors_raise(file):
    model = st.load_gguf(file)
    for weight in (model.output_norm.weight, model.output.weight):
        weight.replace(weight.float().contiguous().clone()).realize()
    st.accelerate(model, "f32")
    before = logits(model, PROMPT)
    model.output.weight.assign((model.output.weight * 2).contiguous()).realize()
    np.testing.assert_array_equal(logits(model, PROMPT), 2 * before)
    model.output_norm.weight.assign((model.output_norm.weight * 2).contiguous()).realize()
    with pytest.raises(ConfigurationError, match=r"output_norm\.weight has been replaced or changed"):
        logits(model, PROMPT)


def test_a_replay_before_a_pass_that_was_asked_for_is_nan_and_told(model):
    text = ids(8, 300)
    expected = logits(model, text)[5:]
    jit, at = TinyJit(lambda x, at: st.logits(model, x, at) + 0), private.variable("start_pos", 255, 5)
    for _ in range(3):
        assert np.array_equal(jit(tensor_of(text[5:]), at).numpy()[0], expected)
    logits(model, [9] * 5)
    lazy = st.logits(model, tensor_of(text[:5]), 0)
    assert np.isnan(jit(tensor_of(text[5:]), at).numpy()).all()
    assert "have not been computed: 1; realise their logits" in st.report(model).problem
    lazy.realize()
    assert np.array_equal(jit(tensor_of(text[5:]), at).numpy()[0], expected)
    assert st.report(model).problem == ""


def test_keys_and_values_are_those_of_a_pass_not_computed_yet(model):
    before = st.report(model).native_calls
    lazy = st.logits(model, tensor_of(PROMPT), 0)
    assert st.cached_keys_values(model, 0)[0].shape[1] == len(PROMPT)
    assert np.isfinite(lazy.numpy()).all()
    assert st.report(model).native_calls == before + 1
    for layer in ("a", -1, 2, 1.0):
        with pytest.raises(ConfigurationError, match=r"layer is .* 0 to 1"):
            st.cached_keys_values(model, layer)


@pytest.mark.parametrize("between", [2, 30])
def test_model_generate_reads_its_text_anew_after_another(model, between):
    expected = text_of(model, 12)
    logits(model, [9] * between)
    assert text_of(model, 12) == expected
    calls = st.report(model).native_calls
    assert text_of(model, 1) == expected[:1]
    assert st.report(model).native_calls == calls + 1  # a control: what its own cache holds is not read again


def test_model_generate_ends_where_its_cache_becomes_anothers(file, model):
    for end in (lambda: logits(model, PROMPT), lambda: text_of(model, 1, [9, 9]), lambda: st.restore(model)):
        running = st.accelerate(model, "f32").generate(list(PROMPT))
        next(running)
        end()
        with pytest.raises(ConfigurationError, match="there is one cache"):
            next(running)
    stock = st.load_gguf(file)
    running = stock.generate(list(PROMPT))
    next(running)
    st.accelerate(stock)
    with pytest.raises(NumericalError, match="no token follows: start position"):
        next(running)


def test_logits_that_are_not_finite_give_no_token(file):
    model = st.load_gguf(file)
    weight = model.blk[1].ffn_up.weight
    weight.replace(Tensor.full(weight.shape, float("nan")).contiguous()).realize()
    st.accelerate(model)
    for generate in (text_of, lambda model: st.generate(model, PROMPT, 4)):
        with pytest.raises(NumericalError, match="not finite"):
            generate(model)
    logits(model, PROMPT)
    assert "not finite" in st.report(model).problem


def test_a_model_is_freed_with_what_runs_it(file):
    model = st.accelerate(st.load_gguf(file))
    text_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_copies_of_an_accelerated_model_are_refused(model):
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigurationError, match="cannot be copied or pickled"):
            copied(model)
    assert st.report(copy.copy(st.restore(model))).path == "stock"


@pytest.mark.parametrize("model", [None, 3, "target.gguf", {}], ids=repr)
def test_what_is_no_model(model):
    for use in (
        st.accelerate,
        st.restore,
        st.report,
        lambda model: st.logits(model, tensor_of(PROMPT), 0),
        lambda model: st.generate(model, PROMPT, 4),
    ):
        with pytest.raises(ConfigurationError, match="must be a tinygrad model"):
            use(model)
    with pytest.raises(UnsupportedModelError, match="not accelerated"):
        st.logits(nn.Linear(4, 4), tensor_of(PROMPT), 0)


def test_the_problem_is_that_of_the_last_pass_of_all_sequences():
    model = st.accelerate(exo_transformer.build(), "f32")
    with pytest.raises(ShapeError, match="cache is an empty list"):
        model(tensor_of([1]), 0, [])
    assert np.isnan(model(tensor_of([1]), 50, None).numpy()).all()
    assert "start position 50" in st.report(model).problem
    caches = exo_transformer.caches()
    assert np.isfinite(model(tensor_of([1]), 0, caches).numpy()).all()
    assert st.report(model).problem == ""


def test_a_refused_model_is_left_as_it_was(file):
    model = st.load_gguf(file)
    model.output.weight.replace(model.output.weight * 2)
    before = private.identity(model.output.weight)
    weight = model.blk[1].ffn_down.weight
    weight.replace(weight.cast("float64").contiguous()).realize()
    assert "ffn_down.weight is dtypes.double" in st.report(st.accelerate(model)).reason
    assert private.identity(model.output.weight) is before
    sharded = st.load_gguf(file)
    sharded.blk[0].ffn_up.weight.shard_(("CPU:0", "CPU:1"), axis=0).realize()
    assert "ffn_up.weight is in parts on CPU, CPU:1" in st.report(st.accelerate(sharded)).reason


def rewritten(path, change, architecture="llama", **tensors):
    """A whole GGUF file with its metadata or tensors changed; a value or tensor of None is left out."""
    decoder = random_decoder(
        3, V=SIZE, hidden=64, heads=4, kv_heads=2, head_dim=16, layers=2, architecture=architecture, tied=False
    )
    stored, _ = decoder_tensors(decoder, architecture, "F32")
    metadata = decoder_metadata(decoder, architecture, max_context=256) | tokenizer_metadata(byte_level())
    write_gguf(
        path,
        {key: value for key, value in (metadata | change).items() if value is not None},
        {key: value for key, value in (stored | tensors).items() if value is not None},
    )
    return path


def ones(*shape):
    return "F32", shape, encode(np.ones(shape), "F32")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.rope.freq_base": None}, "'llama.rope.freq_base' is missing, which tinygrad needs"),
        ({"llama.context_length": None}, "'llama.context_length' is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon' is missing"),
        ({"llama.attention.head_count_kv": None}, "head_count_kv' is missing"),
        ({"tokenizer.ggml.tokens": None}, "'tokenizer.ggml.tokens' is missing"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "'tokenizer.ggml.tokens' has 2 elements"),
        ({"llama.nextn_predict_layers": 1}, "tinygrad builds 1 layers of the file's 2"),
        ({"llama.attention.kv_lora_rank": 8}, "tinygrad cannot build the model"),
        ({"blk.1.ffn_up.weight": None}, "up_proj.weight' is missing"),
        ({"blk.1.ffn_up.weight": ones(64, 64)}, "has shape .* but its metadata needs"),
        ({"blk.2.ffn_up.weight": ones(192, 64)}, "3 layers, but its metadata says 2"),
        ({"blk.0.extra.weight": ones(64)}, "has no place"),
        ({"output_norm.weight": ("F32", (64,), encode(np.full(64, np.nan), "F32")[0])}, "holds NaN"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_incomplete_files_name_what_is_missing(tmp_path, change, message):
    assert st.load_gguf(rewritten(tmp_path / "whole.gguf", {})).max_context == 256
    tensors = {key: value for key, value in change.items() if key.startswith(("blk", "output"))}
    path = rewritten(
        tmp_path / "m.gguf", {key: value for key, value in change.items() if key not in tensors}, **tensors
    )
    with pytest.raises(ModelFormatError, match=message) as told:
        st.load_gguf(path)
    assert "m.gguf" in str(told.value)


def test_what_tinygrad_leaves_out_is_refused_or_told(tmp_path):
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    with pytest.raises(UnsupportedModelError, match=r"RoPE scaling 'linear' .*specfast generate"):
        st.load_gguf(rewritten(tmp_path / "linear.gguf", linear))
    with pytest.raises(UnsupportedModelError, match="a bias on"):
        st.load_gguf(rewritten(tmp_path / "bias.gguf", {}, **{"blk.0.attn_q.bias": ones(64)}))
    path = rewritten(tmp_path / "factors.gguf", {}, **{"rope_freqs.weight": ones(8)})
    with pytest.warns(RuntimeWarning, match=r"factors for RoPE \(rope_freqs.weight\) out"):
        model = st.load_gguf(path)
    for each in (model, st.accelerate(model)):
        assert "rope_freqs.weight" in st.report(each).notice


@pytest.mark.parametrize("path", [None, 3, ["a"], "", "\0", "."], ids=repr)
def test_what_is_no_file(path):
    with pytest.raises((ConfigurationError, ModelFormatError), match=r"must name a GGUF file|cannot be read"):
        st.load_gguf(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFormatError, match="no regular file"):
        st.load_gguf(tmp_path / "pipe.gguf")


@pytest.mark.parametrize("context", [0, -5, 1.5, True, "8"])
def test_contexts_that_cannot_be(file, context):
    with pytest.raises(ConfigurationError, match=r"max_context is .*at least 1"):
        st.load_gguf(file, context)


DRAFT = object()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft_tokens": 2.5}, "num_draft_tokens is 2.5"),
        ({"num_draft_tokens": True}, "num_draft_tokens is True"),
        ({"num_draft_tokens": "4"}, "num_draft_tokens is '4'.* or 'auto'"),
        ({"early_exit": "1"}, "early_exit is '1'"),
        ({"early_exit": 1.0}, "early_exit is 1.0"),
        ({"early_exit": True}, "early_exit is True"),
        ({"early_exit": 2}, "outside 1 to 1"),
        ({"lenience": "1"}, "lenience is '1'"),
        ({"max_tokens": 4.0}, "max_tokens is 4.0"),
        ({"drafter": ["suffix"]}, "must be one of"),
        ({"eos_ids": 5}, "eos_ids is 5"),
        ({"eos_ids": "ab"}, "eos_ids is 'ab'"),
        ({"eos_ids": [10**9]}, "eos_ids has token 1000000000"),
        ({"text": "x"}, "text is 'x'"),
        ({"forward": "x", "vocab": 300, "max_context": 20}, "forward is 'x'"),
        ({"forward": print}, "needs vocab="),
        ({"vocab": 300}, "give it, or neither"),
        ({"draft_model": "draft.gguf"}, "must be a tinygrad model"),
        ({"draft_model": DRAFT, "drafter": "none"}, "a draft model and drafter none are two ways"),
        ({"draft_model": DRAFT, "drafter": "suffix"}, "two ways to draft"),
        ({"draft_model": DRAFT, "early_exit": 1}, "early_exit 1 and a draft model are two ways"),
        ({"drafter": "suffix", "early_exit": 1}, "early_exit 1 and drafter suffix are two ways"),
    ],
    ids=str,
)
def test_options_that_cannot_be(model, options, message):
    with pytest.raises(ConfigurationError, match=message):
        st.generate(model, PROMPT, **options)


def test_gamma_may_be_auto(model):
    assert st.generate(model, PROMPT, 8, num_draft_tokens="auto").terms.gamma == "auto"
    assert st.generate(model, PROMPT, 8, eos_ids=[np.int64(7)], early_exit="auto").terms.drafter == "early-exit"


@pytest.mark.parametrize("wide", ["target", "draft"])
def test_padded_logits_of_the_same_tokens_are_no_other_vocabulary(tmp_path, wide):
    for name in ("target", "draft"):
        size = SIZE + 20 if name == wide else SIZE
        decoder = random_decoder(
            3, V=size, hidden=64, heads=4, kv_heads=2, head_dim=16, layers=2, architecture="llama", tied=False
        )
        tensors, _ = decoder_tensors(decoder, "llama", "F32")
        metadata = decoder_metadata(decoder, "llama", max_context=256) | tokenizer_metadata(byte_level(), size=size)
        write_gguf(tmp_path / f"{name}.gguf", metadata, tensors)
    target, draft = (st.load_gguf(tmp_path / f"{name}.gguf") for name in ("target", "draft"))
    for sampling in ({}, {"temperature": 1.0, "seed": 3}):
        result = st.generate(target, PROMPT, 24, draft, **sampling)
        assert result.token_ids == st.generate(target, PROMPT, 24, draft, drafter="combined", **sampling).token_ids
        assert result.stats.drafted > 0
        assert result.stats.fallbacks == 0
        assert max(result.token_ids) < SIZE
    other = rewritten(tmp_path / "other.gguf", {"tokenizer.ggml.tokens": [str(i) for i in range(SIZE)]})
    pair = (target, st.load_gguf(other)) if wide == "target" else (st.load_gguf(other), draft)
    with pytest.raises(IncompatibleDraftError, match="are not those of"):
        st.generate(pair[0], PROMPT, 4, pair[1])


def test_a_draft_of_a_shorter_context_is_told(file, model):
    with pytest.warns(RuntimeWarning, match="context holds 8 tokens, and the text may have 35"):
        result = st.generate(model, PROMPT, 30, st.load_gguf(file, 8), num_draft_tokens=2)
    assert result.token_ids == st.generate(model, PROMPT, 30, drafter="none").token_ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        st.generate(model, PROMPT, 30, st.load_gguf(file, 35), num_draft_tokens=2)

"""Model directories that are damaged, hostile, inconsistent or unsupported: typed errors, no crash, no hang."""

import json
import os
import struct

import numpy as np
import pytest
from random_checkpoints import stored, write_checkpoint
from specfast import _core
from specfast.architecture import read_config
from specfast.checkpoint import load_model, open_weights
from specfast.convert import convert
from specfast.errors import ConfigurationError, ModelFormatError, NumericalError, SpecfastError, UnsupportedModelError
from specfast.safetensors_file import TensorView, open_safetensors, write_safetensors

MUTATIONS = int(os.environ.get("SPECFAST_FUZZ", "2000"))


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(tmp_path / "model", "llama-untied")


def edit_config(directory, **values):
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": TENSOR}, b"x" * 7, "holds 7 bytes"),
        ({"a": TENSOR}, b"x" * 9, "belong to nothing"),
        ({"a": TENSOR, "b": TENSOR}, b"x" * 8, "ends at 8"),
        ({"a": {**TENSOR, "dtype": "F99"}}, b"x" * 8, "unknown type"),
        ({"a": {**TENSOR, "shape": [-2]}}, b"x" * 8, "impossible shape"),
        ({"a": {**TENSOR, "shape": [2**61, 2**61]}}, b"x" * 8, "needs"),
        ({"a": {**TENSOR, "shape": [True]}}, b"x" * 8, "impossible shape"),
        ({"a": {**TENSOR, "data_offsets": [8, 0]}}, b"x" * 8, "lies at"),
        ({"a": {**TENSOR, "data_offsets": [0, 2**63]}}, b"x" * 8, "impossible offsets"),
        ({"a": {**TENSOR, "extra": 1}}, b"x" * 8, "exactly"),
        ([1], b"", "not an object"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
    ],
)
def test_bad_headers(tmp_path, header, data, message):
    with pytest.raises(ModelFormatError, match=message):
        open_safetensors(header_file(tmp_path / "x.safetensors", header, data))


def test_bad_files(tmp_path):
    path = tmp_path / "x.safetensors"
    for content, message in ((b"", "empty"), (b"1234", "too few"), (struct.pack("<Q", 2**60), "claims")):
        path.write_bytes(content)
        with pytest.raises(ModelFormatError, match=message):
            open_safetensors(path)
    with pytest.raises(ModelFormatError, match="cannot be read"):
        open_safetensors(tmp_path / "none.safetensors")


def test_views_are_the_file(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"b": stored(values, "F32"), "a": stored(values, "BF16")})
    tensors = open_safetensors(path)
    assert np.array_equal(tensors["b"].as_float32(), values)
    assert np.array_equal(tensors["a"].as_float32(), values)
    assert not tensors["b"].data.flags.writeable


def mutate(rng, content, header_bytes):
    content = bytearray(content)
    kind = rng.integers(5)
    if kind == 0:
        return bytes(content[: rng.integers(len(content))])
    if kind == 1:
        content[:8] = struct.pack("<Q", int(rng.integers(0, 2**63)) >> int(rng.integers(0, 60)))
    elif kind == 2:
        content += bytes(int(rng.integers(1, 5000)))
    else:
        where = header_bytes if kind == 3 else len(content)
        for _ in range(int(rng.integers(1, 6))):
            at = int(rng.integers(where))
            content[at] ^= 1 << int(rng.integers(8))
    return bytes(content)


@pytest.mark.timeout(7200)
def test_mutated_weights(tmp_path, model):
    """Every mutation either loads and runs, or ends in a typed error."""
    convert(model, tmp_path / "q", group_size=32)
    outcomes = {"loaded": 0, "refused": 0}
    for directory in (model, tmp_path / "q"):
        path = directory / "model.safetensors"
        original = path.read_bytes()
        header_bytes = 8 + struct.unpack("<Q", original[:8])[0]
        rng = np.random.default_rng(4)
        for i in range(MUTATIONS // 2):
            path.unlink()  # mapped pages of earlier rounds stay theirs
            path.write_bytes(mutate(rng, original, header_bytes))
            try:
                native = load_model(directory).model
                if i % 10 == 0:
                    native.verify(_core.Cache(native), np.array([1], dtype=np.int32), None, _core.Law(0.0), 1.0, 0, 0)
                outcomes["loaded"] += 1
            except SpecfastError:
                outcomes["refused"] += 1
    assert outcomes["refused"] > MUTATIONS // 3
    assert outcomes["loaded"] > 0


@pytest.mark.timeout(7200)
def test_mutated_configs(model):
    path = model / "config.json"
    original = path.read_bytes()
    rng = np.random.default_rng(5)
    junk = [None, -1, 0, 1, 3, 2**31, 2**63, 1e300, "x", [], {}, [1], True, float("nan")]
    keys = list(json.loads(original))
    for _ in range(MUTATIONS // 2):
        values = json.loads(original)
        for _ in range(int(rng.integers(1, 3))):
            values[keys[int(rng.integers(len(keys)))]] = junk[int(rng.integers(len(junk)))]
        path.write_text(json.dumps(values))
        try:
            load_model(model)
        except SpecfastError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_size": ...}, ModelFormatError, "'hidden_size' is missing"),
        ({"hidden_size": 129}, ModelFormatError, "has shape"),
        ({"num_attention_heads": 5}, ModelFormatError, "cannot be shared"),
        ({"head_dim": 7}, ModelFormatError, "even"),
        ({"vocab_size": 97}, ModelFormatError, r"\(96, 128\).*\(97, 128\)"),
        ({"num_hidden_layers": 3}, ModelFormatError, "layers.2.* is missing"),
        ({"num_hidden_layers": 1}, ModelFormatError, r"have 2 layers, but config.json says 1 \("),
        ({"tie_word_embeddings": "yes"}, ModelFormatError, "true or false"),
        ({"eos_token_id": 96}, ModelFormatError, r"config.json: 'eos_token_id' is 96, .* 0 to 95"),
        ({"eos_token_id": [3, 10**9]}, ModelFormatError, "'eos_token_id'.* 0 to 95"),
        ({"num_hidden_layers": 10**9}, ModelFormatError, "1 to 1024"),
        ({"rms_norm_eps": -1}, ModelFormatError, "rms_norm_eps"),
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedModelError, "supported: Llama"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, UnsupportedModelError, "llama3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, UnsupportedModelError, "partial rotary"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, UnsupportedModelError, "kinds of layers"),
        ({"attention_bias": True}, UnsupportedModelError, "bias"),
        ({"mlp_bias": True}, UnsupportedModelError, "bias"),
        ({"quantization": {"bits": 3, "group_size": 64}}, UnsupportedModelError, "4 and 8 bit"),
        ({"quantization": {"bits": 4, "group_size": 16}}, UnsupportedModelError, "groups of 32, 64 and 128"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, UnsupportedModelError, "mxfp4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, UnsupportedModelError, "gptq"),
        ({"quantization_config": {"quant_method": "hqq", "bits": 4, "group_size": 64}}, UnsupportedModelError, "hqq"),
    ],
)
def test_impossible_configs(model, changes, error, message):
    edit_config(model, **changes)
    with pytest.raises(error, match=message):
        load_model(model)


def test_a_config_of_other_weights(tmp_path, model):
    convert(model, tmp_path / "q", group_size=32)
    edit_config(tmp_path / "q", quantization=...)
    with pytest.raises(ModelFormatError, match="does not say how"):
        load_model(tmp_path / "q")
    edit_config(tmp_path / "q", quantization={"bits": 8, "group_size": 32})
    with pytest.raises(ModelFormatError, match="has shape"):
        load_model(tmp_path / "q")


def test_missing_parts(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="pickled"):
        load_model(model)
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(ModelFormatError, match=r"no \*\.safetensors"):
        load_model(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(ModelFormatError, match="missing"):
        load_model(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    with pytest.raises(ModelFormatError, match="weight_map"):
        load_model(model)


def logits_of(native):
    return native.forward(_core.Cache(native), np.arange(5, dtype=np.int32), 5)


def rewrite(directory, change):
    tensors = {name: stored(t.as_float32(), "F32") for name, t in open_weights(directory).items()}
    change(tensors)
    (directory / "model.safetensors").unlink()
    write_safetensors(directory / "model.safetensors", tensors)


def test_a_head_that_is_missing_and_one_that_is_tied(model):
    untied = load_model(model).model
    rewrite(model, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ModelFormatError, match=r"lm_head\.weight' is missing.*tie_word_embeddings"):
        load_model(model)
    for value in (True, ...):  # what is not said is read off the weights
        edit_config(model, tie_word_embeddings=value)
        native = load_model(model).model
        assert native.weight_bytes == untied.weight_bytes  # the embedding is as large
        assert not np.array_equal(logits_of(native), logits_of(untied))


def test_tensors_that_are_no_layers_are_left_alone(model):
    expected = logits_of(load_model(model).model)
    extra = stored(np.ones(16), "F32")
    names = (
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.norm",
        "layers.7.x",
    )
    rewrite(model, lambda t: t.update(dict.fromkeys(names, extra)))
    assert np.array_equal(logits_of(load_model(model).model), expected)
    rewrite(model, lambda t: t.update({"model.layers.7.x": extra}))
    with pytest.raises(ModelFormatError, match="have 8 layers"):
        load_model(model)


def test_nan_in_a_norm_is_seen_at_once(model):
    rewrite(model, lambda t: t.update({"model.norm.weight": stored(np.full(128, np.nan), "F32")}))
    with pytest.raises(ModelFormatError, match="NaN"):
        load_model(model)


def test_nan_in_a_matrix_is_seen_in_the_logits(model):
    rewrite(model, lambda t: t.update({"lm_head.weight": stored(np.full((96, 128), np.nan), "F32")}))
    native = load_model(model).model
    with pytest.raises(NumericalError, match="not finite"):
        native.verify(_core.Cache(native), np.array([1], dtype=np.int32), None, _core.Law(0.0), 1.0, 0, 0)


@pytest.mark.parametrize(("precision", "kv_bits"), [("int8", 16), ("bf16", 16), ("f32", 16), ("int8", 8)])
@pytest.mark.parametrize("quantise", [False, True])
def test_one_nan_anywhere_is_seen(tmp_path, model, precision, kv_bits, quantise):
    """One value of any matrix, bias or scale: no precision rounds it away."""
    if quantise:
        convert(model, tmp_path / "q", group_size=32)
        model = tmp_path / "q"
    path = model / "model.safetensors"
    clean = {name: TensorView(t.dtype, t.shape, t.data.copy()) for name, t in open_weights(model).items()}
    floats = [name for name, t in clean.items() if t.dtype == "F32" and "norm" not in name]
    assert len(floats) >= 16
    for name in floats:
        values = clean[name].as_float32()
        values.reshape(-1)[3 * values.shape[-1] if "embed" in name else 0] = np.nan
        path.unlink()
        write_safetensors(path, clean | {name: stored(values, "F32")})
        native = load_model(model, precision=precision, kv_bits=kv_bits).model
        with pytest.raises(NumericalError):
            native.verify(_core.Cache(native), np.array([3, 1], dtype=np.int32), None, _core.Law(1.0), 1.0, 0, 0)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "q4", "q8"])
def test_tensors_need_no_alignment(tmp_path, dtype):
    """A header of any length leaves the same bits in the logits."""
    model = write_checkpoint(tmp_path / "model", "llama-untied", dtype=dtype if dtype[0] != "q" else "BF16")
    if dtype[0] == "q":
        convert(model, tmp_path / "q", bits=int(dtype[1]), group_size=32)
        model = tmp_path / "q"
    path = model / "model.safetensors"
    original = path.read_bytes()
    end = 8 + struct.unpack("<Q", original[:8])[0]
    logits = []
    for spaces in (0, 1, 3):
        path.unlink()
        path.write_bytes(struct.pack("<Q", end - 8 + spaces) + original[8:end] + b" " * spaces + original[end:])
        native = load_model(model).model
        logits.append(logits_of(native))
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


def test_a_norm_of_integers(model):
    tensors = dict(open_weights(model)) | {"model.norm.weight": TensorView("I32", (128,), np.zeros(512, np.uint8))}
    (model / "model.safetensors").unlink()
    write_safetensors(model / "model.safetensors", tensors)
    with pytest.raises(ModelFormatError, match=r"model\.norm\.weight.*I32"):
        load_model(model)


def test_options_out_of_range(model):
    with pytest.raises(ConfigurationError, match="int8, bf16, f32"):
        load_model(model, precision="fp8")
    with pytest.raises(ConfigurationError, match="kv_bits is 4"):
        load_model(model, kv_bits=4)
    with pytest.raises(ConfigurationError, match="'sse' cannot be used here"):
        load_model(model, isa="sse")
    with pytest.raises(ConfigurationError, match="1 to the model's 512"):
        load_model(model, max_context=513)


def test_end_tokens(model):
    edit_config(model, eos_token_id=[3, 4])
    assert read_config(model).eos_ids == (3, 4)
    (model / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert read_config(model).eos_ids == (5,)
    (model / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ModelFormatError, match="eos_token_id"):
        read_config(model)
    (model / "generation_config.json").write_text('{"eos_token_id": [5, 96]}')
    with pytest.raises(ModelFormatError, match=r"generation_config\.json: 'eos_token_id' is \[5, 96\]"):
        read_config(model)

"""convert: MLX's own numbers, a complete directory or none, and clear refusals."""

import json
import os

import numpy as np
import pytest
from random_checkpoints import write_checkpoint
from specfast import _core
from specfast.checkpoint import load_model
from specfast.convert import SHARD_BYTES, convert, quantise
from specfast.errors import ConfigurationError, ModelFormatError


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_equals_mlx(bits, group):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    rng = np.random.default_rng(bits + group)
    w = rng.standard_normal((48, 384)).astype(np.float32) * rng.uniform(0.01, 3, (48, 1)).astype(np.float32)
    w[3] = 0.0
    w[4, :group] = 1.0
    ours = quantise(w, bits, group)
    theirs = [np.asarray(x) for x in mx.quantize(mx.array(w), group_size=group, bits=bits)]
    assert np.array_equal(ours[1], theirs[1])
    assert np.array_equal(ours[2], theirs[2])
    differing = (ours[0] != theirs[0]).mean()
    assert differing < 1e-3  # a weight exactly between two levels may round either way


def test_error_is_half_a_step_and_at_the_far_end_a_whole_one():
    w = np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32)
    packed, scales, biases = quantise(w, 8, 64)
    q = packed.view(np.uint8).reshape(16, 128)
    back = np.repeat(scales, 64, 1) * q + np.repeat(biases, 64, 1)
    steps = np.abs(back - w) / np.repeat(np.abs(scales), 64, 1)
    assert np.quantile(steps, 0.98) <= 0.501
    assert steps.max() <= 1.001  # the range is shifted so that its larger end is exact


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_converted_directory_loads(tmp_path, dtype):
    source = write_checkpoint(tmp_path / "source", "llama-untied", dtype=dtype, shards=2)
    seen = []
    result = convert(source, tmp_path / "out", bits=8, group_size=32, progress=lambda *call: seen.append(call))
    assert seen[-1][0] == seen[-1][1] > 0
    assert 8 < result.bits_per_weight < 10.5
    model = load_model(tmp_path / "out").model
    assert model.precision == "int8"
    tokens = np.arange(20, dtype=np.int32)
    exact = load_model(source, precision="f32").model
    a = model.forward(_core.Cache(model), tokens, 20)
    b = exact.forward(_core.Cache(exact), tokens, 20)
    assert np.abs(a - b).max() / np.abs(b).max() < 0.1


def test_shards(tmp_path, monkeypatch):
    import specfast.convert

    assert SHARD_BYTES > 1 << 30
    monkeypatch.setattr(specfast.convert, "SHARD_BYTES", 20_000)
    source = write_checkpoint(tmp_path / "source", "qwen2")
    convert(source, tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert set(
        json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"].values()
    ) == set(files)
    load_model(tmp_path / "out")


def test_interrupted_runs_leave_nothing(tmp_path):
    source = write_checkpoint(tmp_path / "source", "llama")

    def interrupt(done, total, name):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt)
    assert os.listdir(tmp_path) == ["source"]


def test_others_work_is_never_removed(tmp_path):
    source = write_checkpoint(tmp_path / "source", "llama")
    for name in ("out.partial", f"out.{os.getpid()}.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    with pytest.raises(ConfigurationError, match="cannot be written"):
        convert(source, tmp_path / "out")
    assert (tmp_path / f"out.{os.getpid()}.partial" / "kept").exists()
    (tmp_path / f"out.{os.getpid()}.partial").rename(tmp_path / "elsewhere")
    convert(source, tmp_path / "out")
    assert (tmp_path / "out.partial" / "kept").exists()


def test_blocks_of_rows_change_no_bit(tmp_path, monkeypatch):
    import specfast.convert

    source = write_checkpoint(tmp_path / "source", "llama", dtype="BF16")
    convert(source, tmp_path / "whole")
    monkeypatch.setattr(specfast.convert, "BLOCK_WEIGHTS", 1000)
    convert(source, tmp_path / "blocks")
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "blocks")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_16_bit_sources_equal_mlx(tmp_path, dtype, bits):
    """Weights, scales and biases as mlx.core.quantize stores them for 16-bit input."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    source = write_checkpoint(tmp_path / "source", "llama", dtype={"bfloat16": "BF16", "float16": "F16"}[dtype])
    convert(source, tmp_path / "out", bits=bits, group_size=64)
    name = "model.layers.0.mlp.up_proj"
    weight = mx.load(str(source / "model.safetensors"))[f"{name}.weight"]
    ours = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for kind, theirs in zip(("weight", "scales", "biases"), mx.quantize(weight, group_size=64, bits=bits), strict=True):
        assert ours[f"{name}.{kind}"].dtype == theirs.dtype
        assert mx.array_equal(ours[f"{name}.{kind}"], theirs), kind


def test_refusals(tmp_path):
    source = write_checkpoint(tmp_path / "source", "llama")
    with pytest.raises(ConfigurationError, match="exists"):
        convert(source, source)
    with pytest.raises(ConfigurationError, match="3 bits"):
        convert(source, tmp_path / "out", bits=3)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        convert(source, source / "config.json" / "out")
    convert(source, tmp_path / "done")
    with pytest.raises(ConfigurationError, match="already"):
        convert(tmp_path / "done", tmp_path / "again")
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        convert(tmp_path / "nowhere", tmp_path / "out")

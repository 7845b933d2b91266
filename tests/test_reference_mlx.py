"""Logits and greedy tokens against mlx-lm in float32, for every architecture and every weight format."""

import json

import numpy as np
import pytest
from random_checkpoints import ARCHITECTURES, write_checkpoint
from specfast import _core
from specfast.checkpoint import load_model
from specfast.convert import convert

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")

TOKENS = np.random.default_rng(2).integers(0, 96, 150).astype(np.int32)


def reference(directory):
    model, _ = mlx_utils.load_model(directory)
    model.set_dtype(mx.float32)
    return model


def reference_logits(model, tokens):
    return np.asarray(model(mx.array(tokens)[None])[0].astype(mx.float32))


def our_logits(directory, precision, tokens=TOKENS):
    model = load_model(directory, precision=precision).model
    return model.forward(_core.Cache(model), tokens, len(tokens))


def relative(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def kl(theirs, ours):
    p, q = (np.exp(x - x.max(-1, keepdims=True)).astype(np.float64) for x in (theirs, ours))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return float((p * np.log(p / q)).sum(-1).mean())


def greedy(logits_of, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(logits_of(np.asarray(tokens, dtype=np.int32))[-1])))
    return tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32(tmp_path, name):
    directory = write_checkpoint(tmp_path / name, name, shards=2)
    theirs = reference(directory)
    assert relative(our_logits(directory, None), reference_logits(theirs, TOKENS)) < 1e-3
    model = load_model(directory).model
    assert model.precision == "f32"
    prompt = TOKENS[:9]
    ours = greedy(lambda t: model.forward(_core.Cache(model), t, 1), prompt, 64)
    assert ours == greedy(lambda t: reference_logits(theirs, t)[-1:], prompt, 64)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_16_bit(tmp_path, name, dtype, record_property):
    directory = write_checkpoint(tmp_path / name, name, dtype=dtype)
    theirs = reference_logits(reference(directory), TOKENS)
    assert relative(our_logits(directory, "f32"), theirs) < 1e-3
    ours = our_logits(directory, None)
    record_property("kl_bf16", kl(theirs, ours))
    assert relative(ours, theirs) < 0.06
    assert kl(theirs, ours) < 2e-3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantised(tmp_path, name, bits, group, record_property):
    source = write_checkpoint(tmp_path / "source", name)
    convert(source, tmp_path / "q", bits=bits, group_size=group)
    theirs = reference_logits(reference(tmp_path / "q"), TOKENS)
    assert relative(our_logits(tmp_path / "q", "f32"), theirs) < 1e-3
    for precision, tolerance, divergence in (("bf16", 0.06, 2e-3), ("int8", 0.12, 1e-2)):
        ours = our_logits(tmp_path / "q", precision)
        record_property(f"kl_{precision}", kl(theirs, ours))
        assert relative(ours, theirs) < tolerance, precision
        assert kl(theirs, ours) < divergence, precision


def test_mixed_quantisation(tmp_path):
    """Overrides per module: other bits, and modules left unquantised."""
    source = write_checkpoint(tmp_path / "source", "llama-untied")
    convert(source, tmp_path / "q4", bits=4, group_size=64)
    convert(source, tmp_path / "q8", bits=8, group_size=32)
    from specfast.checkpoint import open_weights
    from specfast.safetensors_file import write_safetensors

    four, eight, plain = (open_weights(d) for d in (tmp_path / "q4", tmp_path / "q8", source))
    special, untouched = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.v_proj"
    tensors = {k: eight[k] if k.startswith(special) else v for k, v in four.items() if not k.startswith(untouched)}
    tensors[f"{untouched}.weight"] = plain[f"{untouched}.weight"]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_safetensors(mixed / "model.safetensors", tensors)
    config = json.loads((tmp_path / "q4" / "config.json").read_text())
    config["quantization"] |= {special: {"bits": 8, "group_size": 32}, untouched: False}
    (mixed / "config.json").write_text(json.dumps(config))
    assert relative(our_logits(mixed, "f32"), reference_logits(reference(mixed), TOKENS)) < 1e-3


def test_a_wrong_rope_is_caught(tmp_path):
    directory = write_checkpoint(tmp_path / "llama", "llama")
    theirs = reference_logits(reference(directory), TOKENS)
    config = json.loads((directory / "config.json").read_text())
    config["rope_scaling"]["factor"] = 4.0
    (directory / "config.json").write_text(json.dumps(config))
    assert relative(our_logits(directory, None), theirs) > 1e-3

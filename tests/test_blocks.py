"""GGUF's blocks read in place: bit for bit what the converted matrices give, on every instruction set."""

import numpy as np
import pytest
from gguf_writer import BLOCK, encode
from specfast import _core
from specfast.checkpoint import load_model
from specfast.errors import ShapeError
from specfast.gguf_blocks import affine, q6_k_as_f32
from specfast.safetensors_file import TensorView
from test_gguf import TOKENS, decoder_of, write_decoder

ISAS = _core.build_info()["isas_supported"]
QUANTISED = [kind for kind in BLOCK if BLOCK[kind] > 1]


def blocks_of(kind, N, K, seed=0):
    raw, values = encode(np.random.default_rng(seed).normal(0, 1 / np.sqrt(K), (N, K)), kind)
    return np.frombuffer(raw, np.uint8), values


def converted(kind, N, K, raw):
    """The matrix that gguf_blocks makes of the same bytes."""
    view = TensorView(kind, (N, K), raw)
    if kind == "Q6_K":
        return _core.Matrix("f32", N, K, q6_k_as_f32(view).data)
    parts = affine(view)
    bits = 32 * parts["weight"].shape[1] // K
    scales, biases = parts["scales"], parts["biases"]
    return _core.Matrix(
        f"q{bits}", N, K, parts["weight"].data,
        group=32, scales=scales.data, biases=biases.data, scale_format=scales.dtype.lower(),
    )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["int8", "bf16", "f32"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_products_are_those_of_the_converted_matrix(kind, precision, isa):
    for N, K in ((16, BLOCK[kind]), (37, 3 * BLOCK[kind]), (64, 512)):
        raw, _ = blocks_of(kind, N, K)
        x = np.random.default_rng(1).standard_normal((21, K)).astype(np.float32)
        y = _core.matmul_rows(x, _core.Matrix(kind, N, K, raw), precision, isa)
        assert np.array_equal(y, _core.matmul_rows(x, converted(kind, N, K, raw), precision, isa))
        for rows in (1, 2, 8, 16):
            assert np.array_equal(y[:rows], _core.matmul_rows(x[:rows], _core.Matrix(kind, N, K, raw), precision, isa))
    flipped = raw.copy()
    flipped[-3] ^= 16  # part of the last weights in all types
    assert not np.array_equal(y, _core.matmul_rows(x, _core.Matrix(kind, N, K, flipped), precision, isa))


@pytest.mark.parametrize("kind", QUANTISED)
def test_products_are_near_the_definition(kind):
    raw, values = blocks_of(kind, 48, 512)
    x = np.random.default_rng(2).standard_normal((5, 512)).astype(np.float32)
    exact = x.astype(np.float64) @ values.T
    y = _core.matmul_rows(x, _core.Matrix(kind, 48, 512, raw), "f32")
    assert np.abs(y - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_file_in_place_gives_the_bits_of_the_converted_one(tmp_path, kind, isa):
    """The embedding is read row by row; llama files hold Q and K in an order of their own."""
    for architecture in ("llama", "qwen3"):
        path = tmp_path / f"{architecture}.gguf"
        write_decoder(path, decoder_of(architecture, tied=architecture == "llama"), architecture, kind)
        for precision in ("int8", "f32"):
            both = [load_model(path, precision=precision, isa=isa, pack=pack).model for pack in (False, True)]
            first, second = (model.forward(_core.Cache(model), TOKENS, len(TOKENS)) for model in both)
            assert np.array_equal(first, second)


def test_blocks_that_do_not_fit_are_told():
    raw, _ = blocks_of("Q4_0", 16, 64)
    with pytest.raises(ShapeError, match="multiple of the 256 of a Q4_K block"):
        _core.Matrix("Q4_K", 16, 64, raw)
    with pytest.raises(ShapeError, match="576 bytes but its shape needs 612"):
        _core.Matrix("Q4_0", 17, 64, raw)
    with pytest.raises(ShapeError, match="their own scales"):
        _core.Matrix("Q4_0", 16, 64, raw, group=32)
    matrix = _core.Matrix("Q4_0", 16, 64, raw)
    assert (matrix.format, matrix.blocks, matrix.nbytes) == ("q4", "Q4_0", len(raw))
    assert _core.Matrix("f32", 1, 1, np.zeros(4, np.uint8)).blocks is None

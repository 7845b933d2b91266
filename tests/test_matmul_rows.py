"""matmul_rows of every instruction set here: against float64, and bitwise for every number of rows."""

import numpy as np
import pytest
from specfast import _core
from specfast.convert import quantise, to_bf16

ISAS = _core.build_info()["isas_supported"]
TOLERANCE = {"int8": 0.02, "bf16": 6e-3, "f32": 2e-6}  # rms relative to the result, float64 reference


def as_bytes(array):
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)


def widened(bf16):
    return (bf16.astype(np.uint32) << 16).view(np.float32)


def quantised_matrix(rng, N, K, bits, group, scale_format):
    packed, scales, biases = quantise(rng.standard_normal((N, K)).astype(np.float32) / np.sqrt(K), bits, group)
    narrow = {"bf16": to_bf16, "f16": lambda x: x.astype(np.float16), "f32": lambda x: x}[scale_format]
    s, b = narrow(scales), narrow(biases)
    wide = widened if scale_format == "bf16" else lambda x: x.astype(np.float32)
    q = packed.view(np.uint8)
    q = np.stack([q & 15, q >> 4], -1).reshape(N, K) if bits == 4 else q
    values = np.repeat(wide(s), group, 1).astype(np.float64) * q + np.repeat(wide(b), group, 1)
    matrix = _core.Matrix(
        f"q{bits}",
        N,
        K,
        as_bytes(packed),
        group=group,
        scales=as_bytes(s),
        biases=as_bytes(b),
        scale_format=scale_format,
    )
    return matrix, values


def float_matrix(rng, N, K, name):
    w = rng.standard_normal((N, K)).astype(np.float32)
    raw = {"f32": w, "f16": w.astype(np.float16), "bf16": to_bf16(w)}[name]
    values = widened(raw) if name == "bf16" else raw.astype(np.float32)
    return _core.Matrix(name, N, K, as_bytes(raw)), values.astype(np.float64)


def rms_error(y, exact):
    return np.sqrt(((y - exact) ** 2).mean() / (exact**2).mean())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["int8", "bf16", "f32"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("scale_format", ["bf16", "f16", "f32"])
def test_quantised(isa, precision, bits, group, scale_format):
    rng = np.random.default_rng(group + bits)
    for N, K in ((16, group), (37, 3 * group), (64, 256)):
        matrix, values = quantised_matrix(rng, N, K, bits, group, scale_format)
        x = rng.standard_normal((21, K)).astype(np.float32)
        y = _core.matmul_rows(x, matrix, precision, isa)
        assert rms_error(y, x @ values.T) < TOLERANCE[precision]
        for M in (1, 2, 3, 5, 9, 16):
            assert np.array_equal(_core.matmul_rows(x[:M], matrix, precision, isa), y[:M])
        if precision == "int8":
            assert np.array_equal(_core.matmul_rows(x, matrix, precision, "scalar"), y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("precision", ["bf16", "f32"])
def test_unquantised(isa, name, precision):
    rng = np.random.default_rng(5)
    for N, K in ((16, 64), (37, 100), (3, 33), (50, 1000)):
        matrix, values = float_matrix(rng, N, K, name)
        x = rng.standard_normal((21, K)).astype(np.float32)
        y = _core.matmul_rows(x, matrix, precision, isa)
        assert rms_error(y, x @ values.T) < TOLERANCE["f32" if name == "f32" else precision]
        for M in (1, 2, 3, 5, 9, 16):
            assert np.array_equal(_core.matmul_rows(x[:M], matrix, precision, isa), y[:M])


def test_a_wrong_weight_is_caught():
    rng = np.random.default_rng(6)
    matrix, values = quantised_matrix(rng, 64, 256, 4, 64, "bf16")
    x = rng.standard_normal((4, 256)).astype(np.float32)
    values[5] *= 1.5
    assert rms_error(_core.matmul_rows(x, matrix, "f32"), x @ values.T) > TOLERANCE["int8"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["int8", "bf16", "f32"])
def test_nan_goes_through(isa, precision):
    matrix, _ = quantised_matrix(np.random.default_rng(7), 32, 128, 4, 64, "bf16")
    x = np.ones((3, 128), dtype=np.float32)
    x[1, 70] = np.nan
    y = _core.matmul_rows(x, matrix, precision, isa)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_impossible_matrices_are_refused():
    data = np.zeros(64, dtype=np.uint8)
    for arguments, message in (
        (("q5", 1, 64, data), "supported"),
        (("f32", 0, 64, data), "outside"),
        (("f32", 4, 64, data), "needs"),
        (("f32", 1, 17, data), "needs"),
    ):
        with pytest.raises(_core.ShapeError, match=message):
            _core.Matrix(*arguments)
    with pytest.raises(_core.ShapeError, match="group"):
        _core.Matrix("q4", 1, 128, data, group=48, scales=data, biases=data, scale_format="bf16")
    with pytest.raises(_core.ShapeError, match="scales"):
        _core.Matrix("q4", 1, 128, data, group=64, scales=data, biases=data, scale_format="bf16")

"""Runs launches of specfast.metal's table in the executor, and turns arrays into the kernels' formats."""

import functools

import numpy as np
import pytest
from specfast import _core, metal

TOLERANCE = {"f32": 2e-5, "f16": 2e-3, "bf16": 1.2e-2}  # of the largest result: sums in another order, one rounding


def program(kernels, mode="plain"):
    """The executor's program that has these kernels, which are of one file."""
    return _program(tuple(dict.fromkeys(kernels)), mode)


@functools.cache
def _program(kernels, mode):
    import metal_emulator

    try:
        return metal_emulator.compile(metal.program(kernels), mode=mode)
    except metal_emulator.EmulatorUnavailableError as missing:
        pytest.skip(str(missing))


def run(launch, *buffers, mode="plain", schedule=0, kernels=()):
    """One launch; its constants are added. `kernels` are compiled with it."""
    dims = [np.array(launch.dims, np.int32)] if launch.dims else []
    own = program((*kernels, launch.kernel) if launch.kernel not in kernels else kernels, mode)
    return own.run(launch.kernel.name, launch.grid, launch.threadgroup, [*buffers, *dims], schedule=schedule)


def encode(x, activations):
    """Floats as an array of the activations' type; bf16 is uint16."""
    x = np.asarray(x, np.float32)
    if activations == "f32":
        return np.ascontiguousarray(x)
    if activations == "f16":
        return x.astype(np.float16)
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(x, activations):
    """The same as float32."""
    return (x.astype(np.uint32) << 16).view(np.float32) if activations == "bf16" else np.asarray(x, np.float32)


def empty(shape, activations):
    """An array that shows what was not written."""
    return encode(np.full(shape, 777.0, np.float32), activations)


class RandomMatrix:
    """A random matrix (N, K): `buffers` for the kernels, `floats` for the definition, `native` for the C++ kernels."""

    def __init__(self, rng, weights, activations, N, K, spread=1.0):
        self.weights, self.activations, self.shape = weights, activations, (N, K)
        if weights.bits:
            q = rng.integers(0, 1 << weights.bits, (N, K))
            per_word = 32 // weights.bits
            shifts = np.arange(per_word, dtype=np.uint32) * weights.bits
            words = (q.reshape(N, -1, per_word).astype(np.uint32) << shifts).sum(-1).astype(np.uint32)
            groups = K // weights.group
            size = spread * 2 / (1 << weights.bits) / np.sqrt(K)
            scales = encode(rng.uniform(0.5 * size, size, (N, groups)), activations)
            biases = encode(-decode(scales, activations) * (1 << weights.bits) / 2, activations)
            self.buffers = (words, scales, biases)
            s, b = (np.repeat(decode(x, activations).astype(np.float64), weights.group, 1) for x in (scales, biases))
            self.floats = s * q + b
        else:
            values = encode(rng.normal(0, spread / np.sqrt(K), (N, K)), activations)
            self.buffers = (values, values, values)
            self.floats = decode(values, activations).astype(np.float64)

    @property
    def native(self):
        w, s, b = (x.view(np.uint8).ravel() for x in self.buffers)
        if not self.weights.bits:
            return _core.Matrix(self.activations, *self.shape, w)
        affine = {"group": self.weights.group, "scales": s, "biases": b, "scale_format": self.activations}
        return _core.Matrix(f"q{self.weights.bits}", *self.shape, w, **affine)


def close(found, wanted, activations):
    """Whether results are the definition's within the stated tolerance."""
    wanted = np.asarray(wanted)
    return np.abs(decode(found, activations) - wanted).max() <= TOLERANCE[activations] * np.abs(wanted).max()

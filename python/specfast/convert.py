"""Quantises a Hugging Face model directory into MLX's affine layout, tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .architecture import read_config, read_json
from .checkpoint import FLOAT_FORMATS, open_weights
from .errors import ConfigurationError, ModelFormatError, UnsupportedModelError
from .gguf_file import is_gguf
from .safetensors_file import TensorView, write_safetensors

SHARD_BYTES = 2 << 30
BLOCK_WEIGHTS = 1 << 22
BITS, GROUP_SIZES = (4, 8), (32, 64, 128)
_COPIED = (
    "tokenizer*.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "*.txt",
    "LICENSE*",
)
Progress = Callable[[int, int, str], None]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; sizes are of the weights in bytes."""

    source_bytes: int
    bytes: int
    weights: int
    quantised_tensors: int

    @property
    def bits_per_weight(self) -> float:
        """Average bits a weight takes, scales and biases included."""
        return 8 * self.bytes / self.weights


def to_bf16(values: FloatArray) -> npt.NDArray[np.uint16]:
    """Float32 rounded to bf16 (nearest even), as uint16; finite values only."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def quantise(weight: FloatArray, bits: int, group_size: int) -> tuple[npt.NDArray[np.uint32], FloatArray, FloatArray]:
    """MLX's affine rule for one matrix.

    Args:
        weight: (N, K) float32, K a multiple of group_size.
        bits: 4 or 8.
        group_size: inputs that share a scale and a bias.

    Returns:
        packed (N, K * bits / 32) uint32, lowest bits first; scales and biases (N, K / group_size) float32, so that
        w ~= scale * q + bias. The end of the range with the larger magnitude is represented exactly.
    """
    N, K = weight.shape
    grouped = weight.reshape(N, K // group_size, group_size)
    high, low = grouped.max(-1), grouped.min(-1)
    levels = np.float32(2**bits - 1)
    downwards = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / levels, np.float32(1e-7))
    scale = np.where(downwards, scale, -scale)
    edge = np.where(downwards, low, high)
    steps = np.rint(edge / scale)
    exact = steps != 0
    scale = np.where(exact, edge / np.where(exact, steps, 1), scale).astype(np.float32)
    bias = np.where(exact, edge, 0).astype(np.float32)
    q = np.clip(np.rint((grouped - bias[..., None]) / scale[..., None]), 0, levels).astype(np.uint8).reshape(N, K)
    packed = q if bits == 8 else q[:, 0::2] | (q[:, 1::2] << 4)
    return np.ascontiguousarray(packed).view("<u4"), scale, bias


def _stored(dtype: str, array: npt.NDArray[Any]) -> TensorView:
    return TensorView(dtype, array.shape, np.ascontiguousarray(array).view(np.uint8).reshape(-1))


def _narrowed(values: FloatArray, dtype: str) -> TensorView:
    if dtype == "BF16":
        return _stored(dtype, to_bf16(values))
    return _stored(dtype, values.astype(np.float16) if dtype == "F16" else values)


def _row_blocks(name: str, tensor: TensorView) -> Iterator[FloatArray]:
    """Finite float32 blocks of a tensor's rows: a large matrix is never in memory at once."""
    if tensor.dtype not in FLOAT_FORMATS:
        raise UnsupportedModelError(f"tensor {name!r} is {tensor.dtype}; F32, F16 or BF16 weights can be converted")
    rows, row_bytes = tensor.shape[0] if tensor.shape else 1, tensor.data.nbytes // max(1, *tensor.shape[:1])
    step = max(1, BLOCK_WEIGHTS // max(1, math.prod(tensor.shape[1:])))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        data = tensor.data[first * row_bytes : last * row_bytes]
        values = TensorView(tensor.dtype, (last - first, *tensor.shape[1:]), data).as_float32()
        if not np.isfinite(values).all():
            raise ModelFormatError(f"tensor {name!r} holds NaN or infinite values; the source is damaged")
        yield values


def _converted(name: str, tensor: TensorView, bits: int, group_size: int) -> Iterator[tuple[str, TensorView]]:
    module = name.removesuffix(".weight")
    if len(tensor.shape) == 2 and tensor.shape[1] % group_size == 0 and module != name and tensor.data.nbytes:
        parts = [
            (packed, _narrowed(scales, tensor.dtype), _narrowed(biases, tensor.dtype))
            for packed, scales, biases in (quantise(rows, bits, group_size) for rows in _row_blocks(name, tensor))
        ]
        groups = (tensor.shape[0], tensor.shape[1] // group_size)
        yield f"{module}.weight", _stored("U32", np.concatenate([part[0] for part in parts]))
        for index, kind in ((1, "scales"), (2, "biases")):
            data = np.concatenate([part[index].data for part in parts])
            yield f"{module}.{kind}", TensorView(tensor.dtype, groups, data)
    else:
        for _ in _row_blocks(name, tensor):
            pass
        yield name, tensor


def require_absent(destination: Path) -> None:
    """Refuses a destination that is there already.

    Raises:
        ConfigurationError: it is.
    """
    if destination.exists():
        raise ConfigurationError(f"{destination} exists already; remove it or choose another name")


def convert(
    source: Path, destination: Path, *, bits: int = 4, group_size: int = 64, progress: Progress | None = None
) -> Conversion:
    """Writes a quantised copy of a model.

    Every matrix whose inputs divide into groups is quantised, the embedding and head included; vectors keep their type.
    The result appears at once when complete: an interrupted run leaves nothing behind.

    Args:
        source: directory in Hugging Face layout, with F32, F16 or BF16 weights.
        destination: directory to create.
        bits, group_size: 4 or 8; 32, 64 or 128.
        progress: called with (tensors done, tensors, name).

    Raises:
        ConfigurationError: unsupported bits or group size, or the destination exists or cannot be written.
        ModelFormatError, UnsupportedModelError: the source cannot be used.
    """
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ConfigurationError(
            f"{bits} bits in groups of {group_size} are not supported; choose {BITS} bits and groups of {GROUP_SIZES}"
        )
    require_absent(destination)
    if is_gguf(source):
        raise ConfigurationError(f"{source} is a GGUF file, which runs as it is; convert a Hugging Face directory")
    if read_config(source).quantisation:
        raise ConfigurationError(f"{source} is quantised already; convert the original weights")
    tensors = open_weights(source)
    partial = destination.with_name(f"{destination.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)  # never one that exists: it would be someone else's
    except OSError as error:
        raise _unwritable(destination, error) from None
    try:
        result = _write(tensors, partial, bits, group_size, progress)
        config = read_json(source / "config.json")
        config["quantization"] = {"group_size": group_size, "bits": bits}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for pattern in _COPIED:
            for file in source.glob(pattern):
                shutil.copy2(file, partial / file.name)
        partial.rename(destination)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritable(destination, error) from None
        raise
    return result


def _unwritable(destination: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{destination} cannot be written ({error.strerror or error}); free space, or choose another place"
    )


def _write(
    tensors: dict[str, TensorView], directory: Path, bits: int, group_size: int, progress: Progress | None
) -> Conversion:
    shard: dict[str, TensorView] = {}
    shard_bytes = written = quantised = 0
    places: dict[str, int] = {}
    shards = 0

    def flush() -> None:
        nonlocal shard, shard_bytes, shards
        write_safetensors(directory / f"{shards}.part", shard)
        places.update(dict.fromkeys(shard, shards))
        shard, shard_bytes, shards = {}, 0, shards + 1

    for done, (name, tensor) in enumerate(sorted(tensors.items())):
        if progress:
            progress(done, len(tensors), name)
        for out_name, out in _converted(name, tensor, bits, group_size):
            shard[out_name] = out
            shard_bytes += out.data.nbytes
            written += out.data.nbytes
            quantised += out_name.endswith(".scales")
        if shard_bytes >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    names = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    )
    for i, file in enumerate(names):
        (directory / f"{i}.part").rename(directory / file)
    if shards > 1:
        index = {"metadata": {"total_size": written}, "weight_map": {name: names[i] for name, i in places.items()}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if progress:
        progress(len(tensors), len(tensors), "")
    weights = sum(int(np.prod(t.shape)) for t in tensors.values())
    return Conversion(sum(t.data.nbytes for t in tensors.values()), written, weights, quantised)

"""Safetensors files: read as views of a memory map behind a strictly checked header, and written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ModelFormatError
from .mapped_file import MappedFile, damaged, map_file

MAX_HEADER_BYTES = 100_000_000
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorView:
    """One tensor; `data` is a read-only uint8 view of the pages of `file`, or of memory where there is none."""

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    file: MappedFile | None = None

    def as_float32(self) -> npt.NDArray[np.float32]:
        """The tensor's values as a new float32 array; F32, F16 and BF16 only."""
        if self.dtype == "F32":
            values = self.data.view("<f4").astype(np.float32)
        elif self.dtype == "F16":
            values = self.data.view("<f2").astype(np.float32)
        elif self.dtype == "BF16":
            values = (self.data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            raise ModelFormatError(f"expected floating-point values (F32, F16 or BF16), found {self.dtype}")
        return values.reshape(self.shape)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _read_header(path: Path, view: memoryview) -> tuple[dict[str, Any], int]:
    if len(view) < 8:
        raise damaged(path, f"{len(view)} bytes are too few for a safetensors header (at least 8)")
    length = int.from_bytes(view[:8], "little")
    limit = min(MAX_HEADER_BYTES, len(view) - 8)
    if length > limit:
        raise damaged(path, f"the header claims {length} bytes, more than the {limit} possible")
    try:
        header = json.loads(bytes(view[8 : 8 + length]).decode("utf-8"), object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged(path, f"the header is a {type(header).__name__}, not an object")
    return header, 8 + length


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _check_entry(path: Path, name: str, entry: object, data_bytes: int) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"tensor {name!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise damaged(path, f"tensor {name!r} has the unknown type {dtype!r}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_size, shape)):
        raise damaged(path, f"tensor {name!r} has the impossible shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise damaged(path, f"tensor {name!r} has the impossible offsets {str(offsets)[:80]}")
    first, last = offsets
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if not first <= last <= data_bytes:
        raise damaged(path, f"tensor {name!r} lies at {first}..{last} but the file holds {data_bytes} bytes of data")
    if last - first != size:
        raise damaged(path, f"tensor {name!r} of shape {shape} needs {size} bytes but {last - first} are given")
    return dtype, tuple(shape), first, last


def open_safetensors(path: Path) -> dict[str, TensorView]:
    """Maps a file and returns its tensors by name.

    Args:
        path: a .safetensors file. It stays mapped for as long as a returned view lives, and must not be written in
            place by then: see MappedFile.

    Raises:
        ModelFormatError: the file cannot be read, or its header does not describe its bytes exactly: every tensor in
            range, of the size its shape needs, without overlap or gap.
    """
    mapped, mapping = map_file(path)
    view = memoryview(mapping)
    header, data_start = _read_header(path, view)
    data = np.frombuffer(view, dtype=np.uint8)[data_start:]
    tensors, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, first, last = _check_entry(path, name, entry, len(data))
        tensors[name] = TensorView(dtype, shape, data[first:last], mapped)
        spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise damaged(path, f"tensor {name!r} starts at {first}, but the data before it ends at {end}")
        end = last
    if end != len(data):
        raise damaged(path, f"{len(data) - end} bytes after the last tensor belong to nothing")
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, TensorView]) -> None:
    """Writes tensors to a new file, in order of their names."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, tensor in sorted(tensors.items()):
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.data.nbytes],
        }
        offset += tensor.data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            file.write(tensor.data.data)

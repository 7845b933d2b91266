"""GGUF files: metadata and tensors, read behind a header of which every count, length and offset is checked."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import UnsupportedModelError
from .mapped_file import MappedFile, damaged, map_file
from .safetensors_file import TensorView

Scalar = bool | int | float | str
Value = Scalar | list[Scalar]

MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 65_535
MAX_ALIGNMENT = 1 << 16
MAX_ELEMENTS = 1 << 23
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LEAST_ENTRY_BYTES = 13  # of metadata: an empty name, a type and one byte
_LEAST_TENSOR_BYTES = 32  # an empty name, a dimension, a type and an offset
_UNSUPPORTED_TYPES = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True)
class BlockType:
    """How a tensor's rows are stored: blocks of `weights` inputs in `bytes` bytes."""

    name: str
    weights: int
    bytes: int


TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}
SUPPORTED_TYPES = ", ".join(kind.name for kind in TYPES.values())


@dataclass(frozen=True)
class GgufFile:
    """One GGUF file, mapped, or in memory.

    Attributes:
        metadata: the key-value pairs.
        tensors: by name; dtype is one of TYPES' names, shape is (rows, inputs) or (size,), data are the raw blocks.
        mapping: of the file; None if it is in memory.
        start: the address of its first byte.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorView]
    mapping: mmap.mmap | None
    start: int

    def give_back(self) -> None:
        """Lets the system take the mapped pages out of the process's memory; reading them maps them again."""
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


def is_gguf(path: Path) -> bool:
    """Whether a model's path is a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


class _Cursor:
    """Reads values off a file's start; nothing is taken before it is known to be there."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at = path, data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, size: int, what: str) -> memoryview:
        if size > self.left:
            raise damaged(self.path, f"{what} needs {size} bytes at {self.at}, but {self.left} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str, what: str) -> int:
        """One little-endian value; floats and bools too, which their callers know."""
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]
        return value

    def count(self, what: str, least_bytes: int) -> int:
        """A count of things of at least some bytes each: no more than the file has room for."""
        value = self.scalar("Q", f"the number of {what}")
        if value > self.left // least_bytes:
            raise damaged(self.path, f"claims {value} {what}, but {self.left} bytes are left")
        return value

    def elements(self, name: str, least_bytes: int) -> int:
        """The length of an array."""
        value = self.count(f"elements of {name!r}", least_bytes)
        if value > MAX_ELEMENTS:
            raise damaged(self.path, f"{name!r} has {value} elements, more than {MAX_ELEMENTS}")
        return value

    def text(self, what: str, most: int | None = None) -> str:
        length = self.scalar("Q", f"the length of {what}")
        if most is not None and length > most:
            raise damaged(self.path, f"{what} has {length} bytes, more than {most}")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise damaged(self.path, f"{what} is not UTF-8") from None

    def value(self, name: str) -> Value:
        what = f"the value of {name!r}"
        kind = self.scalar("I", f"the type of {name!r}")
        if kind == _STRING:
            return self.text(what)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind != _ARRAY:
            raise damaged(self.path, f"{what} has the unknown type {kind}")
        kind = self.scalar("I", f"the type of {name!r}'s elements")
        if kind == _STRING:
            return [self.text(what) for _ in range(self.elements(name, 8))]
        if kind not in _SCALARS:
            raise damaged(self.path, f"{what} is an array of elements of the unknown type {kind}")
        size = struct.calcsize("<" + _SCALARS[kind])
        count = self.elements(name, size)
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(count * size, what)))


@dataclass(frozen=True)
class _TensorInfo:
    kind: BlockType
    shape: tuple[int, ...]
    offset: int
    size: int


def _tensor_info(cursor: _Cursor, name: str) -> _TensorInfo:
    what = f"tensor {name!r}"
    dimensions = cursor.scalar("I", f"the dimensions of {what}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise damaged(cursor.path, f"{what} has {dimensions} dimensions, but 1 to {MAX_DIMENSIONS} are possible")
    shape = tuple(cursor.scalar("Q", f"the shape of {what}") for _ in range(dimensions))[::-1]
    number = cursor.scalar("I", f"the type of {what}")
    offset = cursor.scalar("Q", f"the offset of {what}")
    if number not in TYPES:
        if number in _UNSUPPORTED_TYPES:
            raise UnsupportedModelError(
                f"{cursor.path}: {what} is {_UNSUPPORTED_TYPES[number]}, which is not supported; supported: {SUPPORTED_TYPES}. "
                "Take the model in one of these"
            )
        raise damaged(cursor.path, f"{what} has the unknown type {number}")
    kind = TYPES[number]
    if any(not 0 < size < 2**40 for size in shape) or math.prod(shape) >= 2**62:
        raise damaged(cursor.path, f"{what} has the impossible shape {shape}")
    if shape[-1] % kind.weights:
        raise damaged(
            cursor.path, f"{what} has {shape[-1]} inputs, not a multiple of the {kind.weights} of a {kind.name} block"
        )
    return _TensorInfo(kind, shape, offset, math.prod(shape) // kind.weights * kind.bytes)


def _read_start(cursor: _Cursor) -> tuple[dict[str, Value], dict[str, _TensorInfo]]:
    path = cursor.path
    if bytes(cursor.take(4, "the magic")) != b"GGUF":
        raise damaged(path, f"starts with {bytes(cursor.data[:4])!r}, but a GGUF file starts with b'GGUF'")
    version = cursor.scalar("I", "the version")
    if version not in (2, 3):
        order = ", or its byte order is big endian" if version & 0xFFFF == 0 else ""
        raise UnsupportedModelError(
            f"{path}: GGUF version {version} is not supported{order}; supported: 2 and 3, little endian. Convert the model again"
        )
    tensor_count = cursor.count("tensors", _LEAST_TENSOR_BYTES)
    metadata: dict[str, Value] = {}
    for _ in range(cursor.count("metadata entries", _LEAST_ENTRY_BYTES)):
        name = cursor.text("a metadata name", MAX_NAME_BYTES)
        if name in metadata:
            raise damaged(path, f"metadata {name!r} occurs twice")
        metadata[name] = cursor.value(name)
    infos: dict[str, _TensorInfo] = {}
    for _ in range(tensor_count):
        name = cursor.text("a tensor name", MAX_NAME_BYTES)
        if name in infos:
            raise damaged(path, f"tensor {name!r} occurs twice")
        infos[name] = _tensor_info(cursor, name)
    return metadata, infos


def open_gguf(path: Path) -> GgufFile:
    """Maps a GGUF file of version 2 or 3, little endian.

    Args:
        path: the file. It stays mapped for as long as a view of it lives, and must not be written in place by then: see
            MappedFile.

    Raises:
        ModelFormatError: the file cannot be read, or its start does not describe its bytes: every count and length
            within the file, every tensor in range, aligned, and without overlap.
        UnsupportedModelError: a sound file of another version, in several parts, or with a type of tensor not read here.
    """
    mapped, mapping = map_file(path)
    return _parse(path, np.frombuffer(mapping, dtype=np.uint8), mapped, mapping)


def parse_gguf(path: Path, data: npt.NDArray[np.uint8]) -> GgufFile:
    """The same for a file's bytes in memory, of which all tensors are views. Raises what open_gguf raises, naming `path`."""
    return _parse(path, data, None, None)


def _parse(path: Path, whole: npt.NDArray[np.uint8], mapped: MappedFile | None, mapping: mmap.mmap | None) -> GgufFile:
    cursor = _Cursor(path, whole.data)
    metadata, infos = _read_start(cursor)
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise UnsupportedModelError(
            f"{path}: is one of {parts} parts, and only whole files are read; join them with `llama-gguf-split --merge`"
        )
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise damaged(path, f"'general.alignment' is {alignment!r}, but must be a power of 2 up to {MAX_ALIGNMENT}")
    data = whole[-(-cursor.at // alignment) * alignment :]
    tensors: dict[str, TensorView] = {}
    end = 0
    for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
        last = info.offset + info.size
        if info.offset % alignment:
            raise damaged(path, f"tensor {name!r} starts at {info.offset}, which is no multiple of {alignment}")
        if last > len(data):
            raise damaged(
                path, f"tensor {name!r} lies at {info.offset}..{last}, but {len(data)} bytes of data are there"
            )
        if info.offset < end:
            raise damaged(path, f"tensor {name!r} starts at {info.offset}, but the one before it ends at {end}")
        end = last
        tensors[name] = TensorView(info.kind.name, info.shape, data[info.offset : last], mapped)
    return GgufFile(path, metadata, tensors, mapping, whole.ctypes.data)

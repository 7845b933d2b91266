"""Reads what a 64-bit little-endian Mach-O file exports and what it wants from which library."""

import struct
from dataclasses import dataclass, field
from pathlib import Path

MAGIC = 0xFEEDFACF
CPU_ARM64 = 0x0100000C
KINDS = {6: "dylib", 8: "bundle"}
SYMTAB, BUILD_VERSION, CODE_SIGNATURE, RPATH = 0x2, 0x32, 0x1D, 0x8000001C
LOAD_DYLIB = (0xC, 0x80000018, 0x8000001F)  # load, load weak, re-export
FLAT_LOOKUP = (0, 0xFE)  # whoever has it when the file is loaded; zig writes 0


class MachOError(ValueError):
    """Not a file of the wanted form."""


@dataclass
class MachO:
    """The parts of a file a link check needs."""

    cpu: int
    kind: str
    libraries: list[str] = field(default_factory=list)
    rpaths: list[str] = field(default_factory=list)
    minimum_macos: str = ""
    signed: bool = False
    exported: set[str] = field(default_factory=set)
    wanted: dict[str, str] = field(default_factory=dict)
    """Undefined symbols, by name: the library that must have them, or "" where any may."""


def read(path: Path) -> MachO:
    """Raises MachOError where `path` is no 64-bit Mach-O file."""
    data = path.read_bytes()
    if len(data) < 32 or struct.unpack_from("<I", data)[0] != MAGIC:
        raise MachOError(f"{path} is no 64-bit Mach-O file: it begins with {data[:4].hex()}")
    _, cpu, _, kind, commands, *_ = struct.unpack_from("<8I", data)
    result = MachO(cpu, KINDS.get(kind, str(kind)))
    at, symbols = 32, (0, 0, 0)
    for _ in range(commands):
        command, size = struct.unpack_from("<2I", data, at)
        if command in LOAD_DYLIB:
            result.libraries.append(_text(data, at + struct.unpack_from("<I", data, at + 8)[0]))
        elif command == RPATH:
            result.rpaths.append(_text(data, at + struct.unpack_from("<I", data, at + 8)[0]))
        elif command == BUILD_VERSION:
            version = struct.unpack_from("<I", data, at + 12)[0]
            result.minimum_macos = f"{version >> 16}.{version >> 8 & 255}"
        elif command == CODE_SIGNATURE:
            result.signed = True
        elif command == SYMTAB:
            symbols = struct.unpack_from("<3I", data, at + 8)
        at += size
    table, count, strings = symbols
    for i in range(count):
        name_at, kind_bits, _, description = struct.unpack_from("<IBBH", data, table + 16 * i)
        if kind_bits & 0xE0 or not kind_bits & 1:  # for debuggers, or local
            continue
        name = _text(data, strings + name_at)
        if kind_bits & 0x0E:
            result.exported.add(name)
        else:
            library = description >> 8
            result.wanted[name] = "" if library in FLAT_LOOKUP else result.libraries[library - 1]
    return result


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()

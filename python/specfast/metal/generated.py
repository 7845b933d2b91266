"""What `mx.fast.metal_kernel` is given for a kernel: a header of functions, a body, and names of inputs and outputs.

MLX writes the signature itself, from the arrays and from the attributes that the body names. The body is the kernel's own,
after its template arguments as declarations and its attributes under MLX's names.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from .launches import Kernel
from .source import source

_PARAMETER = re.compile(r"(?P<type>[\w ]+?[*&]?)\s*(?P<name>\w+)\s*\[\[(?P<attribute>\w+)(?:\(\d+\))?\]\]")


@dataclass(frozen=True)
class Generated:
    """The arguments of `mx.fast.metal_kernel`.

    Attributes:
        name: the kernel's host name.
        header: the file, without its kernels.
        body: the statements.
        inputs: names of the buffers that are read, in order; "dims" is the last, of fewer than 8 elements, and all others
            must have 8 elements or more: MLX puts smaller arrays into another address space.
        outputs: names of those that are written, in order.
        buffers: both, in the order of the kernel's own buffers.
    """

    name: str
    header: str
    body: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    buffers: tuple[str, ...]


@functools.cache
def generated(kernel: Kernel) -> Generated:
    """The kernel for `mx.fast.metal_kernel`. What it writes comes back as new arrays, in whole."""
    text = source(kernel.stem)
    found = re.search(
        rf"(?:template <(?P<template>[^<>]*)>\s*)?\[\[kernel\]\] void {kernel.function}\((?P<parameters>.*?)\) \{{\n(?P<body>.*?)\n\}}\n",
        text,
        re.S,
    )
    assert found, kernel
    names = [parameter.split()[-1] for parameter in (found["template"] or "").split(",") if parameter]
    lines = [
        f"using {name} = {value};" if "typename" in parameter else f"constexpr int {name} = {value};"
        for parameter, name, value in zip(
            (found["template"] or "").split(","), names, kernel.arguments, strict=bool(names)
        )
    ]
    inputs: list[str] = []
    outputs: list[str] = []
    buffers: list[str] = []
    for parameter in _PARAMETER.finditer(found["parameters"]):
        kind, name, attribute = parameter["type"].strip(), parameter["name"], parameter["attribute"]
        if attribute != "buffer":
            lines.append(f"const {kind} {name} = {attribute};")
        else:
            buffers.append(name)
            (inputs if re.search(r"\bconst\b|\bconstant\b", kind) else outputs).append(name)
    body = "\n".join([*lines, found["body"]])
    return Generated(
        kernel.name, "#define SPECFAST_NO_ENTRY\n" + text, body, tuple(inputs), tuple(outputs), tuple(buffers)
    )

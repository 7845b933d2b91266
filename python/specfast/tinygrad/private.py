"""Every private API of tinygrad that specfast uses, in one place, and the test that they still do what they did.

Native code enters graphs of tinygrad 0.14 as programs: on the CPU one whose binary jumps to a C function, on Metal one whose
source is ours. Versions from 0.10.2 on, and a 0.14 in which the test fails, are served by the public API alone.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import os
import platform
import struct
import sys
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Device, Tensor, TinyJit, dtypes, nn

from .. import _core
from ..errors import SpecfastError

OLDEST, GRAPHS_FROM, NEWEST_BEFORE = (0, 10, 2), (0, 14), (0, 15)
SUPPORTED_VERSIONS = "0.10.2 to 0.14"
CLANG_REMEDY = "tinygrad's CPU device compiles with clang: install it (apt-get install clang), or name one in CC"


class UnsupportedHostError(SpecfastError, ImportError):
    """A tinygrad that specfast does not know, or that cannot run here; says what would do."""


def version() -> tuple[int, ...]:
    """tinygrad's version, as far as it is numbers."""
    parts = importlib.metadata.version("tinygrad").split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def require_supported() -> None:
    """Raises UnsupportedHostError for a tinygrad outside SUPPORTED_VERSIONS."""
    if not OLDEST <= version() < NEWEST_BEFORE:
        found = ".".join(map(str, version()))
        raise UnsupportedHostError(
            f"tinygrad {found} is outside {SUPPORTED_VERSIONS}, which specfast.tinygrad supports; install one of these with: "
            "pip install 'tinygrad>=0.14,<0.15'"
        )


def require_device() -> None:
    """Raises UnsupportedHostError where tinygrad has no device that computes; names the cause and, where it is known, the remedy."""
    asked = os.environ.get("DEV")  # tinygrad sets it once it has chosen one
    try:
        found = Tensor([1.0]).clone().tolist()
        if found != [1.0]:
            raise RuntimeError(f"it makes {found} of [1.0]")
    except Exception as error:
        cause: Exception = error
        if not asked:
            try:
                _ = Device["CPU"]  # the last one that is tried; why it failed is not told
            except Exception as of_cpu:
                cause = of_cpu
        raise UnsupportedHostError(f"tinygrad has no usable device ({cause}){_remedy(cause, asked)}") from error


def _remedy(cause: Exception, asked: str | None) -> str:
    missing = str(getattr(cause, "filename", None))
    if isinstance(cause, FileNotFoundError) and missing == os.environ.get("CC", "clang"):
        return f"; {CLANG_REMEDY}"
    cache = os.environ.get("XDG_CACHE_HOME")
    if isinstance(cause, OSError) and cache and missing.startswith(cache):
        return f"; tinygrad keeps files in XDG_CACHE_HOME, {cache}: name a directory that can be written"
    return f"; DEV is {asked!r}: use DEV=CPU, or leave it out" if asked else ""


def import_llm() -> Any:
    """The module tinygrad.llm.model. The wheel of 0.14.0 lacks a module that it imports, with kernels for AMD's GPUs: it gets
    one that says there are none."""
    try:
        importlib.import_module("tinygrad.llm.kernels.amd")
    except ModuleNotFoundError:
        amd: Any = types.ModuleType("tinygrad.llm.kernels.amd")
        amd.Linear = nn.Linear
        amd.amd_custom_kernels_supported = lambda _: False
        amd.gated_delta_prefill = amd.flash_attention = None
        package: Any = types.ModuleType("tinygrad.llm.kernels")
        package.__path__, package.amd = [], amd
        sys.modules.setdefault("tinygrad.llm.kernels", package)
        sys.modules.setdefault("tinygrad.llm.kernels.amd", amd)
    return importlib.import_module("tinygrad.llm.model")


@dataclass(frozen=True)
class Program:
    """Native code as a node of a graph.

    Attributes:
        name: of the kernel; on Metal the function's name in the source.
        address: of a C function that takes the buffers as pointers and then the variables as int64 (CPU).
        source: Metal Shading Language: buffers and variables (constant int&) at consecutive indices (METAL).
        grid, group: threadgroups of the launch, and threads of each (METAL).
        outs, inouts: which buffers are written, and read and written; the others are read.
    """

    name: str
    address: int = 0
    source: str = ""
    grid: tuple[int, int, int] = (1, 1, 1)
    group: tuple[int, int, int] = (1, 1, 1)
    outs: tuple[int, ...] = ()
    inouts: tuple[int, ...] = ()

    def __call__(self, buffers: Sequence[Tensor], variables: Sequence[Any] = ()) -> list[Tensor]:
        """The buffers after the program, lazily: it runs when one of them is realised, once, in the graph's order.

        Args:
            buffers: with fixed shapes; those written have memory of their own.
            variables: bound ones.
        """
        from tinygrad import UOp  # noqa: PLC0415
        from tinygrad.renderer import Estimates  # noqa: PLC0415
        from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo  # noqa: PLC0415

        nodes = [buffer.uop for buffer in buffers]
        slots = [UOp.placeholder_like(node, slot=i).base for i, node in enumerate(nodes)]
        for i, variable in enumerate(variables):
            free = variable.unbind()[0]
            slot = UOp.variable(free.expr, free.vmin, free.vmax, dtype=dtypes.int, param=True)
            slots.append(slot.replace(arg=replace(slot.arg, slot=len(nodes) + i)))
        sink = UOp.sink(*slots, arg=KernelInfo(name=self.name, estimates=Estimates()))
        # What is read and written must be said: tinygrad would look for loads and stores, of which there are none.
        info = ProgramInfo(
            name=self.name,
            global_size=self.grid,
            local_size=self.group,
            vars=tuple(slots[len(nodes) :]),
            globals=tuple(range(len(nodes))),
            outs=self.outs + self.inouts,
            ins=tuple(i for i in range(len(nodes)) if i not in self.outs),
        )
        parts = [sink, UOp(Ops.LINEAR, src=(*sink.src, sink)), UOp(Ops.SOURCE, arg=self.source or self.name)]
        if self.address:
            parts.append(UOp(Ops.BINARY, arg=_jump(self.address)))
        call = UOp(Ops.PROGRAM, src=tuple(parts), arg=info).call(*nodes, *variables)
        return [Tensor(node.after(call)) for node in nodes]


def _jump(address: int) -> bytes:
    """Machine code that goes on at an address; arguments stay where the caller put them."""
    if platform.machine() in ("x86_64", "AMD64"):
        return b"\x48\xb8" + struct.pack("<Q", address) + b"\xff\xe0"  # mov rax, address; jmp rax
    return struct.pack("<IIQ", 0x58000050, 0xD61F0200, address)  # ldr x16, 8; br x16; the address


def variable(name: str, most: int, value: int) -> Any:
    """A bound variable of a graph, 0 to `most`."""
    from tinygrad import Variable  # noqa: PLC0415

    return Variable(name, 0, most).bind(value)


def is_symbolic(value: Any) -> bool:
    """Whether a number is one of a graph's, bound or not."""
    return hasattr(value, "unbind")


def synchronize() -> None:
    """Waits for what graphs gave the CPU device to do."""
    if not graph_problem() and not in_function():  # where no device may be used
        Device["CPU"].synchronize()


def is_bound(value: Any) -> bool:
    """Whether a symbolic number is one bound variable, which a program can take."""
    return bool(getattr(value, "is_bound_var", False))


def value_of(value: Any) -> int:
    """The number behind an int or a bound variable."""
    return value if isinstance(value, int) else int(value.unbind()[1])


def identity(tensor: Tensor) -> Any:
    """What stays the same for as long as a tensor is not given another value."""
    return tensor.uop if hasattr(tensor, "uop") else tensor.lazydata


class _Memory:
    """A buffer's bytes for NumPy; keeps the buffer."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        address = buffer.ensure_allocated()._buf.va_addr
        self.__array_interface__ = {
            "data": (address, False), "shape": (buffer.nbytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


def memory_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a realised tensor on the CPU where tinygrad holds them, kept alive."""
    Device[tensor.device].synchronize()
    return np.asarray(_Memory(tensor.uop.buffer))


def is_realized(tensor: Tensor) -> bool:
    """Whether a tensor has memory, in order."""
    return bool(tensor.uop.is_realized) and tensor.uop.contiguous_view() is not None


def is_unpacked(tensor: Tensor) -> bool:
    """Whether a lazy tensor is computed from a file's quantised blocks, not only moved or cast."""
    from tinygrad.uop.ops import Ops  # noqa: PLC0415

    nodes = tensor.uop.toposort()
    return any(node.op is Ops.MUL for node in nodes) and any(node.dtype == dtypes.uint8 for node in nodes)


def file_part(tensor: Tensor) -> tuple[Tensor, int] | None:
    """The realised bytes that a lazy tensor is computed from, all of them, and where in these its part begins; None if it is
    computed from anything else."""
    from tinygrad.uop.ops import Ops  # noqa: PLC0415

    nodes = tensor.uop.toposort()
    buffers = [node for node in nodes if node.op is Ops.BUFFER]
    if len(buffers) != 1 or buffers[0].dtype != dtypes.uint8 or not buffers[0].is_realized:
        return None
    starts = [node.src[1] for node in nodes if node.op is Ops.SHRINK and node.src[0] is buffers[0]]
    if len(starts) != 1 or starts[0].op is not Ops.CONST:
        return None
    return Tensor(buffers[0]), int(starts[0].val)


def order_in_file(
    tensor: Tensor, whole: Tensor, start: int, kind: int, shape: tuple[int, ...], heads: int
) -> str | None:
    """Whether a tensor is what tinygrad's own loader makes of a part of a GGUF file: "plain", "turned" (rows of Q or K of `heads`
    heads, put from RoPE's neighbours into halves), or None if it is anything else. Equal graphs are one object in tinygrad.

    Args:
        tensor: lazy.
        whole, start: the file's bytes, and where the part begins.
        kind: GGUF's number of the part's type.
        shape: of the part.
    """
    from tinygrad.llm.gguf import ggml_data_to_tensor  # noqa: PLC0415

    loaded = ggml_data_to_tensor(whole[start:], math.prod(shape), kind).reshape(*shape)
    for plain in (loaded, loaded.cast(dtypes.float16)):
        if tensor.uop is plain.uop:
            return "plain"
        if heads and len(shape) == 2:
            rows = plain.reshape(heads, shape[0] // heads, -1)
            halves = rows.rearrange("n (h two) d -> n (two h) d", two=2)
            partial = rows[:, :0].cat(rows[:, 0:].rearrange("n (h two) d -> n (two h) d", two=2), dim=1)
            if any(tensor.uop is turned.reshape(-1, shape[1]).uop for turned in (halves, partial)):
                return "turned"
    return None


def graph_problem() -> str:
    """Why native programs cannot run in this tinygrad's graphs; "" if they can. Tested once, at import."""
    return _test_graphs()


@functools.cache
def _test_graphs() -> str:
    if version() < GRAPHS_FROM:
        return f"tinygrad {'.'.join(map(str, version()))} is older than 0.14"
    try:
        _run_probe()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"tinygrad's graphs do not take native programs ({why}): specfast runs beside them, through the public API",
            RuntimeWarning,
            stacklevel=2,
        )
        return why
    return ""


def _run_probe() -> None:
    """One tiny program, eager, captured and replayed, with a producer, a consumer, a variable and a state."""
    state = Tensor([0, 0], dtype=dtypes.int32, device="CPU").clone().realize()
    program = Program("specfast_probe", address=_core.GraphForward.probe, inouts=(0,))

    def step(x: Tensor, by: Any) -> Tensor:
        return program([state, x * 2], [by])[0] + 1

    expected: list[Any] = []
    found: list[Any] = []
    for runner in (step, TinyJit(step)):
        for i in range(4):
            by = variable("by", 100, 10 + i)
            found.append(runner(Tensor([i], dtype=dtypes.int32, device="CPU").clone().realize(), by).tolist())
            expected.append([3 * i + 11, len(expected) + 2])
    if found != expected:
        raise RuntimeError(f"a probe gave {found} instead of {expected}")


def in_function() -> bool:
    """Whether the body of a tinygrad @function is being traced: what it builds is no graph of the outside's."""
    from tinygrad.function import _function  # noqa: PLC0415

    return bool(_function.depth > 0)

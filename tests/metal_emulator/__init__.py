"""Executes .metal files on the CPU and counts what they read. See README.md beside this file.

program = metal_emulator.compile("metal/matmul_rows.metal")
program.run("matmul_rows_q4_g64_f16", grid=(32, 1, 1), threadgroup=(64, 1, 1), buffers=[w, scales, biases, x, y, dims])
"""

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from metal_emulator import build, translate
from metal_emulator.build import EmulatorUnavailableError
from metal_emulator.translate import TranslationError

__all__ = ["Counters", "EmulatorError", "EmulatorUnavailableError", "Program", "TranslationError", "compile"]

MAX_BUFFERS = 31


class EmulatorError(RuntimeError):
    """A launch did what a GPU would not define: the message names the kernel and, where known, file and line."""


@dataclass(frozen=True)
class Counters:
    """What one launch did. Byte counts are by buffer index, and filled in mode="count" only."""

    collectives: int = 0
    """Simdgroup operations and barriers, per simdgroup."""
    barriers: int = 0
    """Threadgroup barriers, per threadgroup."""
    threadgroup_bytes: int = 0
    """The most threadgroup memory one threadgroup declared."""
    read_bytes: dict[int, int] = field(default_factory=dict)
    """Bytes loaded; a byte several lanes of a simdgroup load in one instruction counts once."""
    unique_read_bytes: dict[int, int] = field(default_factory=dict)
    """Bytes loaded at least once by the launch."""
    written_bytes: dict[int, int] = field(default_factory=dict)
    """Bytes stored, counted as read_bytes are."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("threadgroups", ctypes.c_uint * 3),
        ("threadgroup_size", ctypes.c_uint * 3),
        ("buffers", ctypes.c_void_p * MAX_BUFFERS),
        ("buffer_bytes", ctypes.c_size_t * MAX_BUFFERS),
        ("schedule", ctypes.c_uint64),
    )


class _Counters(ctypes.Structure):
    _fields_ = (
        ("collectives", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("read_bytes", ctypes.c_uint64 * MAX_BUFFERS),
        ("unique_read_bytes", ctypes.c_uint64 * MAX_BUFFERS),
        ("written_bytes", ctypes.c_uint64 * MAX_BUFFERS),
    )


class Program:
    """One compiled .metal file. `kernels` are the host names it can run."""

    def __init__(self, metal: translate.Metal, binary: Path, mode: str) -> None:
        self.mode = mode
        self.kernels = tuple(metal.kernels)
        self._metal = metal
        self._binary = binary
        self._library = ctypes.CDLL(str(binary)) if mode in build.IN_PROCESS else None

    def run(
        self,
        name: str,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        buffers: Sequence[np.ndarray],
        schedule: int = 0,
    ) -> Counters:
        """Runs one kernel over `grid` threadgroups of `threadgroup` threads.

        `buffers` are C-contiguous arrays in the order of the kernel's buffer indices, scalars and `constant` arrays
        included; they are written in place. Schedule 0 runs simdgroups in turn, any other number is a random order.

        Raises EmulatorError: wrong buffer count, a threadgroup that is not whole simdgroups or has over 1024 threads, over
        32 KiB of threadgroup memory, a collective or barrier not all lanes reach, or a sanitizer's report.
        """
        self._check(name, grid, threadgroup, buffers)
        if self._library is None:
            return self._run_in_a_process(name, grid, threadgroup, buffers, schedule)
        launch, counters = _Launch(), _Counters()
        launch.threadgroups[:], launch.threadgroup_size[:], launch.schedule = grid, threadgroup, schedule
        for i, array in enumerate(buffers):
            launch.buffers[i], launch.buffer_bytes[i] = array.ctypes.data, array.nbytes
        message = ctypes.create_string_buffer(2048)
        failed = self._library.emulator_run(
            name.encode(), ctypes.byref(launch), ctypes.byref(counters), message, ctypes.c_size_t(len(message))
        )
        if failed:
            raise EmulatorError(message.value.decode())
        totals = (counters.collectives, counters.barriers, counters.threadgroup_bytes)
        if self.mode != "count":
            return Counters(*totals)
        tables = (counters.read_bytes, counters.unique_read_bytes, counters.written_bytes)
        return Counters(*totals, *({i: table[i] for i in range(len(buffers))} for table in tables))

    def _check(
        self, name: str, grid: tuple[int, ...], threadgroup: tuple[int, ...], buffers: Sequence[np.ndarray]
    ) -> None:
        if name not in self.kernels:
            raise EmulatorError(f"no kernel {name}; this file has {', '.join(self.kernels)}")
        parameters = [p for p in self._metal.parameters_of(name) if p.buffer is not None]
        wanted = max((p.buffer for p in parameters if p.buffer is not None), default=-1) + 1
        if len(buffers) != wanted:
            raise EmulatorError(f"kernel {name} takes {wanted} buffers, {len(buffers)} were given")
        for parameter in parameters:
            array = buffers[parameter.buffer or 0]
            if not array.flags.c_contiguous:
                raise EmulatorError(f"kernel {name}: buffer {parameter.buffer} is not contiguous")
            if not (array.flags.writeable or parameter.read_only):
                raise EmulatorError(f"kernel {name}: buffer {parameter.buffer} ({parameter.text}) is a read-only array")
        threads = int(np.prod(threadgroup))
        if len(grid) != 3 or len(threadgroup) != 3 or min(*grid, *threadgroup) < 1 or threads % 32 or threads > 1024:
            raise EmulatorError(
                f"kernel {name}: grid {tuple(grid)} of threadgroups {tuple(threadgroup)}; a threadgroup has a multiple of 32 "
                "threads, at most 1024, and both have three sizes of at least 1"
            )

    def _run_in_a_process(
        self,
        name: str,
        grid: tuple[int, ...],
        threadgroup: tuple[int, ...],
        buffers: Sequence[np.ndarray],
        schedule: int,
    ) -> Counters:
        with tempfile.TemporaryDirectory() as directory:
            files = [Path(directory) / f"buffer{i}" for i in range(len(buffers))]
            job = [
                f"kernel {name}",
                f"schedule {schedule}",
                "threadgroups {} {} {}".format(*grid),
                "threads {} {} {}".format(*threadgroup),
            ]
            for i, (array, file) in enumerate(zip(buffers, files, strict=True)):
                array.tofile(file)
                job.append(f"buffer {i} {array.nbytes} {file}")
            (Path(directory) / "job").write_text("\n".join(job) + "\n")
            command = [str(self._binary), f"{directory}/job"]
            if self.mode == "thread" and shutil.which(
                "setarch"
            ):  # its shadow memory wants addresses where they always were
                command = ["setarch", "-R", *command]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env={**os.environ, **build.SANITIZER_OPTIONS}
            )
            if done.returncode:
                raise EmulatorError(
                    f"kernel {name}, mode {self.mode}: {_headline(done.stderr)}\n{done.stderr.strip()[:6000]}"
                )
            for array, file in zip(buffers, files, strict=True):
                if array.flags.writeable:
                    array.reshape(-1)[:] = np.fromfile(file, array.dtype)
        return Counters(*map(int, done.stdout.split()))


def _headline(report: str) -> str:
    """What a sanitizer found and the first line of a .metal file it names."""
    what = re.search(
        r"AddressSanitizer: ([\w-]+)|(?:Thread|Memory)Sanitizer: ([\w -]+)|runtime error: ([^\n]*)", report
    )
    where = re.search(r"\S+\.metal:\d+", report)
    found = next(filter(None, what.groups()), "") if what else "failed"
    return f"{found.strip()} at {where[0]}" if where else found


def compile(  # noqa: A001
    source: str | Path,
    defines: Mapping[str, object] | None = None,
    mode: str = "plain",
    include: Iterable[Path] = (),
    constants: Mapping[int, object] | None = None,
) -> Program:
    """Translates and compiles a .metal file, or its text, for one mode; compiled files are cached by content.

    Modes: "plain" runs in this process; "count" too, and fills the byte counters; "address", "thread", "undefined" and
    "memory" run each launch in a process under that sanitizer. `constants` gives values to function constants.

    Raises TranslationError where the file is outside the dialect, EmulatorUnavailableError where the mode's compiler is missing.
    """
    if mode not in build.MODES:
        raise ValueError(f"mode {mode!r}; choose from {', '.join(build.MODES)}")
    path = build.source_file(source)
    text = translate.preprocess(path, build.DIRECTORY / "metal_headers", include, defines or {})
    metal = translate.parse(text, constants or {})
    return Program(metal, build.binary(translate.to_cpu(metal), path.stem, mode), mode)

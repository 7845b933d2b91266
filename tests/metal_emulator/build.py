"""Compiles translated files. Every result is cached under build/metal_emulator by the hash of all that went into it."""

import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

RUNTIME = Path(__file__).parent / "runtime"
DIRECTORY = Path(__file__).parents[2] / "build" / "metal_emulator"
COMMON = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]
# What differs by mode: the compiler, flags of the translated file, flags of the runtime.
MODES = {
    "plain": ("g++", ["-O2"], ["-O2"]),
    "count": ("g++", ["-O2", "-fsanitize=thread"], ["-O2", "-DEMULATOR_COUNT"]),
    "address": ("g++", ["-O1", "-g1", "-fsanitize=address"], ["-O2", "-g1", "-DEMULATOR_ADDRESS"]),
    "thread": ("g++", ["-O1", "-g1", "-fsanitize=thread"], ["-O2", "-g1", "-DEMULATOR_THREAD"]),
    "undefined": (
        "g++",
        ["-O1", "-g1", "-fsanitize=undefined", "-fno-sanitize-recover=all"],
        ["-O2", "-g1", "-DEMULATOR_UNDEFINED"],
    ),
    "memory": (
        "clang++",
        ["-O1", "-g1", "-fsanitize=memory", "-fsanitize-memory-track-origins=2"],
        ["-O1", "-g1", "-fsanitize=memory", "-fsanitize-memory-track-origins=2", "-DEMULATOR_MEMORY"],
    ),
}
IN_PROCESS = ("plain", "count")
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "exitcode=66:history_size=2:report_signal_unsafe=0",
    "UBSAN_OPTIONS": "print_stacktrace=0",
}


class EmulatorUnavailableError(RuntimeError):
    """A compiler or a sanitizer's run-time library is missing on this machine."""


def source_file(source: str | Path) -> Path:
    """The file of a program. One given as text is kept in a file, so that reports can name its lines."""
    if isinstance(source, Path) or ("\n" not in source and source.endswith(".metal")):
        return Path(source)
    path = DIRECTORY / "sources" / f"source_{_hash(source)}.metal"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


def binary(cpp: str, stem: str, mode: str) -> Path:
    """The shared object (in-process modes) or the program (sanitizers) for a translated file."""
    compiler, flags, runtime_flags = MODES[mode]
    require(mode)
    sources = ["runtime.cpp"] + ["count.cpp"] * (mode == "count") + ["runner.cpp"] * (mode not in IN_PROCESS)
    objects = [_object(RUNTIME / name, compiler, tuple(runtime_flags)) for name in sources]
    target = DIRECTORY / f"{stem}.{mode}.{_hash(cpp, _runtime_text(), *flags, *runtime_flags)}"
    if target.exists():
        return target
    source, compiled = target.with_suffix(f"{target.suffix}.cpp"), target.with_suffix(f"{target.suffix}.o")
    source.write_text(cpp)
    dialect = ["-march=native"] + ["-fsingle-precision-constant"] * (compiler == "g++")  # in Metal 0.5 is a float
    _compile([compiler, *COMMON, *dialect, *flags, f"-I{RUNTIME}", "-c", str(source), "-o", str(compiled)])
    link = ["-shared", "-Wl,-Bsymbolic"] if mode in IN_PROCESS else [f for f in flags if f.startswith("-fsanitize")]
    _compile([compiler, *link, str(compiled), *map(str, objects), "-lm", "-o", f"{target}.new"])
    compiled.unlink()
    os.replace(f"{target}.new", target)
    return target


@cache
def require(mode: str) -> None:
    """Raises EmulatorUnavailableError unless this is Linux and the mode's compiler can link a program."""
    compiler, flags, _ = MODES[mode]
    if sys.platform != "linux":
        raise EmulatorUnavailableError("the emulator runs on Linux")
    if shutil.which(compiler) is None:
        raise EmulatorUnavailableError(f"mode {mode!r} needs {compiler}")
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    command = [
        compiler,
        *flags,
        "-x",
        "c++",
        "-",
        "-o",
        str(DIRECTORY / f"try.{mode}"),
        *(["-c"] if mode == "count" else []),
    ]
    done = subprocess.run(command, input="int main() {}", capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulatorUnavailableError(f"mode {mode!r} does not link with {compiler}: {done.stderr.strip()[:300]}")


@cache
def _object(source: Path, compiler: str, flags: tuple[str, ...]) -> Path:
    target = DIRECTORY / f"{source.stem}.{_hash(_runtime_text(), compiler, *flags)}.o"
    if not target.exists():
        _compile([compiler, *COMMON, *flags, "-c", str(source), "-o", f"{target}.new"])
        os.replace(f"{target}.new", target)
    return target


@cache
def _runtime_text() -> str:
    return "".join(path.read_text() for path in sorted(RUNTIME.iterdir()))


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:6000]}")


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

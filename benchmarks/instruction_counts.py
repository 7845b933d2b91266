"""Instructions of matmul_rows by rows M, for instruction sets that cannot be timed here: counts, not times.

`python benchmarks/instruction_counts.py` builds tests/cpp/matmul_calls.cpp, runs it with one call and with two under a tool that
counts executed instructions, and prints the difference: callgrind for x86-64, qemu's trace of single steps for AArch64.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "instruction_counts"
ROWS = (1, 2, 4, 6, 8, 9)
N, K = 32, 1024
BLOCK = 64  # products of the unit in which counts are given

Counter = Callable[[Sequence[str]], int]  # arguments of matmul_calls -> instructions executed


class MissingToolError(Exception):
    """A program that counting needs is not here; the message says which and where it comes from."""


def find(package: str, *names: str) -> str:
    """The path of the first of the programs that is installed."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        raise MissingToolError(f"needs {names[0]} ({package})")
    return path


def checked(command: list[str]) -> bytes:
    """Standard error of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:].decode(errors='replace')}")
    return done.stderr


def build(name: str, *options: str) -> str:
    """Builds the program that is counted and returns its path."""
    commands = (
        ["cmake", "-S", ROOT, "-B", BUILD / name, "-DSPECFAST_DRIVER=ON", *options],
        ["cmake", "--build", BUILD / name, "--target", "matmul_calls", "--parallel", "2"],
    )
    for command in commands:
        checked([str(part) for part in command])
    return str(BUILD / name / "matmul_calls")


def x86_counter() -> Counter:
    if platform.machine() not in ("x86_64", "AMD64"):
        raise MissingToolError("needs an x86-64 machine")
    find("pip or apt: cmake", "cmake")
    valgrind = find("apt: valgrind", "valgrind")
    program = build("x86_64")

    def count(arguments: Sequence[str]) -> int:
        out = checked([valgrind, "--tool=callgrind", "--callgrind-out-file=/dev/null", program, *arguments])
        return int(re.search(rb"Collected : (\d+)", out)[1])

    return count


def aarch64_counter() -> Counter:
    find("pip or apt: cmake", "cmake")
    compiler = find("apt: g++-aarch64-linux-gnu", "aarch64-linux-gnu-g++")
    emulator = find("apt: qemu-user-static", "qemu-aarch64-static", "qemu-aarch64")
    program = build(
        "aarch64", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )  # fmt: skip
    usage = subprocess.run([emulator, "-h"], capture_output=True, text=True, check=False).stdout
    step = "-one-insn-per-tb" if "-one-insn-per-tb" in usage else "-singlestep"  # older releases: the second

    def count(arguments: Sequence[str]) -> int:
        out = checked([emulator, "-cpu", "max", step, "-d", "exec,nochain", program, *arguments])
        return out.count(b"\nTrace ")

    return count


def table(count: Counter, isa: str, bits: int, group: int) -> list[str]:
    """Rows of Markdown: per M, instructions of a call, for BLOCK products, and over those of one row."""
    lines, first = [], 0
    for M in ROWS:
        arguments = [isa, *map(str, (bits, group, N, K, M))]
        call = count([*arguments, "2"]) - count([*arguments, "1"])
        first = first or call
        per_block = call / (N * K * M / BLOCK)
        lines.append(f"| {isa} | q{bits}g{group} | {M} | {call} | {per_block:.2f} | {call / first:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["q4g64", "q8g64"], help="q4 or q8 and the group, as in q4g64")
    weights = [
        re.fullmatch(r"q([48])g(32|64|128)", w) or parser.error(f"not a format: {w}")
        for w in parser.parse_args().weights
    ]
    print(f"Executed instructions, not times: matmul_rows, int8 activations, {N} x {K}.\n")
    print(f"| isa | weights | M | instructions | for {BLOCK} products | count(M)/count(1) |")
    print("| --- | --- | --- | --- | --- | --- |")
    notes = ["avx512 and avx_vnni not counted: callgrind cannot run them"]
    for isas, make in ((["avx2"], x86_counter), (["neon", "neon_i8mm"], aarch64_counter)):
        try:
            count = make()
        except MissingToolError as error:
            notes.append(f"{', '.join(isas)} not counted: {error}")
            continue
        for isa in isas:
            for w in weights:
                print(*table(count, isa, int(w[1]), int(w[2])), sep="\n", flush=True)
    print("", *notes, sep="\n")


if __name__ == "__main__":
    main()

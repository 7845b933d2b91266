"""The law, its draws and the token rule have the same bits from every compiler and on every CPU; see cpp/law_test.cpp."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEMS = [
    "law",
    "row_law",
    "verify_tokens",
    "verify_block",
    "couple_tokens",
    "verify_logits",
    "thread_pool",
    "isa/unit_scalar",
]
SOURCES = [ROOT / "tests/cpp/law_test.cpp", *(ROOT / f"csrc/{stem}.cpp" for stem in STEMS)]
FLAGS = [
    "-std=c++20",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-pass-failed",  # Clang, of loops that are not vectorised
    "-pthread",
    f"-I{ROOT / 'csrc'}",
]
FULL = os.environ.get("SPECFAST_FULL") == "1"


def tool(*names):
    """The first of the programs that is installed; skips the test without one."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"none of these is installed: {', '.join(names)}")
    return found


def run(directory, compiler, flags, *launcher, rounds=300):
    program = directory / "law_test"
    subprocess.run([compiler, *FLAGS, *flags, *SOURCES, "-o", program], check=True)
    done = subprocess.run([*launcher, program, str(rounds)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("names", [("g++", "c++"), ("clang++", "clang++-14")])
@pytest.mark.parametrize("level", ["-O1", "-O3"])
def test_compilers(tmp_path, names, level):
    run(tmp_path, tool(*names), [level], rounds=20_000 if FULL else 300)


def test_neon_under_an_emulator(tmp_path):
    run(tmp_path, tool("aarch64-linux-gnu-g++"), ["-O3", "-static"], tool("qemu-aarch64", "qemu-aarch64-static"))


@pytest.mark.skipif(not FULL, reason="sanitizers run with SPECFAST_FULL=1")
def test_sanitizers(tmp_path):
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    run(tmp_path, tool("g++", "clang++"), flags, rounds=5_000)

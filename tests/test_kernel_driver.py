"""The C++ driver over all kernels: native, NEON and AVX2 under emulators, and sanitized; and what instruction-set units export."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FULL = bool(os.environ.get("SPECFAST_FULL"))


def build(directory, *options):
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", directory, "-DSPECFAST_DRIVER=ON", *options], check=True, capture_output=True
    )
    subprocess.run(["cmake", "--build", directory, "--parallel", "2"], check=True, capture_output=True)
    return directory


def run(*command):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def native_build(tmp_path_factory):
    return build(tmp_path_factory.mktemp("native"))


def test_native(native_build):
    assert "0 failures" in run(native_build / "kernel_driver", *(["--full"] if FULL else []))


def test_units_export_only_their_table(native_build):
    """An inline function compiled for one instruction set must never be the copy the rest of the program uses."""
    objects = list(native_build.rglob("unit_*.o"))
    assert objects
    for unit in objects:
        lines = run("nm", "-C", "--defined-only", unit).splitlines()
        exported = [line.split(maxsplit=2)[1:] for line in lines if line.split(maxsplit=2)[1] not in "tbrd"]
        assert [name for _, name in exported] == [f"specfast::{unit.name.split('_')[1].split('.')[0]}_kernels()"]


def test_neon_under_an_emulator(tmp_path):
    compiler, emulator = (
        shutil.which("aarch64-linux-gnu-g++"),
        shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64"),
    )
    if not compiler or not emulator:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user-static (apt)")
    build(
        tmp_path, "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )  # fmt: skip
    out = run(emulator, tmp_path / "kernel_driver", *(["--full"] if FULL else []), "neon")
    assert "neon" in out
    assert "0 failures" in out


@pytest.mark.skipif(not FULL, reason="takes minutes; runs with SPECFAST_FULL=1")
def test_avx2_on_an_emulated_haswell(native_build):
    """A CPU with AVX2 and nothing newer: any later instruction in the unit would end the program."""
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if not emulator or platform.machine() != "x86_64":
        pytest.skip("needs qemu-user-static (apt) on x86_64")
    out = run(emulator, "-cpu", "Haswell", native_build / "kernel_driver", "avx2")
    assert "avx2: " in out
    assert "not run" not in out
    assert "0 failures" in out


@pytest.mark.skipif(not FULL, reason="runs with SPECFAST_FULL=1")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitized(tmp_path, sanitizer):
    build(tmp_path, f"-DSPECFAST_SANITIZE={sanitizer}")
    assert "0 failures" in run(tmp_path / "kernel_driver")

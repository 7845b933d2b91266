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


@pytest.mark.skipif(not FULL, reason="a second compiler runs with SPECFAST_FULL=1")
def test_clang(tmp_path):
    if not shutil.which("clang++"):
        pytest.skip("needs clang (apt)")
    assert "0 failures" in run(build(tmp_path, "-DCMAKE_CXX_COMPILER=clang++") / "kernel_driver")


def check_exports(directory, nm="nm"):
    """An inline function compiled for one instruction set must never be the copy the rest of the program uses."""
    objects = list(directory.rglob("unit_*.o"))
    assert objects
    for unit in objects:
        lines = run(nm, "-C", "--defined-only", unit).splitlines()
        exported = [line.split(maxsplit=2)[1:] for line in lines if line.split(maxsplit=2)[1] not in "tbrd"]
        isa = unit.name.removeprefix("unit_").split(".")[0]
        assert [name for _, name in exported] == [f"specfast::{isa}_kernels()"]


def test_units_export_only_their_table(native_build):
    check_exports(native_build)


@pytest.fixture(scope="module")
def neon_build(tmp_path_factory):
    """A static AArch64 driver, as a function that runs it on an emulated CPU."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user-static (apt)")
    directory = build(
        tmp_path_factory.mktemp("neon"), "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )  # fmt: skip
    full = ["--full"] if FULL else []
    return directory, lambda cpu, isa: run(emulator, "-cpu", cpu, directory / "kernel_driver", *full, isa)


@pytest.mark.parametrize("isa", ["neon", "neon_i8mm"])
def test_neon_under_an_emulator(neon_build, isa):
    out = neon_build[1]("max", isa)
    assert f"\n{isa}: " in out
    assert "not run" not in out
    assert "0 failures" in out
    assert "best: neon_i8mm\n" in out


def test_neon_without_matrix_products(neon_build):
    """A CPU with dot products and nothing newer takes the table made for it."""
    out = neon_build[1]("cortex-a76", "neon_i8mm")
    assert "best: neon\n" in out
    assert "neon_i8mm: not run" in out


def test_neon_units_export_only_their_table(neon_build):
    check_exports(neon_build[0], "aarch64-linux-gnu-nm")


@pytest.mark.skipif(not FULL, reason="takes minutes; runs with SPECFAST_FULL=1")
def test_avx2_on_an_emulated_haswell(native_build):
    """A CPU with AVX2 and nothing newer: any later instruction in the unit would end the program."""
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if not emulator or platform.machine() != "x86_64":
        pytest.skip("needs qemu-user-static (apt) on x86_64")
    out = run(emulator, "-cpu", "Haswell", native_build / "kernel_driver", "avx2")
    assert "avx2: " in out
    assert "best: avx2\n" in out
    assert "not run" not in out
    assert "0 failures" in out


@pytest.mark.skipif(not FULL, reason="runs with SPECFAST_FULL=1")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitized(tmp_path, sanitizer):
    build(tmp_path, f"-DSPECFAST_SANITIZE={sanitizer}")
    assert "0 failures" in run(tmp_path / "kernel_driver")

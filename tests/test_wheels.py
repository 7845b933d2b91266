"""Wheels for other systems: the checks of packaging/ find what would not load; at full counts the wheels are built and checked."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "packaging"))
sys.path.insert(0, str(Path(__file__).parents[1] / "packaging" / "macos"))
import inspect_wheel
import mach_o
import mlx_wheel
import zig

ROOT = Path(__file__).parents[1]
FULL = bool(os.environ.get("SPECFAST_FULL"))


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """A macOS extension from one C function, as a function."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs ziglang (pip)")
    try:
        mlx_wheel.unpacked()
    except mlx_wheel.FetchError as missing:
        pytest.skip(str(missing))
    monkeypatch.setenv("SPECFAST_TBD", str(tmp_path))

    def build(body: str) -> Path:
        source, built = tmp_path / "f.c", tmp_path / "_core.cpython-311-darwin.so"
        source.write_text(f"void *PyInit__core(void) {{ {body} }}\n")
        arguments = zig.arguments(
            "macos", "cc", ["-bundle", "-o", str(built), "-Wl,-x", "-framework", "Metal", str(source)]
        )
        subprocess.run([sys.executable, "-m", "ziglang", *arguments], check=True)
        return built

    return build


def test_a_symbol_nobody_has_is_found(extension):
    assert inspect_wheel.extension_problems(extension("extern void *PyDict_New(void); return PyDict_New();")) == []
    (problem,) = inspect_wheel.extension_problems(extension("extern void *mystery(void); return mystery();"))
    assert problem == "_mystery is not in Python"


def test_a_file_of_another_kind_is_found(tmp_path):
    """Zig once wrote bundles that begin with zeros, and reported success."""
    for content in (b"", bytes(4096), Path(sys.executable).read_bytes()[:4096]):
        file = tmp_path / "_core.so"
        file.write_bytes(content)
        with pytest.raises(mach_o.MachOError):
            mach_o.read(file)


def test_a_wheel_without_its_parts_is_found(tmp_path):
    wheel = tmp_path / "specfast-0.1.0-cp312-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("specfast/__init__.py", "")
        archive.writestr("specfast-0.1.0.dist-info/WHEEL", "Tag: cp312-abi3-linux_x86_64\n")
    found = "\n".join(inspect_wheel.problems(wheel))
    for part in ("the name", "the metadata", "_core is missing", "_mlx is missing", "no Metal sources"):
        assert part in found


def test_how_flags_reach_zig():
    linux = zig.arguments("aarch64", "c++", ["-march=armv8.2-a+dotprod+i8mm+fp16", "-c", "f.cpp"])
    assert linux[-3:] == ["-mcpu=generic+v8_2a+dotprod+i8mm+fullfp16", "-c", "f.cpp"]
    mac = zig.arguments("macos", "c++", ["-march=armv8.2-a+dotprod", "-c", "f.cpp"])
    assert mac[0] == "c++"
    assert mac[-3:] == ["-mcpu=apple_m1+dotprod", "-c", "f.cpp"]


@pytest.mark.skipif(not FULL, reason="builds for minutes; SPECFAST_FULL=1")
@pytest.mark.parametrize("target", ["wheel-macos", "wheel-aarch64"])
def test_wheels_are_built_and_pass(target):
    if target == "wheel-aarch64" and not (shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")):
        pytest.skip("needs qemu-user-static (apt)")
    done = subprocess.run(
        ["make", target, f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "every symbol is resolved" in done.stdout or "identical" in done.stdout

"""Checks a macOS wheel on any machine: `inspect_wheel.py WHEEL`

Its tag; that each extension is a signed arm64 Mach-O for macOS 14; that every symbol an extension wants is in the library it is
bound to (MLX's libraries, and what MLX itself is known to use of the system's) or in Python; that the Metal sources are there.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import mach_o
import mlx_wheel

TAG = re.compile(r"specfast-[\w.]+-cp3\d+-(cp3\d+|abi3)-macosx_14_0_arm64\.whl")
# libc++'s own that MLX happens not to use. All are older than macOS 14: LLVM's ABI changelog and availability macros
# (llvm-project, libcxx/lib/abi/CHANGELOG.TXT and libcxx/include/__configuration/availability.h) date them to macOS 11 or before.
OLDER_THAN_MACOS_14 = """
__ZdlPvm __ZdlPvmSt11align_val_t __ZNSt3__15mutex8try_lockEv
__ZNSt3__19to_stringEd __ZNSt3__19to_stringEf __ZNSt3__19to_stringEx
__ZNSt3__112basic_stringIcNS_11char_traitsIcEENS_9allocatorIcEEE21__grow_by_and_replaceEmmmmmmPKc
__ZNSt3__120__libcpp_atomic_waitEPVKvx __ZNSt3__123__cxx_atomic_notify_allEPVKv __ZNSt3__123__libcpp_atomic_monitorEPVKv
"""


def problems(wheel: Path) -> list[str]:
    """What is wrong with the wheel; empty for a good one."""
    found = [] if TAG.fullmatch(wheel.name) else [f"the name {wheel.name} is not that of a macOS 14 arm64 wheel"]
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
        root = Path(directory)
        tags = [
            line
            for f in root.glob("*.dist-info/WHEEL")
            for line in f.read_text().splitlines()
            if line.startswith("Tag:")
        ]
        if not tags or not all("macosx_14_0_arm64" in tag for tag in tags):
            found.append(f"the metadata says {tags}")
        extensions = {f.name.split(".")[0]: f for f in root.rglob("*.so")}
        for file in extensions.values():
            if file.name.startswith("_mlx") and nanobind_abi(file) != nanobind_abi(
                *(mlx_wheel.unpacked() / "mlx").glob("core.*.so")
            ):
                found.append(f"{file.name}: another nanobind than MLX's: {nanobind_abi(file)}")
        found += [f"{name} is missing" for name in ("_core", "_mlx") if name not in extensions]
        for file in extensions.values():
            found += [f"{file.name}: {problem}" for problem in extension_problems(file)]
        if not list(root.rglob("specfast/metal/*.metal")):
            found.append("no Metal sources")
    return found


def extension_problems(file: Path) -> list[str]:
    """What is wrong with one extension."""
    try:
        binary = mach_o.read(file)
    except mach_o.MachOError as error:
        return [str(error)]
    found = []
    if (binary.cpu, binary.minimum_macos, binary.signed) != (mach_o.CPU_ARM64, "14.0", True):
        found.append(
            f"cpu {binary.cpu:#x}, macOS {binary.minimum_macos}, signed {binary.signed}; wanted arm64, 14.0, signed"
        )
    if file.name.startswith("_mlx") and "@loader_path/../mlx/lib" not in binary.rpaths:
        found.append(f"looks for MLX in {binary.rpaths}")
    if file.name.startswith("_mlx") and not any("mlx4core5metal" in symbol for symbol in binary.wanted):
        found.append("launches no Metal kernels: it was compiled without -D_METAL_")
    mlx = mach_o.read(mlx_wheel.unpacked() / "mlx/lib/libmlx.dylib").exported
    known = system_symbols()
    python = python_symbols()
    for symbol, library in sorted(binary.wanted.items()):
        name = Path(library).name
        if library == "":
            missing = symbol.removeprefix("_") not in python
        elif name == "libmlx.dylib":
            missing = symbol not in mlx
        elif name.startswith("libSystem"):
            missing = False  # the linker had Apple's list of them
        else:
            missing = symbol not in known.get(name, ())
        if missing:
            found.append(f"{symbol} is not in {name or 'Python'}")
    return found


def nanobind_abi(file: Path) -> set[bytes]:
    """The key under which nanobind modules share types."""
    return set(re.findall(rb"nanobind_system_\w+", file.read_bytes()))


def system_symbols() -> dict[str, set[str]]:
    """What exists in each system library of macOS 14: what MLX's own binaries use, and the list above."""
    used = {"libc++.1.dylib": set(OLDER_THAN_MACOS_14.split())}
    root = mlx_wheel.unpacked() / "mlx"
    for file in [*root.glob("*.so"), *root.glob("lib/*.dylib")]:
        for symbol, library in mach_o.read(file).wanted.items():
            if library.startswith("/usr/lib/"):
                used.setdefault(Path(library).name, set()).add(symbol)
    return used


def python_symbols() -> set[str]:
    """What this Python exports to extensions."""
    binary = Path(sys.executable).resolve()
    libraries = [binary, *binary.parents[1].glob("lib*/libpython3*.so*")]
    lines = [
        subprocess.run(["nm", "-D", "--defined-only", str(f)], capture_output=True, text=True, check=False).stdout
        for f in libraries
    ]
    return {line.split()[-1].partition("@")[0] for text in lines for line in text.splitlines() if line.strip()}


if __name__ == "__main__":
    bad = problems(Path(sys.argv[1]))
    print(*bad, sep="\n") if bad else print(f"{Path(sys.argv[1]).name}: every symbol is resolved")
    sys.exit(bool(bad))

"""Cross-builds the macOS wheel on Linux, with zig: `build_wheel.py DIRECTORY`, run by `make wheel-macos` in its own environment.

Needs scikit-build-core, nanobind, ninja and ziglang installed where it runs. Python's headers are this machine's: both are LP64.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import inspect_wheel
import mlx_wheel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import zig  # noqa: E402

ROOT = HERE.parents[1]
WORK = ROOT / "build" / "macos"


def write_libraries() -> Path:
    """Linker stubs of the system's libraries, with the symbols that MLX's own wheels use: what is not there must not be used."""
    directory = WORK / "tbd"
    directory.mkdir(parents=True, exist_ok=True)
    for name, symbols in inspect_wheel.system_symbols().items():
        if name.startswith(("libc++.", "libobjc.")):
            listed = ", ".join(f"'{symbol}'" for symbol in sorted(symbols))
            (directory / name.replace(".dylib", ".tbd")).write_text(
                f"--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\ninstall-name: '/usr/lib/{name}'\n"
                f"current-version: 1700\ncompatibility-version: 1\nexports:\n  - targets: [ arm64-macos ]\n    symbols: [ {listed} ]\n...\n"
            )
    return directory


def build(target: Path) -> Path:
    """The wheel, in `target`."""
    mlx = mlx_wheel.unpacked()
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}-darwin"
    environment = {
        **os.environ,
        "SPECFAST_MLX": "1",
        "SPECFAST_TOOLS": str(zig.write_tools("macos", WORK / "tools")),
        "SPECFAST_TBD": str(write_libraries()),
        "_PYTHON_HOST_PLATFORM": "macosx-14.0-arm64",
        "SETUPTOOLS_EXT_SUFFIX": f".{tag}.so",
        "ARCHFLAGS": "-arch arm64",
        "MACOSX_DEPLOYMENT_TARGET": "14.0",
    }
    defines = {
        "CMAKE_TOOLCHAIN_FILE": HERE / "toolchain.cmake",
        "CMAKE_PROJECT_INCLUDE": HERE / "project.cmake",
        "MLX_ROOT": mlx / "mlx",
        "mlx_version": mlx_wheel.VERSION,
        "NB_SUFFIX": f".{tag}.so",
        "SKBUILD_SOABI": tag,
        "Python_INCLUDE_DIR": sysconfig.get_path("include"),
    }
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        str(target),
    ]
    command += [f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()]
    command += [f"--config-settings=build-dir={WORK / 'cmake'}", str(ROOT)]
    for extension in (WORK / "cmake").glob("*.so"):  # linked anew: the stubs may have changed
        extension.unlink()
    before = set(target.glob("*.whl"))
    subprocess.run(command, env=environment, check=True)
    return next(iter(set(target.glob("*.whl")) - before), None) or max(
        target.glob("*.whl"), key=lambda f: f.stat().st_mtime
    )


if __name__ == "__main__":
    wheel = build(Path(sys.argv[1]))
    bad = inspect_wheel.problems(wheel)
    print(wheel, *(bad or ["every symbol is resolved"]), sep="\n")
    sys.exit(bool(bad))

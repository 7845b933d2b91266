"""Cross-builds the macOS wheel on Linux, with zig: `build_wheel.py DIRECTORY`, run by `make wheel-macos` in its own environment.

Needs scikit-build-core, nanobind, ninja and ziglang installed where it runs. Python's headers are this machine's: both are LP64.
"""

import shutil
import sys
from pathlib import Path

import inspect_wheel
import mlx_wheel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import cross_wheel  # noqa: E402


def write_libraries() -> Path:
    """Linker stubs of the system's libraries, with the symbols that MLX's own wheels use: what is not there must not be used."""
    directory = cross_wheel.ROOT / "build" / "macos" / "tbd"
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
    environment = {
        "SPECFAST_MLX": "1",
        "SPECFAST_TBD": str(write_libraries()),
        "ARCHFLAGS": "-arch arm64",
        "MACOSX_DEPLOYMENT_TARGET": "14.0",
    }
    defines = {
        "CMAKE_PROJECT_INCLUDE": HERE / "project.cmake",
        "MLX_ROOT": mlx_wheel.unpacked() / "mlx",
        "mlx_version": mlx_wheel.VERSION,
    }
    suffix = f"cpython-{sys.version_info.major}{sys.version_info.minor}-darwin"
    return Path(shutil.copy(cross_wheel.build("macos", suffix, "macosx-14.0-arm64", environment, defines), target))


if __name__ == "__main__":
    wheel = build(Path(sys.argv[1]))
    bad = inspect_wheel.problems(wheel)
    print(wheel, *(bad or ["every symbol is resolved"]), sep="\n")
    sys.exit(bool(bad))

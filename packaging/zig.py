"""Zig as the compiler and linker CMake expects: `zig.py macos|aarch64 c++|cc|ar|ranlib ARGUMENT...`

For macOS three things differ from Apple's tools. Zig spells -march its own way. It would link its own libc++ beside the
system's, so linking is done as C against the libraries in SPECFAST_TBD. Its bundles (MH_BUNDLE) are broken files; Python loads
a dynamic library as well. For Linux its own libc++ is linked in: the wheel then needs no C++ library of the user's.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

TARGETS = {"macos": "aarch64-macos.14.0", "aarch64": "aarch64-linux-gnu.2.28"}
CPU = {"macos": "apple_m1", "aarch64": "generic+v8_2a"}  # of -march=armv8.2-a; every Mac has at least the M1's
REPLACED = {"-bundle": "-shared", "-dynamiclib": "-shared"}
DROPPED = ("-Wl,@", "-Wl,-x", "-Wl,-S", "-Wl,-headerpad", "-Wl,-search_paths_first", "-Wl,-dead_strip")
FRAMEWORK = re.compile(r"(?:-Xlinker\n)?-framework\n(?:-Xlinker\n)?\w+\n")  # what MLX needs, it binds itself


def arguments(system: str, tool: str, given: list[str]) -> list[str]:
    """Zig's command line for the one CMake gave."""
    if tool in ("ar", "ranlib"):
        return [tool, *given]
    target = ["-target", TARGETS[system], "-fno-sanitize=all"]
    kept = [_cpu(system, a) if a.startswith("-march=") else a for a in given]
    if system != "macos":
        return [tool, *target, *kept]
    kept = FRAMEWORK.sub("", "".join(f"{a}\n" for a in kept)).splitlines()
    kept = [REPLACED.get(a, a) for a in kept if not a.startswith(DROPPED) and "/Xcode" not in a]
    if "-c" in given or "-E" in given or not {"-bundle", "-dynamiclib", "-shared"} & set(given):
        return [tool, *target, *kept]
    libraries = [str(tbd) for tbd in sorted(Path(os.environ["SPECFAST_TBD"]).glob("*.tbd"))]
    return ["cc", *target, *kept, *libraries, "-Wl,-undefined,dynamic_lookup"]


def _cpu(system: str, march: str) -> str:
    features = march.removeprefix("-march=armv8.2-a").replace("+fp16", "+fullfp16")
    return f"-mcpu={CPU[system]}{features}"


def write_tools(system: str, directory: Path) -> Path:
    """Executables for CMake that run this file; gives their directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for tool in ("cc", "c++", "ar", "ranlib"):
        (directory / tool).write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {system} {tool} "$@"\n'
        )
        (directory / tool).chmod(0o755)
    return directory


if __name__ == "__main__":
    command = arguments(sys.argv[1], sys.argv[2], sys.argv[3:])
    sys.exit(subprocess.run([sys.executable, "-m", "ziglang", *command], check=False).returncode)

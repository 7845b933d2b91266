"""Zig as the compiler and linker that CMake expects for macOS: `zig.py c++|cc|ar|ranlib ARGUMENT...`

Three things differ from Apple's tools. Zig spells -march its own way. It would link its own libc++ beside the system's, so linking is done as C against the
libraries in SPECFAST_TBD. Its bundles (MH_BUNDLE) are broken files; Python loads a dynamic library as well.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

TARGET = ["-target", "aarch64-macos.14.0", "-fno-sanitize=all"]
REPLACED = {"-bundle": "-shared", "-dynamiclib": "-shared"}
FEATURES = {"armv8.2-a": "apple_m1", "fp16": "fullfp16"}
DROPPED = ("-Wl,@", "-Wl,-x", "-Wl,-S", "-Wl,-headerpad", "-Wl,-search_paths_first", "-Wl,-dead_strip")


def arguments(tool: str, given: list[str]) -> list[str]:
    """Zig's command line for the one CMake gave."""
    if tool in ("ar", "ranlib"):
        return [tool, *given]
    given = re.sub(
        r"(?:-Xlinker\n)?-framework\n(?:-Xlinker\n)?\w+\n", "", "".join(a + "\n" for a in given)
    ).splitlines()  # MLX binds them
    kept = [REPLACED.get(a, a) for a in given if not a.startswith(DROPPED) and "/Xcode" not in a]
    kept = [
        "-mcpu=" + "+".join(FEATURES.get(f, f) for f in a[7:].split("+")) if a.startswith("-march=") else a
        for a in kept
    ]
    if "-c" in given or "-E" in given or not {"-bundle", "-dynamiclib", "-shared"} & set(given):
        return [tool, *TARGET, *kept]
    libraries = [str(tbd) for tbd in sorted(Path(os.environ["SPECFAST_TBD"]).glob("*.tbd"))]
    return ["cc", *TARGET, *kept, *libraries, "-Wl,-undefined,dynamic_lookup"]


if __name__ == "__main__":
    sys.exit(
        subprocess.run([sys.executable, "-m", "ziglang", *arguments(sys.argv[1], sys.argv[2:])], check=False).returncode
    )

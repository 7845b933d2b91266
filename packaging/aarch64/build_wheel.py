"""Cross-builds the manylinux wheel for aarch64 with zig: `build_wheel.py DIRECTORY`, run by `make wheel-aarch64`.

Needs scikit-build-core, nanobind, ninja, wheel and ziglang installed where it runs. Python's headers are this machine's: both are LP64.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cross_wheel

GLIBC = (2, 28)  # of zig.TARGETS


def build(target: Path) -> Path:
    """The wheel, in `target`."""
    suffix = f"cpython-{sys.version_info.major}{sys.version_info.minor}-aarch64-linux-gnu"
    made = cross_wheel.build("aarch64", suffix, "linux-aarch64", {}, {})
    tag = f"--platform-tag=manylinux_{GLIBC[0]}_{GLIBC[1]}_aarch64"
    command = [sys.executable, "-m", "wheel", "tags", "--remove", tag, str(made)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = made.parent.glob("*.whl")
    return Path(shutil.copy(wheel, target))


def problems(wheel: Path) -> list[str]:
    """Whether its extension is an aarch64 one that needs nothing newer than its tag says."""
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
        (extension,) = Path(directory).rglob("_core*.so")
        text = subprocess.run(["readelf", "-hdV", extension], capture_output=True, text=True, check=True).stdout
    found = [] if "AArch64" in text else ["the extension is not for AArch64"]
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", text)}
    found += [f"needs glibc {'.'.join(map(str, v))}" for v in versions if v > GLIBC]
    libraries = set(re.findall(r"NEEDED.*\[(.*)\]", text))
    allowed = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-aarch64.so.1"}
    return found + [f"needs {library}" for library in sorted(libraries - allowed)]


if __name__ == "__main__":
    built = build(Path(sys.argv[1]))
    bad = problems(built)
    print(built, *bad, sep="\n")
    sys.exit(bool(bad))

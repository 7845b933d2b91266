"""Fetches MLX's macOS wheels into build/, for its headers, its library's symbols and its Metal kernels.

They are third-party files that are only read: nothing of them is committed or put into our wheels.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

VERSION = "0.32.4"
BUILD = Path(__file__).parents[2] / "build"


class FetchError(RuntimeError):
    """The wheels could not be downloaded."""


def unpacked() -> Path:
    """The directory that holds `mlx/`, downloaded and unpacked the first time.

    Raises FetchError without a network.
    """
    target = BUILD / f"mlx-{VERSION}-macos"
    if (target / "complete").exists():
        return target
    wheels = BUILD / f"mlx-{VERSION}-macos-wheels"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--retries=1",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(wheels),
    ]
    command += [
        "--platform",
        "macosx_14_0_arm64",
        "--python-version",
        "3.11",
        f"mlx=={VERSION}",
        f"mlx-metal=={VERSION}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(f"MLX's macOS wheels: {done.stderr.strip()[-300:]}")
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target, [name for name in archive.namelist() if not name.endswith(".metallib")])
    (target / "complete").touch()
    return target


if __name__ == "__main__":
    print(unpacked())

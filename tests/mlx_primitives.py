"""Builds specfast._mlx against the mlx of this Python, and puts it beside the installed specfast for as long as it is needed."""

import contextlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(directory):
    """The extension's path; a build that is there is brought up to date."""
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    nanobind = pytest.importorskip("nanobind", reason="needs nanobind")
    options = {
        "SPECFAST_MLX": "ON",
        "SKBUILD_PROJECT_VERSION": importlib.metadata.version("specfast"),
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": nanobind.cmake_dir(),
    }
    configure = ["cmake", "-S", ROOT, "-B", directory, *(f"-D{name}={value}" for name, value in options.items())]
    for command in (configure, ["cmake", "--build", directory, "--target", "_mlx", "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (path,) = directory.glob("_mlx.*")
    return path


def load(path):
    """Imports a built extension as specfast._mlx."""
    import mlx.core  # noqa: F401  # libmlx is found because it is there

    spec = importlib.util.spec_from_file_location("specfast._mlx", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["specfast._mlx"] = module
    return module


@contextlib.contextmanager
def installed(path):
    """With specfast._mlx as if it had been installed, if it is not; models accelerated before keep their path."""
    from specfast.mlx import primitives

    if not primitives.why_not():
        yield
        return
    load(path)
    primitives._load.cache_clear()
    try:
        assert primitives.why_not() == ""
        yield
    finally:
        del sys.modules["specfast._mlx"]
        primitives._load.cache_clear()


if __name__ == "__main__":  # the extension, then pytest's arguments: runs tests in an installation that has it
    load(sys.argv[1])
    sys.exit(pytest.main(sys.argv[2:]))

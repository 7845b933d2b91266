"""Builds this project's wheel for another system, with zig as its compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import zig

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def build(
    system: str, suffix: str, platform: str, environment: Mapping[str, str], defines: Mapping[str, object]
) -> Path:
    """The wheel, alone in a folder of build/.

    Args:
        system: of zig.TARGETS; a folder beside this file has its toolchain.cmake.
        suffix: of extension modules there, without `.so`.
        platform: as sysconfig names it there.
        environment, defines: variables and CMake's definitions, beside those every system needs.
    """
    work = ROOT / "build" / system
    made = work / "made"
    shutil.rmtree(made, ignore_errors=True)
    variables = {
        **os.environ,
        "SPECFAST_TOOLS": str(zig.write_tools(system, work / "tools")),
        "_PYTHON_HOST_PLATFORM": platform,
        "SETUPTOOLS_EXT_SUFFIX": f".{suffix}.so",
        **environment,
    }
    definitions = {
        "CMAKE_TOOLCHAIN_FILE": HERE / system / "toolchain.cmake",
        "NB_SUFFIX": f".{suffix}.so",
        "SKBUILD_SOABI": suffix,
        "Python_INCLUDE_DIR": sysconfig.get_path("include"),
        **defines,
    }
    for extension in (work / "cmake").glob("*.so"):  # linked anew: libraries may have changed
        extension.unlink()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    command += [f"--wheel-dir={made}", f"--config-settings=build-dir={work / 'cmake'}"]
    command += [f"--config-settings=cmake.define.{name}={value}" for name, value in definitions.items()]
    subprocess.run([*command, str(ROOT)], env=variables, check=True)
    (wheel,) = made.glob("*.whl")
    return wheel

"""The text of a Metal program: one file with what it includes, and the instantiations that are wanted."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import ConfigurationError
from .launches import Kernel

_FOLDERS = (Path(__file__).parent, Path(__file__).parents[3] / "metal")  # installed, and in a checkout
_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.M)


@functools.cache
def source(stem: str) -> str:
    """The self-contained text of metal/<stem>.metal: templates and kernels, nothing instantiated, ASCII.

    With SPECFAST_NO_ENTRY defined before it there are no kernels, only the functions <kernel>_impl that they call.

    Raises:
        ConfigurationError: there is no such file.
    """
    included: set[str] = set()

    def read(name: str) -> str:
        if name in included:
            return ""
        included.add(name)
        path = next((folder / name for folder in _FOLDERS if (folder / name).is_file()), None)
        if path is None:
            raise ConfigurationError(f"there is no Metal source {name} in {' or '.join(map(str, _FOLDERS))}")
        return _INCLUDE.sub(lambda found: read(found[1]), path.read_text("ascii").replace("#pragma once\n", ""))

    return read(f"{stem}.metal")


def program(kernels: Iterable[Kernel]) -> str:
    """The text of a library that has these kernels, all of one file, by their host names."""
    wanted = list(dict.fromkeys(kernels))
    (stem,) = {kernel.stem for kernel in wanted}
    return source(stem) + "\n" + "".join(kernel.instantiation for kernel in wanted)

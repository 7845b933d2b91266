"""What a figure depends on besides the code: the processor, the threads, the versions."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _core

CPUINFO = Path("/proc/cpuinfo")
_NUMBERS = (("cpu family", "model"), ("CPU implementer", "CPU part"))  # x86, Arm


@dataclass(frozen=True)
class Cpu:
    """A processor.

    Attributes:
        name: as the system gives it; virtual machines may give generations of processors one name.
        numbers: family and model of x86 ("25-17"), implementer and part of Arm ("0x41-0xd0c"), "" where nothing tells.
    """

    name: str
    numbers: str = ""


def read_cpuinfo(text: str) -> Cpu:
    """The first processor in the text of /proc/cpuinfo; its name is "" where that is not told."""
    first = text.split("\n\n", 1)[0]
    lines = (line.partition(":") for line in first.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    told = ([fields[name] for name in names] for names in _NUMBERS if all(fields.get(name) for name in names))
    return Cpu(fields.get("model name", ""), "-".join(next(told, [])))


def cpu() -> Cpu:
    """This machine's processor."""
    found = read_cpuinfo(CPUINFO.read_text()) if CPUINFO.is_file() else Cpu("")
    return Cpu(found.name or _brand() or platform.processor() or platform.machine(), found.numbers)


def _brand() -> str:
    """The name macOS gives; `platform` says arm for every generation there."""
    if platform.system() != "Darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def environment() -> dict[str, Any]:
    """For the record of a figure."""
    info, processor = _core.build_info(), cpu()
    return {
        "version": info["version"], "compiler": info["compiler"], "threads": _core.start_threads(), "cpu": processor.name,
        "cpu_numbers": processor.numbers, "python": platform.python_version(), "numpy": importlib.metadata.version("numpy"),
    }  # fmt: skip

"""What the figures were measured on: CPU and instruction sets, memory, and how much other programs disturbed the run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from specfast import _core
from specfast.bench.machine import cpu

_FLAGS = ("avx", "fma", "f16c", "amx", "asimd", "i8mm", "sve")


class Counted(Protocol):
    """A process whose CPU seconds are known."""

    busy_seconds: float


def describe() -> dict[str, Any]:
    """The machine, for the record."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu().name,
        "cpu_flags": " ".join(sorted(f for f in flags.partition(":")[2].split() if f.startswith(_FLAGS))),
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "compiler": _core.build_info()["compiler"],
    }


def _busy_seconds() -> float | None:
    """CPU seconds all programs have used since boot, where the system tells."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _, _, irq, soft, *_ = (int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Tells, at the end of a run, which share of the cores programs outside it took."""

    def __init__(self, workers: Sequence[Counted]) -> None:
        self.workers, self.start = workers, time.monotonic()
        self.busy, self.own = _busy_seconds(), self._own()

    def _own(self) -> float:
        return time.process_time() + sum(worker.busy_seconds for worker in self.workers)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def others_percent(self) -> float | None:
        """Percent of all cores, or None where it is not known."""
        busy = _busy_seconds()
        if busy is None or self.busy is None:
            return None
        others = busy - self.busy - (self._own() - self.own)
        return round(max(0.0, 100 * others / (self.elapsed() * (os.cpu_count() or 1))), 1)

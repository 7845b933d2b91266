"""Interleaved timing: every repetition gives each peer one turn, in a rotated order, and measures the machine in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import machine
import numpy as np
from specfast import _core
from worker import Worker

FEWEST_REPEATS = 3
_READ_BYTES = 1 << 28  # far more than a last-level cache


@dataclass
class Lane:
    """One peer with one model, the row counts it is asked for, and its seconds per row count."""

    worker: Worker
    rows: list[int]
    seconds: dict[int, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.worker.engine} {self.worker.shape}"

    def record(self) -> dict[str, Any]:
        """For JSON: milliseconds, and how much the process computed while others were measured."""
        rows = []
        for M in self.rows:
            p10, median, p90 = (round(1e3 * float(x), 3) for x in np.percentile(self.seconds[M], [10, 50, 90]))
            rows.append({"rows": M, "repeats": len(self.seconds[M]), "p10_ms": p10, "median_ms": median, "p90_ms": p90})
        idle = 100 * self.worker.idle_cpu_seconds / max(self.worker.idle_seconds, 1e-9)
        return {"about": self.worker.about, "idle_cpu_percent": round(idle, 3), "times": rows}


@dataclass
class Conditions:
    """The machine during the run: bandwidth (median, p10, p90), median peak, and the share of the CPU that other programs took."""

    read_bandwidth_gb_s: float
    read_p10_gb_s: float
    read_p90_gb_s: float
    peak_gmac_s: float
    others_cpu_percent: float | None
    seconds: float


def rotated(items: list[Any], by: int) -> list[Any]:
    """The items from position `by` on, cyclically."""
    by %= max(len(items), 1)
    return items[by:] + items[:by]


def takes_part(repeat: int, wanted: int, repeats: int) -> bool:
    """Whether a lane with fewer turns has one in this repetition: `wanted` of them, spread over `repeats`."""
    return (repeat + 1) * wanted // repeats > repeat * wanted // repeats


def take_turns(lanes: list[Lane], repeats: int, budget_seconds: float, say: Callable[[str], None]) -> Conditions:
    """Fills the lanes' seconds. The first turn of each is a warm-up; it also finds who is too slow for every repetition.

    A lane whose turns would take longer than the budget in all has fewer of them, 3 at least.
    """
    wanted = []
    for lane in lanes:
        start = time.monotonic()
        lane.worker.turn(lane.rows)
        lane.seconds = {M: [] for M in lane.rows}
        turn = time.monotonic() - start
        wanted.append(min(repeats, max(FEWEST_REPEATS, int(budget_seconds / turn))))
        say(f"{lane.name}: {turn:.2f} s a turn, {wanted[-1]} turns")
    for lane in lanes:
        lane.worker.idle_seconds = lane.worker.idle_cpu_seconds = 0.0
    buffer = np.resize(np.random.default_rng(0).integers(0, 256, 1 << 22, dtype=np.uint8), _READ_BYTES)
    bandwidth: list[float] = []
    peak: list[float] = []
    watch = machine.Watch([lane.worker for lane in lanes])
    for repeat in range(repeats):
        _core.read_bandwidth(buffer)  # as with every peer, the first pass wakes the threads
        bandwidth.append(_core.read_bandwidth(buffer, 2))
        peak.append(_core.peak_dot("int8", None, 10.0))
        for turns, lane in rotated(list(zip(wanted, lanes, strict=True)), repeat):
            if takes_part(repeat, turns, repeats):
                rows = rotated(lane.rows, repeat)
                for M, seconds in zip(rows, lane.worker.turn(rows), strict=True):
                    lane.seconds[M].append(seconds)
        say(f"repetition {repeat + 1} of {repeats}")
    p10, middle, p90 = (round(float(x), 1) for x in np.percentile(bandwidth, [10, 50, 90]))
    return Conditions(
        middle, p10, p90, round(float(np.median(peak)), 1), watch.others_percent(), round(watch.elapsed(), 1)
    )

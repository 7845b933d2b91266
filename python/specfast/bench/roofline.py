"""T(M): the time of a forward pass that checks M rows, beside the roofline of the same minute on the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _core
from ..errors import ConfigurationError

Progress = Callable[[int, int], None]
SPARE_POSITIONS = 32  # of the cache, for the rows of a pass
_READ_BYTES = 1 << 28  # far more than a last-level cache


@dataclass(frozen=True)
class RowTimes:
    """Times of passes with M rows, in milliseconds, and what they are compared with."""

    rows: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio_to_1: float
    weight_gb_s: float
    roofline_ms: float
    ratio_to_roofline: float


@dataclass(frozen=True)
class Roofline:
    """A measurement of one model; R(M) = max(bytes / bandwidth, multiply-adds / peak)."""

    read_bandwidth_gb_s: float
    peak_gmac_s: float
    weight_bytes: int
    kv_bytes: int
    macs_per_row: float
    context: int
    rows: list[RowTimes]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "rows": [vars(row) for row in self.rows]}


def check_rows(rows: Sequence[int]) -> None:
    """Refuses row counts that no pass has.

    Raises:
        ConfigurationError: none, or one outside 1 to 21.
    """
    if any(not 1 <= m <= 21 for m in rows) or not rows:
        raise ConfigurationError(f"row counts {list(rows)} must lie in 1 to 21 (gamma + 1)")


def measure_rows(
    model: _core.Model, rows: Sequence[int], context: int, *, repeats: int = 9, progress: Progress | None = None
) -> Roofline:
    """Times forward passes of M rows with logits for all of them at a filled context.

    The passes form a dependent chain (each one's first token is what the one before it chose), the row counts take turns, and
    bandwidth and multiply-add rate are measured in between, because all of them drift on shared machines.

    Raises:
        ConfigurationError: a row count outside 1 to 21, or a context that does not fit.
    """
    check_rows(rows)
    if not 1 <= context <= model.max_context - SPARE_POSITIONS:
        raise ConfigurationError(f"a context of {context} is outside 1 to {model.max_context - SPARE_POSITIONS}")
    counts = sorted({1, *rows})
    random = np.random.default_rng(1)
    cache = _core.Cache(model, context + SPARE_POSITIONS)
    model.prefill(cache, random.integers(0, model.vocab, context).astype(np.int32))
    greedy, proposal = _core.Law(temperature=0.0), _core.Proposal()
    buffer = np.resize(random.integers(0, 256, 1 << 22, dtype=np.uint8), _READ_BYTES)
    seconds: dict[int, list[float]] = {m: [] for m in counts}
    bandwidth, peak, token = [], [], 1
    for repeat in range(-1, repeats):  # the first turn is a warm-up
        bandwidth.append(_core.read_bandwidth(buffer))
        peak.append(_core.peak_dot(model.precision, model.isa, 10.0))
        for m in counts:
            proposal.set_tokens(((token + 977 * np.arange(1, m)) % model.vocab).astype(np.int32))
            pending = np.array([token], dtype=np.int32)
            start = time.perf_counter()
            verdict = model.verify(cache, pending, proposal, greedy, 1.0, 0, 0)
            elapsed = time.perf_counter() - start
            cache.rollback()
            token = verdict.next_token
            if repeat >= 0:
                seconds[m].append(elapsed)
        if progress:
            progress(repeat + 2, repeats + 1)
    return _summarise(model, counts, seconds, float(np.median(bandwidth)), float(np.median(peak)), context)


def _summarise(
    model: _core.Model,
    counts: Sequence[int],
    seconds: dict[int, list[float]],
    bandwidth: float,
    peak: float,
    context: int,
) -> Roofline:
    kv = model.kv_bytes_per_position * context
    macs = model.macs_per_row
    one = float(np.median(seconds[1]))
    table = []
    for m in counts:
        p10, median, p90 = (float(x) for x in np.percentile(seconds[m], [10, 50, 90]))
        roofline = max((model.weight_bytes + kv) / bandwidth, m * macs / peak) / 1e9
        table.append(
            RowTimes(
                rows=m, median_ms=median * 1e3, p10_ms=p10 * 1e3, p90_ms=p90 * 1e3, ratio_to_1=median / one,
                weight_gb_s=model.weight_bytes / median / 1e9, roofline_ms=roofline * 1e3, ratio_to_roofline=median / roofline,
            )
        )  # fmt: skip
    return Roofline(bandwidth, peak, model.weight_bytes, kv, macs, context, table)

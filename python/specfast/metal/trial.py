"""What a trial of the Metal kernels says: a few rows against a host's own layers, and against the same rows in other company."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from .launches import MAX_ROWS, Activations

# The most that rounding may do: rms of a row's difference over its deviation. Values that have nothing to do with each other
# are 1.4 apart. MLX may multiply float32 matrices with 11 bits, float16's.
LIMITS: dict[Activations, float] = {"f32": 0.05, "f16": 0.05, "bf16": 0.25}
ROWS = MAX_ROWS
CUTS = ((0, ROWS), (0, 4, 8, ROWS))
"""Passes of 9 rows, and of 4, 4 and 1."""


def difference(
    expected: npt.NDArray[np.float32],
    whole: npt.NDArray[np.float32],
    parts: npt.NDArray[np.float32],
    activations: Activations,
    *,
    host: str,
    what: str = "logits",
) -> str:
    """What is wrong with the results of 9 rows in one pass and in several; "" for nothing.

    Args:
        expected: by the host's layers, (9, n).
        whole: by the kernels in one pass; values of a narrower type widened.
        parts: by the kernels in the passes of CUTS[1].
        activations: their type, for the limit.
        host: whose layers, in words.
        what: the values, in words.
    """
    if not np.isfinite(expected).all():
        return f"{what} of {host} are not finite, so that nothing can be compared: the weights hold NaN, or values too large for {activations}"
    wild = sum(int((~np.isfinite(values)).sum()) for values in (whole, parts))
    if wild:
        return f"{wild} of {whole.size + parts.size} {what} are not finite, and none may be"
    limit = LIMITS[activations]
    distance = max(_distance(values, expected) for values in (whole, parts))
    if not distance <= limit:
        return (
            f"{what} are {distance:.3g} of their deviation away from those of {host}, more than the {limit:g} that rounding "
            f"to {activations} can explain: they are wrong"
        )
    same = whole.view(np.uint32) == parts.view(np.uint32)
    for first, end in itertools.pairwise(CUTS[1]):
        if not same[first:end].all():
            most = float(np.abs(whole - parts)[first:end].max())
            return (
                f"a row of a pass of {end - first} has other bits than in a pass of {ROWS} ({what} up to {most:.3g} apart, but none may be): "
                "text would change with the number of drafts"
            )
    return ""


def _distance(values: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """The largest of the rows' rms differences over the row's deviation."""
    rms = np.sqrt(np.square(values - expected, dtype=np.float64).mean(axis=1))
    return float((rms / expected.std(axis=1, dtype=np.float64)).max())

"""docs/peers.svg: T(M), and T(M)/T(1), of every engine against M."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

STYLE = {
    "specfast": ("#0b6e4f", "o"),
    "llama.cpp": ("#c8553d", "s"),
    "OpenVINO": ("#2f5d9b", "^"),
    "MLX": ("#7a6c5d", "D"),
}


def draw(path: Path, record: Mapping[str, Any], shape: str) -> bool:
    """Writes the SVG for one shape of a record; False where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: PLC0415
    except ImportError:
        return False
    matplotlib.use("svg")
    import matplotlib.pyplot as plt  # noqa: PLC0415
    import report  # noqa: PLC0415

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "peers", "font.size": 10})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4))
    lanes = [lane for lane in record["lanes"] if lane["shape"] == shape]
    for lane in lanes:
        colour, marker = STYLE.get(lane["engine"], (None, "x"))
        rows = [row["rows"] for row in lane["times"]]
        medians, low, high = ([row[key] for row in lane["times"]] for key in ("median_ms", "p10_ms", "p90_ms"))
        left.plot(rows, medians, marker, ls="-", ms=4, color=colour, label=lane["engine"])
        left.fill_between(rows, low, high, color=colour, alpha=0.18, lw=0)
        right.plot(rows, [x / medians[0] for x in medians], marker, ls="-", ms=4, color=colour)
        if "macs_per_row" in lane["about"]:
            bound = [report.roofline_ms(record, lane, M) for M in rows]
            left.plot(rows, bound, "--", color="#888888", label="R(M) of specfast's weights")
            right.plot(rows, [x / bound[0] for x in bound], "--", color="#888888")
    left.set(title="milliseconds of a pass", xlabel="M rows, logits of all", yscale="log")
    right.set(title="T(M) / T(1)", xlabel="M rows, logits of all", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"{shape}, 4 bits, context {record['context']}, {record['threads']} threads of {record['machine']['cpu']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True

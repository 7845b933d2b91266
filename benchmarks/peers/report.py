"""The Markdown of docs/peers.md, rendered from the records of runs; it computes nothing a record does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import speculation
from specfast.bench.shapes import find_shape

Record = Mapping[str, Any]

INTRODUCTION = """# specfast beside its peers

Written by `python benchmarks/peers/run.py` from its measurements (`peers.json`); do not edit. Every engine has random weights of the same
shape at 4 bits and the same filled context. A pass computes M rows **with the logits of all M rows**, which is what checking M - 1 drafted
tokens needs. Engines take turns within one run, each in a process of its own that sleeps in a read while it is not its turn; what such
processes still computed is given as idle CPU. All processes may use transparent huge pages (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`), as
specfast's weights do anyway. Rolling the KV cache back is not timed, which favours OpenVINO, whose state has no
trimming. specfast's pass is its `verify`: besides the logits it takes the greedy decision.
"""

COMPUTED = """**Computed, not run**, from the passes measured above: a round is gamma one-row passes of the draft and one target pass of gamma + 1
rows, and gives (1 - a^(gamma + 1)) / (1 - a) tokens at acceptance a. Sampling, roll-back and the draft's own catching up are taken to cost
nothing, for every engine. `specfast bench --speculate` runs specfast's rounds for real.
"""


def roofline_ms(record: Record, lane: Record, M: int) -> float:
    """R(M) of a lane: the larger of bytes (weights, and keys and values of 16 bits) over bandwidth and multiply-adds over peak."""
    shape, conditions = find_shape(lane["shape"]), record["conditions"]
    kv = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim * record["context"]
    memory = (lane["about"]["weight_bytes"] + kv) / conditions["read_bandwidth_gb_s"]
    return float(max(memory, M * lane["about"]["macs_per_row"] / conditions["peak_gmac_s"]) / 1e6)


def _times(lane: Record) -> dict[int, Record]:
    return {row["rows"]: row for row in lane["times"]}


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def rows_table(record: Record, shape: str) -> str:
    """T(M) of every engine at a shape: median, p10 to p90, and the ratio to its own T(1)."""
    lanes = [lane for lane in record["lanes"] if lane["shape"] == shape]
    own = next((lane for lane in lanes if "macs_per_row" in lane["about"]), None)
    head = ["M", *(["R(M) of specfast"] if own else []), *(lane["engine"] for lane in lanes)]
    body = []
    for M in sorted({row["rows"] for lane in lanes for row in lane["times"]}):
        line = [str(M), *([f"{roofline_ms(record, own, M):.1f}"] if own else [])]
        for lane in lanes:
            times = _times(lane)
            if M in times:
                t = times[M]
                ratio = f", {t['median_ms'] / times[1]['median_ms']:.2f}" if 1 in times else ""
                line.append(f"{t['median_ms']:.1f} ({t['p10_ms']:.1f} .. {t['p90_ms']:.1f}){ratio}")
            else:
                line.append("")
        body.append(line)
    return _table(head, body)


def engines_table(record: Record) -> str:
    """What each engine was: version, weights, bytes, repeats, and idle CPU."""
    body = []
    for lane in record["lanes"]:
        about, times = lane["about"], _times(lane)
        one = times[min(times)]
        body.append(
            [
                lane["engine"], lane["shape"], about["version"], about["weights"], f"{about['weight_bytes'] / 1e6:.0f} MB",
                f"{about['weight_bytes'] / one['median_ms'] / 1e6:.1f}", str(one["repeats"]), f"{lane['idle_cpu_percent']:.2f} %",
            ]
        )  # fmt: skip
    return _table(
        ["engine", "shape", "version", "weights", "bytes a pass", "GB/s at M = 1", "repeats", "idle CPU"], body
    )


def speculation_table(record: Record) -> str:
    """Tokens per second at every gamma for the engines that have a draft and a target, and their best."""
    found = {}
    for engine in dict.fromkeys(lane["engine"] for lane in record["lanes"]):
        times = {lane["shape"]: _times(lane) for lane in record["lanes"] if lane["engine"] == engine}
        if {record["shape"], record["draft_shape"]} <= times.keys():
            target = {M: row["median_ms"] for M, row in times[record["shape"]].items()}
            draft = times[record["draft_shape"]][1]["median_ms"]
            found[engine] = speculation.speeds(draft, target, record["acceptance"])
    by_gamma = {engine: {speed.gamma: speed for speed in speeds} for engine, speeds in found.items()}
    body = []
    for gamma in sorted(set().union(*by_gamma.values())):
        cells = []
        for engine, speeds in by_gamma.items():
            text = f"{speeds[gamma].tok_s:.2f} ({speeds[gamma].tok_s / speeds[0].tok_s:.2f})" if gamma in speeds else ""
            cells.append(f"**{text}**" if gamma == speculation.best(found[engine]).gamma else text)
        tokens = speculation.expected_tokens(record["acceptance"], gamma)
        body.append([str(gamma) if gamma else "plain", f"{tokens:.2f}", *cells])
    table = _table(["gamma", "tokens a round", *(f"{engine}, tokens/s (to its plain)" for engine in found)], body)
    best = {engine: speculation.best(speeds) for engine, speeds in found.items()}
    return (
        table
        + "\nBest: "
        + "; ".join(f"{e} {s.tok_s:.2f} tokens/s at gamma {s.gamma}" for e, s in best.items())
        + ".\n"
    )


def section(record: Record) -> str:
    """One run's part of the document."""
    machine, conditions = record["machine"], record["conditions"]
    others = conditions["others_cpu_percent"]
    disturbance = "" if others is None else f"; other programs took {others} percent of the CPU"
    parts = [
        f"## {record['name']}\n\n`{record['command']}`, {record['date']}, specfast commit {record['commit']}.\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, {record['threads']} threads, {machine['memory_gb']:.0f} GB, {machine['system']}, "
        f"Python {machine['python']}; {machine['cpu_flags']}.\n\n"
        f"Context {record['context']}, medians of {record['repeats']} repetitions (repeats below, where fewer). Same run: "
        f"{conditions['read_bandwidth_gb_s']:.1f} GB/s read ({conditions['read_p10_gb_s']:.1f} .. {conditions['read_p90_gb_s']:.1f}), {conditions['peak_gmac_s']:.0f} GMAC/s int8, "
        f"{conditions['seconds']:.0f} seconds{disturbance}.\n"
    ]
    for shape in dict.fromkeys(lane["shape"] for lane in record["lanes"]):
        parts.append(f"T(M) in milliseconds at {shape}: median (p10 .. p90), T(M)/T(1).\n\n{rows_table(record, shape)}")
    parts.append(engines_table(record))
    parts += [f"Not measured: {reason}.\n" for reason in record["left_out"]]
    if "acceptance" in record:
        parts.append(
            f"### Speculation at acceptance {record['acceptance']:g}\n\n{COMPUTED}\n{speculation_table(record)}"
        )
    return "\n".join(parts)


def document(records: Mapping[str, Record], plot: str | None) -> str:
    """The whole file; `plot` is an image beside it."""
    parts = [INTRODUCTION]
    if plot:
        parts.append(f"![T(M) and T(M)/T(1) of every engine]({plot})\n")
    return "\n".join([*parts, *(section(records[name]) for name in sorted(records))])

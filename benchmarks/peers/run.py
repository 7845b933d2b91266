"""Measures specfast beside llama.cpp, OpenVINO and MLX in one interleaved run, and writes docs/peers.md and docs/peers.svg."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
import plot
import report
from engines import ENGINES
from specfast import _core
from specfast.bench.shapes import SHAPES
from turns import Lane, take_turns
from worker import PeerError, Worker

ROOT = Path(__file__).parents[2]
TARGET, DRAFT = "llama-3.1-8b", "llama-3.2-1b"
PLOTTED = "llama-3.2-1b"
EPILOG = f"""setting up:
  pip install -r benchmarks/peers/requirements.txt && pip install .
  (llama-cpp-python compiles llama.cpp: minutes. For this CPU's instructions: CMAKE_ARGS=-DGGML_NATIVE=ON pip install ...)
A peer whose package is missing is left out, with a line that says what to install.

examples:
  python benchmarks/peers/run.py --prepare                      make the model files and stop
  python benchmarks/peers/run.py                                {PLOTTED}, all peers, M = 1..9
  python benchmarks/peers/run.py --shape {TARGET}           specfast and llama.cpp
  python benchmarks/peers/run.py --speculate                    {TARGET} with {DRAFT} as its draft
  python benchmarks/peers/run.py --peers specfast,llama.cpp --rows 1,5 --repeats 5 --docs build --json -

what is measured:
  T(M), a forward pass of M rows with the logits of all M rows, at a filled context. Each repetition gives every peer one turn, in
  rotated order; a turn is one untimed pass and one timed pass per M. Read bandwidth and the multiply-add rate are measured in
  every repetition; R(M) is the larger of bytes over the one and multiply-adds over the other. Run it on a quiet machine: the
  share of the CPU that other programs took is recorded. Times are taken inside each peer's process.

what is written:
  docs/peers.json keeps the last run of every kind; docs/peers.md and docs/peers.svg are rendered from it.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = [name for name in SHAPES if name.startswith("llama")]
    parser.add_argument("--shape", choices=shapes, help=f"({PLOTTED}; {TARGET} with --speculate)")
    parser.add_argument("--peers", default=",".join(ENGINES), metavar="NAME,...", help=f"({','.join(ENGINES)})")
    parser.add_argument("--rows", default="1,2,3,4,5,6,7,8,9", metavar="M,...", help="row counts (1,2,...,9)")
    parser.add_argument("--context", type=int, default=512, metavar="N", help="positions in the cache (512)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="repetitions (20)")
    parser.add_argument(
        "--budget", type=float, default=110, metavar="SECONDS", help="of one peer's turns; slower ones have fewer, 3 at least (110)"
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=_core.num_threads(), metavar="N", help="of every peer (all cores)"
    )
    parser.add_argument(
        "--speculate", action="store_true", help="the target --shape with a draft; computes tokens per second for gamma 1 to the last row count less 1"
    )  # fmt: skip
    parser.add_argument("--draft-shape", choices=shapes, default=DRAFT, help=f"({DRAFT})")
    parser.add_argument("--acceptance", type=float, default=0.8, metavar="P", help="of a drafted token (0.8)")
    parser.add_argument("--prepare", action="store_true", help="make the model files and stop")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "build" / "peers", metavar="DIR", help="model files (build/peers)"
    )
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="where to write (docs)")
    parser.add_argument("--json", metavar="FILE", help="also write this run's record (- for stdout)")
    options = parser.parse_args(arguments)
    options.shape = options.shape or (TARGET if options.speculate else PLOTTED)
    options.peers = options.peers.split(",")
    unknown = [name for name in options.peers if name not in ENGINES]
    if unknown:
        parser.error(f"--peers: {', '.join(unknown)} is unknown; choose of {', '.join(ENGINES)}")
    try:
        options.rows = sorted({1, *(int(text) for text in options.rows.split(","))})
    except ValueError:
        parser.error(f"--rows {options.rows!r} is not a list of integers such as 1,2,4")
    if not 1 <= options.rows[0] <= options.rows[-1] <= 21:
        parser.error(f"--rows must lie in 1 to 21, but are {options.rows}")
    if options.context < 1 or options.repeats < 1 or options.threads < 1 or not 0 <= options.acceptance <= 1:
        parser.error("--context, --repeats and --threads must be 1 or more, and --acceptance in 0 to 1")
    return options


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def choose(options: argparse.Namespace) -> tuple[list[tuple[str, str]], list[str]]:
    """The (engine, shape) pairs to measure, and for each peer left out a sentence why."""
    shapes = [options.draft_shape, options.shape] if options.speculate else [options.shape]
    chosen, left_out = [], []
    for name in options.peers:
        engine = ENGINES[name]
        outside = [shape for shape in shapes if engine.only and shape not in engine.only]
        if engine.missing():
            left_out.append(engine.missing())
        elif outside:
            left_out.append(f"{name} at {outside[0]}: {engine.why}")
        else:
            chosen += [(name, shape) for shape in dict.fromkeys(shapes)]
    return chosen, left_out


def prepare(chosen: list[tuple[str, str]], cache: Path) -> None:
    """Makes missing model files, each in a process that ends with it."""
    for name, shape in chosen:
        say(f"{name} {shape}: model files")
        worker = Worker(name, shape, cache)
        try:
            worker.prepare()
        finally:
            worker.stop()


def measure(options: argparse.Namespace, chosen: list[tuple[str, str]], left_out: list[str]) -> dict[str, Any]:
    """The record of one run."""
    lanes: list[Lane] = []
    try:
        for name, shape in chosen:
            say(f"{name} {shape}: loading")
            only_one = options.speculate and shape == options.draft_shape != options.shape
            rows = [M for M in ([1] if only_one else options.rows) if not ENGINES[name].rows or M in ENGINES[name].rows]
            lanes.append(Lane(Worker(name, shape, options.cache), rows))
            lanes[-1].worker.start(options.context, options.threads)
        _core.set_num_threads(options.threads)
        conditions = take_turns(lanes, options.repeats, options.budget, say)
    finally:
        for lane in lanes:
            lane.worker.stop()
    record = {
        "name": f"{options.shape} with {options.draft_shape} as draft" if options.speculate else options.shape,
        "shape": options.shape, "command": " ".join(["python benchmarks/peers/run.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), "commit": commit(), "context": options.context,
        "threads": options.threads, "repeats": options.repeats, "machine": machine.describe(), "conditions": vars(conditions),
        "lanes": [{"engine": lane.worker.engine, "shape": lane.worker.shape, **lane.record()} for lane in lanes],
        "left_out": left_out,
    }  # fmt: skip
    if options.speculate:
        record |= {"draft_shape": options.draft_shape, "acceptance": options.acceptance}
    return record


def commit() -> str:
    """The checkout's commit, or `unknown` outside one."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(record: dict[str, Any], docs: Path) -> None:
    """Stores the record with those of other runs, and renders the document and the plot from all of them."""
    docs.mkdir(parents=True, exist_ok=True)
    stored = docs / "peers.json"
    records = json.loads(stored.read_text()) if stored.is_file() else {}
    records[record["name"]] = record
    stored.write_text(json.dumps(records, indent=1) + "\n")
    picture = docs / "peers.svg"
    shown = records.get(PLOTTED, record)
    if not plot.draw(picture, shown, shown["shape"]):
        say("no plot: pip install matplotlib")
    (docs / "peers.md").write_text(report.document(records, picture.name if picture.is_file() else None))
    say(f"wrote {docs / 'peers.md'}")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    chosen, left_out = choose(options)
    for reason in left_out:
        say(reason)
    if not chosen:
        say("nothing to measure")
        return 1
    try:
        started = time.monotonic()
        prepare(chosen, options.cache)
        if options.prepare:
            return 0
        record = measure(options, chosen, left_out)
    except PeerError as error:
        say(f"error: {error}")
        return 1
    say(f"measured in {time.monotonic() - started:.0f} s")
    write(record, options.docs)
    if options.json == "-":
        print(json.dumps(record, indent=1))
    else:
        print(report.section(record))
        if options.json:
            Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

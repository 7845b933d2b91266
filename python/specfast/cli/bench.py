"""`specfast bench`: T(M) against the machine's roofline, or speculation end to end, on real shapes."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import _core
from ..bench.random_model import QUANTS, random_model
from ..bench.roofline import Roofline, measure_rows
from ..bench.shapes import SHAPES, find_shape
from ..bench.speculate import SpeculationRun, measure_speculation
from ..errors import ConfigurationError

EPILOG = """examples:
  specfast bench --shape llama-3.2-1b --quant q4g64 --rows 1,2,4,6,8,9 --context 512 --json rows.json
  specfast bench --shape llama-3.2-1b --speculate --acceptance 0.8 --gamma 6

T(M) is a pass that checks M rows; R(M) is the larger of bytes over read bandwidth and multiply-adds over peak rate, both
measured in the same run. Weights are random: speed does not depend on them, and nothing is downloaded.
"""


def add_parser(commands: Any) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "bench",
        help="what checking M tokens costs here",
        description="Measures forward passes of real shapes with random weights.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--shape", default="llama-3.2-1b", metavar="SHAPE", help=f"{', '.join(SHAPES)}, demo, or a model directory"
    )
    parser.add_argument(
        "--quant", default="q4g64", choices=QUANTS, metavar="QUANT", help=f"{', '.join(QUANTS)} (q4g64)"
    )
    parser.add_argument("--rows", default="1,2,4,6,8,9", metavar="M,M,...", help="row counts, 1 to 21")
    parser.add_argument(
        "--context",
        type=int,
        default=None,
        metavar="N",
        help="positions already in the cache (512; 64 with --speculate)",
    )
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="timed passes per row count (9)")
    parser.add_argument("--threads", type=int, metavar="N", help="of native calls (all cores)")
    parser.add_argument("--isa", help="kernel table (the best this CPU runs)")
    parser.add_argument("--kv-bits", type=int, default=16, choices=(8, 16), help="of keys and values (16)")
    parser.add_argument("--in-place", action="store_true", help="no packed copy of the weights")
    parser.add_argument(
        "--speculate", action="store_true", help="plain against speculative decoding with a set acceptance"
    )
    parser.add_argument(
        "--acceptance", type=float, default=0.8, metavar="P", help="probability that a drafted token is right (0.8)"
    )
    parser.add_argument("--gamma", type=int, default=6, metavar="N", help="tokens drafted per round (6)")
    parser.add_argument(
        "--draft-shape", default="draft-128k", metavar="SHAPE", help="shape of the draft (draft-128k, 81 M parameters)"
    )
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="tokens to decode with --speculate (256)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file (- for stdout)")


def cpu_model() -> str:
    """The processor's name, for records and baselines."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    info = _core.build_info()
    return {
        "version": info["version"], "compiler": info["compiler"], "threads": _core.num_threads(), "cpu": cpu_model(),
        "python": platform.python_version(), "numpy": importlib.metadata.version("numpy"),
    }  # fmt: skip


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    if not sys.stderr.isatty():
        print(f"{title} ...", file=sys.stderr, flush=True)
        yield None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def run(options: argparse.Namespace) -> int:
    """Measures and prints."""
    if options.threads is not None:
        if not 1 <= options.threads <= 256:
            raise ConfigurationError(f"--threads is {options.threads}, but must be in 1 to 256")
        _core.set_num_threads(options.threads)
    if not 1 <= options.repeats <= 1000 or not 1 <= options.tokens <= 100_000:
        raise ConfigurationError("--repeats must be in 1 to 1000 and --tokens in 1 to 100000")
    try:
        rows = [int(text) for text in options.rows.split(",")]
    except ValueError:
        raise ConfigurationError(f"--rows {options.rows!r} is not a list of integers such as 1,2,4") from None
    shape = find_shape(options.shape)
    context = options.context if options.context is not None else 64 if options.speculate else 512
    with _bar(f"making random weights of {shape.name}") as progress:
        target = random_model(
            shape,
            options.quant,
            max_context=max(8192, context + 64),
            isa=options.isa,
            pack=not options.in_place,
            kv_bits=options.kv_bits,
            progress=progress,
        )
    record: dict[str, Any] = {
        "shape": shape.name,
        "quant": options.quant,
        "precision": target.precision,
        "kv_bits": target.kv_bits,
        "isa": target.isa,
        **environment(),
    }
    out = sys.stderr if str(options.json) == "-" else sys.stdout
    print(f"{shape.name} {options.quant}, {target.weight_bytes / 1e6:.0f} MB a pass, {target.precision} activations, "
          f"{target.kv_bits} bit keys and values, "
          f"{target.isa}, {_core.num_threads()} threads, random weights", file=out)  # fmt: skip
    if target.weight_bytes < 64 << 20:
        print(
            "note: these weights fit in a large last-level cache; the figures are not those of cold weights", file=out
        )
    if options.speculate:
        draft_shape = find_shape(options.draft_shape)
        draft = random_model(
            draft_shape,
            options.quant,
            max_context=max(8192, context + 64),
            seed=1,
            isa=options.isa,
            kv_bits=options.kv_bits,
        )
        with _bar("decoding") as progress:
            result = measure_speculation(
                target, draft, gamma=options.gamma, acceptance=options.acceptance, tokens=options.tokens, context=context, progress=progress,
            )  # fmt: skip
        record |= {"draft_shape": draft_shape.name, "context": context, "speculate": vars(result)}
        print_speculation(result, draft, out)
    else:
        with _bar("timing passes") as progress:
            roofline = measure_rows(target, rows, context, repeats=options.repeats, progress=progress)
        record |= roofline.as_dict()
        print_rows(roofline, out)
    if options.json:
        text = json.dumps(record, indent=1) + "\n"
        if str(options.json) == "-":
            sys.stdout.write(text)
        else:
            options.json.write_text(text, encoding="utf-8")
    return 0


def print_rows(result: Roofline, out: Any) -> None:
    """The table of T(M)."""
    print(
        f"context {result.context}; same run: {result.read_bandwidth_gb_s:.1f} GB/s read, {result.peak_gmac_s:.0f} GMAC/s",
        file=out,
    )
    print("   M   T(M) ms  (p10 .. p90)        T(M)/T(1)  weights GB/s  R(M) ms  T(M)/R(M)", file=out)
    for row in result.rows:
        print(
            f"{row.rows:4}  {row.median_ms:8.2f}  ({row.p10_ms:.2f} .. {row.p90_ms:.2f})".ljust(37)
            + f"{row.ratio_to_1:9.2f}  {row.weight_gb_s:12.1f}  {row.roofline_ms:7.2f}  {row.ratio_to_roofline:9.2f}",
            file=out,
        )


def print_speculation(result: SpeculationRun, draft: _core.Model, out: Any) -> None:
    """The speed panel."""
    print(
        f"random weights, acceptance set to {result.set_acceptance:g}: gamma {result.gamma}, draft {draft.weight_bytes / 1e6:.0f} MB a pass",
        file=out,
    )
    print(f"plain        {result.plain_tok_s:8.1f} tok/s", file=out)
    print(f"speculative  {result.speculative_tok_s:8.1f} tok/s, {result.speedup:.2f} times as fast, acceptance {result.acceptance:.2f}, "
          f"{result.tokens_per_target_pass:.2f} tokens per target pass", file=out)  # fmt: skip
    total = result.draft_seconds + result.verify_seconds + result.overhead_seconds
    print(f"time: draft {100 * result.draft_seconds / total:.0f} percent, verify {100 * result.verify_seconds / total:.0f} percent, "
          f"else {100 * result.overhead_seconds / total:.2f} percent; identical: {'yes' if result.identical else 'no'}", file=out)  # fmt: skip

"""`specfast bench`: T(M) against the machine's roofline, or speculation end to end, on real shapes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from .. import _core
from ..bench.machine import environment
from ..bench.random_model import QUANTS, check_groups, random_model
from ..bench.roofline import SPARE_POSITIONS, Roofline, check_rows, measure_rows
from ..bench.shapes import SHAPES, Shape, find_shape
from ..bench.speculate import SpeculationRun, check_terms, measure_speculation, positions_needed
from ..checkpoint import check_isa
from ..errors import ConfigurationError
from ..inference import set_threads

_ROWS: dict[str, Any] = {"rows": "1,2,4,6,8,9", "repeats": 9, "context": 512}
_SPECULATION: dict[str, Any] = {"acceptance": 0.8, "gamma": 6, "draft_shape": None, "tokens": 256, "context": 64}

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
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    isas = ", ".join(cast(list[str], _core.build_info()["isas_supported"]))
    parser.add_argument(
        "--shape", default="llama-3.2-1b", metavar="SHAPE", help=f"{', '.join(SHAPES)}, demo, or a model directory"
    )
    parser.add_argument(
        "--quant", default="q4g64", choices=QUANTS, metavar="QUANT", help=f"{', '.join(QUANTS)} (q4g64)"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="positions already in the cache (512; 64 with --speculate)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of native calls (one per core; at most one per CPU)")
    parser.add_argument("--isa", metavar="ISA", help=f"kernel table: {isas} (the best this CPU runs)")
    parser.add_argument("--kv-bits", type=int, default=16, choices=(8, 16), help="of keys and values (16)")
    parser.add_argument("--in-place", action="store_true", help="no packed copy of the weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file (- for stdout)")
    rows = parser.add_argument_group("T(M)")
    rows.add_argument("--rows", metavar="M,M,...", help="row counts, 1 to 21 (1,2,4,6,8,9)")
    rows.add_argument("--repeats", type=int, metavar="N", help="timed passes per row count (9)")
    speculation = parser.add_argument_group("speculation")
    speculation.add_argument(
        "--speculate", action="store_true", help="plain against speculative decoding with a set acceptance"
    )
    speculation.add_argument(
        "--acceptance", type=float, metavar="P", help="probability that a drafted token is right (0.8)"
    )
    speculation.add_argument("--gamma", type=int, metavar="N", help="tokens drafted per round, 1 to 20 (6)")
    speculation.add_argument(
        "--draft-shape",
        metavar="SHAPE",
        help="shape of the draft, over the target's vocabulary (draft-128k, 81 M parameters; demo-draft for demo)",
    )
    speculation.add_argument("--tokens", type=int, metavar="N", help="tokens to decode (256)")


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
    """Checks everything, then measures and prints."""
    set_threads(options.threads)
    check_isa(options.isa)
    _settle(options)
    shape = find_shape(options.shape)
    check_groups(shape, options.quant)
    draft_shape = _draft_shape(options, shape) if options.speculate else None
    rows = [] if options.speculate else _row_counts(options.rows)
    _require_range("--context", options.context, 1, 1_000_000)
    if draft_shape:
        check_groups(draft_shape, options.quant)
        check_terms(options.gamma, options.acceptance)
        _require_range("--tokens", options.tokens, 1, 100_000)
        max_context = positions_needed(options.context, options.tokens, options.gamma)
    else:
        _require_range("--repeats", options.repeats, 1, 1000)
        max_context = options.context + SPARE_POSITIONS
    if options.json:
        _require_writable(options.json)

    def make(of: Shape, seed: int) -> _core.Model:
        with _bar(f"making random weights of {of.name}") as progress:
            return random_model(
                of, options.quant, max_context=max_context, seed=seed, isa=options.isa, pack=not options.in_place,
                kv_bits=options.kv_bits, progress=progress,
            )  # fmt: skip

    target = make(shape, 0)
    record: dict[str, Any] = {
        "shape": shape.name,
        "quant": options.quant,
        "precision": target.precision,
        "kv_bits": target.kv_bits,
        "isa": target.isa,
        "in_place": options.in_place,
        **environment(),
    }
    out = sys.stderr if str(options.json) == "-" else sys.stdout
    print(f"{shape.name} {options.quant}, {target.weight_bytes / 1e6:.0f} MB a pass, {target.precision} activations, "
          f"{target.kv_bits} bit keys and values, "
          f"{target.isa}, {_core.start_threads()} threads, random weights", file=out)  # fmt: skip
    if target.weight_bytes < 64 << 20:
        print(
            "note: these weights fit in a large last-level cache; the figures are not those of cold weights", file=out
        )
    if draft_shape:
        draft = make(draft_shape, 1)
        with _bar("decoding") as progress:
            result = measure_speculation(
                target, draft, gamma=options.gamma, acceptance=options.acceptance, tokens=options.tokens,
                context=options.context, progress=progress,
            )  # fmt: skip
        record |= {"draft_shape": draft_shape.name, "context": options.context, "speculate": vars(result)}
        print_speculation(result, draft, out)
    else:
        with _bar("timing passes") as progress:
            roofline = measure_rows(target, rows, options.context, repeats=options.repeats, progress=progress)
        record |= roofline.as_dict()
        print_rows(roofline, out)
    if options.json:
        text = json.dumps(record, indent=1) + "\n"
        if str(options.json) == "-":
            sys.stdout.write(text)
        else:
            options.json.write_text(text, encoding="utf-8")
    return 0


def _settle(options: argparse.Namespace) -> None:
    """Fills in the defaults of the measurement that was chosen, and refuses options of the other one."""
    mine, other = (_SPECULATION, _ROWS) if options.speculate else (_ROWS, _SPECULATION)
    for name in other.keys() - mine.keys():
        if getattr(options, name) is not None:
            remedy = "leave one of them out" if options.speculate else "add it, or leave the option out"
            goes = "does not go" if options.speculate else "goes only"
            raise ConfigurationError(f"--{name.replace('_', '-')} {goes} with --speculate; {remedy}")
    for name, default in mine.items():
        if getattr(options, name) is None:
            setattr(options, name, default)


def _row_counts(text: str) -> list[int]:
    try:
        rows = [int(count) for count in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"--rows {text!r} is not a list of integers such as 1,2,4") from None
    check_rows(rows)
    return rows


def _draft_shape(options: argparse.Namespace, target: Shape) -> Shape:
    """The draft's shape over the target's vocabulary: what it proposes must be the target's tokens."""
    default = "demo-draft" if target.name == "demo" else "draft-128k"
    return dataclasses.replace(find_shape(options.draft_shape or default), vocab=target.vocab)


def _require_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigurationError(f"{name} is {value}, but must be in {low} to {high}")


def _require_writable(path: Path) -> None:
    """Refuses a file that could not be written after minutes of measuring; leaves no file behind."""
    if str(path) == "-":
        return
    there = path.exists()
    try:
        path.open("a").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise ConfigurationError(f"--json {path} cannot be written ({error.strerror}); choose another place") from None


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

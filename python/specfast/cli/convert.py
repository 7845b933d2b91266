"""`specfast convert`: quantises a Hugging Face directory into the MLX layout."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .. import convert as conversion
from .. import hub


def add_parser(commands: Any) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "convert",
        help="quantise a model directory",
        description="Quantises a Hugging Face model directory into MLX's affine layout.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("source", help="directory or repo id with F32, F16 or BF16 weights")
    parser.add_argument("destination", type=Path, help="directory to create")
    parser.add_argument("--bits", type=int, default=4, choices=conversion.BITS, help="bits per weight (4)")
    parser.add_argument(
        "--group-size", type=int, default=64, choices=conversion.GROUP_SIZES, help="weights that share a scale (64)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON summary")


def run(options: argparse.Namespace) -> int:
    """Converts, with a bar on a terminal."""
    conversion.require_absent(options.destination)  # before anything is downloaded
    source = hub.resolve(options.source)
    if sys.stderr.isatty():
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import Progress  # noqa: PLC0415

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("quantising", total=None)
            result = conversion.convert(
                source, options.destination, bits=options.bits, group_size=options.group_size,
                progress=lambda done, total, name: bar.update(task, completed=done, total=total, description=name or "done"),
            )  # fmt: skip
    else:
        result = conversion.convert(source, options.destination, bits=options.bits, group_size=options.group_size)
    summary = {
        "source_bytes": result.source_bytes,
        "bytes": result.bytes,
        "bits_per_weight": round(result.bits_per_weight, 3),
        "quantised_tensors": result.quantised_tensors,
    }
    if options.json:
        print(json.dumps(summary))
    else:
        print(
            f"{options.destination}: {result.source_bytes / 1e6:.1f} MB became {result.bytes / 1e6:.1f} MB, "
            f"{result.bits_per_weight:.2f} bits per weight, {result.quantised_tensors} matrices quantised"
        )
    return 0

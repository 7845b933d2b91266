"""Compares a benchmark run with this CPU's baseline by ratios measured within each run, so that a slow minute does not count.

    python benchmarks/compare.py build/benchmarks.json             compare; exit 1 on a regression
    python benchmarks/compare.py build/benchmarks.json --update    store the run as a sample of the baseline

A baseline is keyed by CPU (name, family and model numbers: virtual machines give generations one name) and threads, and holds the ratios of one or more runs; a ratio fails when it is above the baseline's median by
more than 10 percent or three times the spread between the stored runs, whichever is larger.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

BASELINES = Path(__file__).parent / "baselines"
TOLERANCE, SPREADS = 0.10, 3.0
# Slower series over the faster one they are judged by.
PAIRS = (("verify_tokens", "verify_tokens_numpy"), ("embedded_speculative", "embedded_plain"))


def ratios(run: dict) -> dict[str, float]:
    """Times over the roofline where it was measured, else T(M)/T(1), and the pairs above; smaller is better."""
    medians, found = {}, {}
    for benchmark in run["benchmarks"]:
        info, median = benchmark["extra_info"], benchmark["stats"]["median"]
        medians[info["series"], info.get("M", 0)] = median
        if "roofline_s" in info:
            found[f"{info['series']} T({info['M']})/R({info['M']})"] = median / info["roofline_s"]
    over_roofline = {name.split(" ")[0] for name in found}
    for (series, m), median in medians.items():
        if m > 1 and (series, 1) in medians and series not in over_roofline:
            found[f"{series} T({m})/T(1)"] = median / medians[series, 1]
    for candidate, reference in PAIRS:
        if (candidate, 0) in medians and (reference, 0) in medians:
            found[f"{candidate} / {reference}"] = medians[candidate, 0] / medians[reference, 0]
    return found


def cpu_key(run: dict) -> str:
    """A file name for the run's CPU and thread count."""
    machine = run["machine_info"]["specfast"]
    words = f"{machine['cpu']} {machine['cpu_numbers']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def judge(current: dict[str, float], samples: list[dict[str, float]]) -> list[tuple[str, float, float, float, bool]]:
    """Rows (name, baseline median, now, limit, within) for every ratio both sides have."""
    rows = []
    for name in sorted(current):
        stored = [sample[name] for sample in samples if name in sample]
        if not stored:
            continue
        middle = statistics.median(stored)
        spread = (max(stored) - min(stored)) / middle
        limit = middle * (1 + max(TOLERANCE, SPREADS * spread))
        rows.append((name, middle, current[name], limit, current[name] <= limit))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--baselines", type=Path, default=BASELINES)
    parser.add_argument("--update", action="store_true", help="add the run to this CPU's baseline")
    options = parser.parse_args(arguments)
    try:
        run = json.loads(options.run.read_text())
        file, current = options.baselines / f"{cpu_key(run)}.json", ratios(run)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{options.run} is no record of `make bench-compare` ({type(error).__name__}: {error})")
    samples = json.loads(file.read_text())["samples"] if file.is_file() else []
    if options.update:
        options.baselines.mkdir(exist_ok=True)
        file.write_text(
            json.dumps({"machine": run["machine_info"]["specfast"], "samples": [*samples, current]}, indent=1) + "\n"
        )
        print(f"{file}: {len(samples) + 1} samples")
        return 0
    if not samples:
        others = ", ".join(sorted(other.stem for other in options.baselines.glob("*.json"))) or "none"
        print(
            f"no baseline for this CPU and number of threads ({file.stem}; there are: {others}), so nothing was compared.\n"
            f"To store this run as its first sample: python benchmarks/compare.py {options.run} --update\n"
            "Three quiet runs, each stored like that, make a good baseline: their spread is the noise that is allowed for."
        )
        return 0
    rows = judge(current, samples)
    for name, middle, now, limit, within in rows:
        print(f"{'ok  ' if within else 'SLOW'} {name:44} baseline {middle:7.3f}  now {now:7.3f}  limit {limit:7.3f}")
    slower = [row[0] for row in rows if not row[4]]
    print(f"{len(rows)} ratios, {len(slower)} regressions")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())

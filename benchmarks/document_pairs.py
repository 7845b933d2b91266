"""The measured columns of docs/exo.md: plain tokens against rounds, interleaved, for the document's pairs that fit here.

    python benchmarks/document_pairs.py                        all of them
    python benchmarks/document_pairs.py --target qwen-2.5-7b   those of one target

Takes a few minutes, and memory for 6 GB of weights, twice where they are packed: random, 4 bit, at the real shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from specfast import _core
from specfast.bench.random_model import random_model
from specfast.bench.shapes import find_shape
from specfast.stats import expected_tokens

PAIRS = (
    ("llama-3.1-8b", 6, ("llama-3.2-3b", "llama-3.2-1b")),
    ("qwen-2.5-7b", 4, ("qwen-2.5-1.5b", "qwen-2.5-0.5b")),
)
CONTEXT, REPEATS, ACCEPTANCES = 200, 10, (0.6, 0.7, 0.8)
GREEDY = _core.Law(temperature=0.0)
TOKEN = np.array([7], np.int32)


def filled(model: _core.Model) -> _core.Cache:
    cache = _core.Cache(model, 2 * CONTEXT)
    model.prefill(cache, np.arange(CONTEXT, dtype=np.int32))
    return cache


def measure(target: _core.Model, draft: _core.Model, gamma: int) -> tuple[float, float, float]:
    """Median milliseconds of a plain token, of gamma drafted tokens, and of checking them; weights are cold each time."""
    caches, proposal = (filled(target), filled(draft)), _core.Proposal()
    steps: tuple[Callable[[], object], ...] = (
        lambda: target.verify(caches[0], TOKEN, None, GREEDY, 1.0, 0, 0),
        lambda: draft.draft(caches[1], TOKEN, gamma, GREEDY, 0, 0, proposal),
        lambda: target.verify(caches[0], TOKEN, proposal, GREEDY, 1.0, 0, 0),
    )
    times: list[list[float]] = [[], [], []]
    for _ in range(REPEATS + 1):  # the first is warm-up
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            taken.append(1e3 * (time.perf_counter() - start))
            for cache in caches:
                cache.commit(0)
    plain, drafting, checking = (statistics.median(taken[1:]) for taken in times)
    return plain, drafting, checking


def measure_pair(target: _core.Model, draft_name: str, gamma: int) -> dict[str, Any]:
    """A row of the table; speed-ups are by acceptance."""
    shape = dataclasses.replace(find_shape(draft_name), vocab=target.vocab)
    draft = random_model(shape, "q4g64", max_context=2 * CONTEXT, seed=1)
    plain, drafting, checking = measure(target, draft, gamma)
    speedups = {f"{a:g}": expected_tokens(a, gamma) * plain / (drafting + checking) for a in ACCEPTANCES}
    return {
        "draft": draft_name, "gamma": gamma, "isa": target.isa, "plain_ms": plain, "draft_ms": drafting, "verify_ms": checking,
        "speedups": speedups,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, _, _ in PAIRS]
    parser.add_argument("--target", choices=names, help="only the pairs of this one")
    parser.add_argument("--json", action="store_true", help="print a JSON object a pair")
    options = parser.parse_args(arguments)
    for name, gamma, drafts in PAIRS:
        if options.target not in (None, name):
            continue
        target = random_model(find_shape(name), "q4g64", max_context=2 * CONTEXT)
        for draft_name in drafts:
            row = {"target": name, **measure_pair(target, draft_name, gamma)}
            print(json.dumps(row) if options.json else sentence(row), flush=True)
        del target
    return 0


def sentence(row: dict[str, Any]) -> str:
    """A row for people."""
    speedups = ", ".join(f"{acceptance}: {speedup:.2f}" for acceptance, speedup in row["speedups"].items())
    return (
        f"{row['target']} with {row['draft']}, gamma {row['gamma']}, {row['isa']}: plain {row['plain_ms']:.0f} ms, "
        f"draft {row['draft_ms']:.0f} ms, verify {row['verify_ms']:.0f} ms; at acceptance {speedups}"
    )


if __name__ == "__main__":
    sys.exit(main())

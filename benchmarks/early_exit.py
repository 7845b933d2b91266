"""What an early exit gains and costs: acceptance by layer of the embedded target, and the time of a round at real shapes.

`python benchmarks/early_exit.py` reads the embedded target's held-out files (training/heldout.txt); with `--shape NAME` it
times rounds of random weights at 4 bit instead, plain passes and rounds in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import time
from pathlib import Path

import numpy as np
import specfast
from specfast import _core
from specfast.bench.random_model import random_model
from specfast.bench.shapes import find_shape
from specfast.stats import expected_tokens
from specfast.tokenizer import Tokenizer

HELD_OUT = Path(__file__).parents[1] / "training" / "heldout.txt"
GREEDY = _core.Law(temperature=0.0)
TOKEN = np.array([7], np.int32)
CONTEXT, REPEATS, WINDOW = 200, 8, 512


def acceptance() -> None:
    """Prints, for each exit of the embedded target, the share of drafted tokens it would accept, given the held-out text so far."""
    directory = specfast.embedded.path("target")
    model, tokenizer = specfast.load().pair.target.model, Tokenizer(directory)
    exits = np.arange(1, model.layers, dtype=np.int32)
    library, totals, rows = Path(sysconfig.get_paths()["stdlib"]), np.zeros((2, len(exits))), 0
    for name in HELD_OUT.read_text().split():
        tokens = tokenizer.encode((library / name).read_text(encoding="utf-8", errors="replace"))
        window = np.asarray(tokens[:WINDOW], dtype=np.int32)
        for i, law in enumerate((GREEDY, _core.Law())):
            totals[i] += len(window) * model.exit_acceptance(_core.Cache(model), window, exits, law)
        rows += len(window)
    print(f"{rows} rows of held-out text")
    for layers, greedy, sampled in zip(exits.tolist(), *totals / rows, strict=True):
        share = model.early_bytes(layers) / model.weight_bytes
        print(f"layer {layers}: greedy {greedy:.3f}, temperature 1 {sampled:.3f}, bytes of a drafted token {share:.2f}")


def needed_acceptance(cost: float, gamma: int) -> float:
    """The acceptance from which rounds of a cost, in plain passes, are faster than plain decoding; above 1: never."""
    return next((a / 1000 for a in range(1001) if expected_tokens(a / 1000, gamma) >= cost), 1.001)


def costs(shape: str, gamma: int) -> None:
    """Prints the median time of rounds at some exits beside plain passes; weights are cold each time."""
    model = random_model(find_shape(shape), "q4g64", max_context=2 * CONTEXT)
    exits = sorted({max(1, round(model.layers * part)) for part in (1 / 8, 1 / 4, 1 / 2)})
    caches, proposal = [_core.Cache(model) for _ in range(2)], _core.Proposal()
    for cache in caches:
        model.prefill(cache, np.arange(CONTEXT, dtype=np.int32))
    times: dict[tuple[int, str], list[float]] = {}

    def timed(layers: int, name: str, cache: _core.Cache, checked: _core.Proposal | None) -> None:
        start = time.perf_counter()
        if name == "draft":
            model.draft_early(cache, TOKEN, gamma, layers, GREEDY, 0, 0, proposal)
        else:
            model.verify(cache, TOKEN, checked, GREEDY, 1.0, 0, 0)
        times.setdefault((layers, name), []).append(1e3 * (time.perf_counter() - start))
        cache.rollback()

    for _ in range(REPEATS + 1):  # the first is warm-up
        timed(0, "plain", caches[0], None)
        for layers in exits:
            timed(layers, "draft", caches[0], None)
            timed(layers, "verify", caches[0], proposal)
            timed(layers, "verify anew", caches[1], proposal)
    median = {key: statistics.median(taken[1:]) for key, taken in times.items()}
    plain = median[0, "plain"]
    print(f"{shape} q4g64, {model.isa}, {_core.num_threads()} threads, gamma {gamma}: plain {plain:.1f} ms")
    for layers in exits:
        draft, verify, anew = (median[layers, name] for name in ("draft", "verify", "verify anew"))
        needed = needed_acceptance((draft + verify) / plain, gamma)
        print(
            f"exit {layers} of {model.layers}: draft {draft:.1f} ms, verify {verify:.1f} ms (anew {anew:.1f}), round "
            f"{(draft + verify) / plain:.2f} plain passes; pays "
            + (f"from acceptance {needed:.2f} on" if needed <= 1 else "at no acceptance")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", help="a shape of specfast bench")
    parser.add_argument("--gamma", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.shape:
        costs(arguments.shape, arguments.gamma)
    else:
        acceptance()


if __name__ == "__main__":
    main()

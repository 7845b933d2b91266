"""Drafters and the controller of the embedded pair on five classes of prompts: acceptance, tokens per pass, speed against plain.

    python benchmarks/prompt_classes.py                      all classes and drafters, as the table in README.md
    python benchmarks/prompt_classes.py --only controller    the controller alone: 15 pairs of runs a class

Code, prose, chat and JSON are continued by the target at the default options (temperature 1, the likeliest tenth of the
vocabulary). Continuations in which 16 tokens repeat that are not in the prompt are not counted, but their number is told.
The embedded target is too small to edit a text, so for editing the continuation is prescribed: every pass is computed and
timed in full, and then the prescribed tokens are kept. Plain and speculative runs take turns; ratios are of each pair.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import specfast
from specfast import _core
from specfast.context import Context
from specfast.controllers import AutoGamma, FixedGamma
from specfast.drafters import CombinedDrafter, CopyDrafter, Drafter, ModelDrafter, NoDrafter
from specfast.generation import Generation
from specfast.measurements import Measurements
from specfast.stats import SpeculationStats
from specfast.targets import NativeTarget

DRAFTERS = ("prompt-lookup", "suffix", "model", "combined")
RUN = 16  # tokens whose repetition is a loop


@dataclass(frozen=True)
class Row:
    """What the pairs of one class and drafter gave; the ratio is of speculative to plain tokens per second."""

    prompts: str
    drafter: str
    pairs: int
    loops: int
    acceptance: float
    tokens_per_pass: float
    ratio: float
    low: float
    high: float


class PrescribedTarget(NativeTarget):
    """A target that computes every pass and then keeps the tokens of a given text."""

    def __init__(self, engine: specfast.Engine, text: list[int], capacity: int) -> None:
        super().__init__(engine.pair.target.model, _core.Law(0.0), 1.0, 0, capacity)
        self._text = text

    def verify(self, context: Context, proposal: _core.Proposal | None) -> object:
        super().verify(context, proposal)
        at = len(context.tokens)
        drafted = proposal.tokens.tolist() if proposal else []
        tau = 0
        while tau < len(drafted) and drafted[tau] == self._text[at + tau]:
            tau += 1
        return _Kept(tau, self._text[at + tau])


@dataclass(frozen=True)
class _Kept:
    tau: int
    next_token: int


class Runs:
    """The runs of one class, plain or with a drafter, prompt after prompt."""

    def __init__(self, engine: specfast.Engine, name: str, prompts: list, tokens: int, gamma: int) -> None:
        self._engine, self._tokens, self._gamma = engine, tokens, gamma
        self._prescribed = name == "editing"
        encode = engine.pair.encode
        self._texts = [self._edited(one) if self._prescribed else (encode(one), []) for one in prompts]
        self._measured = Measurements()

    def _edited(self, one: dict) -> tuple[list[int], list[int]]:
        text, parts = one["text"], []
        for what, old, new in one["edits"]:
            assert old in text, old
            text = text.replace(old, new)
            parts.append(f"\n# {what}\n{text}")
        prompt = self._engine.pair.encode(one["text"])
        return prompt, self._engine.pair.tokenizer.encode("".join(parts), special=False)

    def run(self, index: int, drafter: str, seed: int) -> tuple[SpeculationStats, bool]:
        """The counters of a run, and whether it looped."""
        prompt, rest = self._texts[index % len(self._texts)]
        if self._prescribed:
            return self._follow(prompt, rest, drafter), False
        if drafter == "plain":
            options = {"disabled": True, "seed": seed}
        elif drafter == "controller":
            options = {"gamma": "auto"}  # with a seed gamma would be fixed
        else:
            options = {"drafter": drafter, "gamma": self._gamma, "seed": seed}
        result = self._engine.generate(prompt, max_tokens=self._tokens, ignore_eos=True, **options)
        return result.stats, loops(result.token_ids, prompt)

    def _follow(self, prompt: list[int], rest: list[int], drafter: str) -> SpeculationStats:
        count = min(self._tokens, len(rest) - 64)
        capacity = len(prompt) + len(rest)
        context = Context(list(prompt), count, capacity)
        target = PrescribedTarget(self._engine, [*prompt, *rest], capacity)
        controller = AutoGamma(20, self._measured) if drafter == "controller" else FixedGamma(self._gamma)
        generation = Generation(context, target, self._drafter(drafter, capacity), controller)
        for _ in generation:
            pass
        return generation.stats

    def _drafter(self, name: str, capacity: int) -> Drafter:
        if name == "plain":
            return NoDrafter()
        if name in ("prompt-lookup", "suffix"):
            return CopyDrafter(name)
        model = ModelDrafter(self._engine.pair.draft.model, _core.Law(0.0), 0, capacity)
        return model if name == "model" else CombinedDrafter({"suffix": CopyDrafter("suffix"), "model": model})


def loops(tokens: list[int], prompt: list[int]) -> bool:
    """Whether a run of tokens that is not in the prompt occurs twice."""

    def runs(text: list[int]) -> list[tuple[int, ...]]:
        return [tuple(text[i : i + RUN]) for i in range(len(text) - RUN + 1)]

    known = set(runs(prompt))
    counts = Counter(run for run in runs(tokens) if run not in known)
    return max(counts.values(), default=0) > 1


def measure(runs: Runs, name: str, drafter: str, pairs: int) -> Row:
    """Plain and speculative runs in turns, until so many pairs count."""
    ratios: list[float] = []
    added, looped = SpeculationStats(), 0
    runs.run(0, drafter, 0)  # the first run is cold
    for index in itertools.count():
        order = ("plain", drafter) if index % 2 else (drafter, "plain")
        made = {which: runs.run(index, which, index) for which in order}
        if any(looping for _, looping in made.values()):
            looped += 1
            if looped > 10 * pairs:
                break
            continue
        stats = made[drafter][0]
        ratios.append(stats.tok_s / made["plain"][0].tok_s)
        added.add(stats)
        if len(ratios) == pairs:
            break
    low, high = interval(ratios)
    middle = statistics.median(ratios) if ratios else float("nan")
    return Row(
        name, drafter, len(ratios), looped, added.acceptance_rate, added.tokens_per_target_pass, middle, low, high
    )


def interval(values: list[float]) -> tuple[float, float]:
    """A 95 percent interval of the median, from resampling."""
    if not values:
        return float("nan"), float("nan")
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def main(argv: list[str] | None = None) -> int:
    """Runs what is asked for and prints a table."""
    prompts = tomllib.loads((Path(__file__).parent / "prompt_classes.toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", default=list(prompts), choices=list(prompts))
    parser.add_argument("--only", nargs="+", default=[*DRAFTERS, "controller"], choices=[*DRAFTERS, "controller"])
    parser.add_argument("--tokens", type=_positive, default=512, help="of a continuation (512)")
    parser.add_argument("--gamma", type=int, default=5, help="of the drafters; the controller chooses (5)")
    parser.add_argument("--pairs", type=_positive, default=15, help="pairs of runs that count (15)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line instead of a table")
    arguments = parser.parse_args(argv)
    engine = specfast.load()
    if not arguments.json:
        print("| prompts | drafter | acceptance | tokens per pass | speed against plain | loops left out |")
        print("| --- | --- | --- | --- | --- | --- |")
    for name in arguments.classes:
        runs = Runs(engine, name, prompts[name], arguments.tokens, arguments.gamma)
        for drafter in arguments.only:
            row = measure(runs, name, drafter, arguments.pairs)
            print(json.dumps(asdict(row)) if arguments.json else _line(row), flush=True)
    return 0


def _line(row: Row) -> str:
    return (
        f"| {row.prompts} | {row.drafter} | {row.acceptance:.2f} | {row.tokens_per_pass:.2f} | "
        f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f}) | {row.loops} of {row.loops + row.pairs} |"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())

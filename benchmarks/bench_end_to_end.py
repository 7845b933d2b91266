"""Whole generations: the embedded pair, and the engine's own share of a round at real shapes."""

import pytest
import specfast
from specfast.bench.random_model import random_model
from specfast.bench.shapes import find_shape
from specfast.bench.speculate import measure_speculation
from specfast.cli.generate import BUILT_IN_PROMPT


@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "speculative"])
def test_embedded_pair(benchmark, record, speculate):
    engine = specfast.load()

    def run():
        return engine.generate(BUILT_IN_PROMPT, max_tokens=128, temperature=0, disabled=not speculate, ignore_eos=True)

    benchmark.group = "end to end"
    result = benchmark.pedantic(run, rounds=7, warmup_rounds=2)
    record(
        series="embedded_speculative" if speculate else "embedded_plain",
        tok_s=128 / benchmark.stats.stats.median,
        tokens_per_target_pass=result.stats.tokens_per_target_pass,
    )


def test_engine_overhead(benchmark, record):
    """What is neither draft nor verify stays under 1 percent of a round at the 1B shape."""
    target = random_model(find_shape("llama-3.2-1b"), "q4g64")
    draft = random_model(find_shape("draft-128k"), "q4g64", seed=1)

    benchmark.group = "end to end"
    result = benchmark.pedantic(lambda: measure_speculation(target, draft, tokens=96), rounds=3, warmup_rounds=1)
    rounds = result.tokens / result.tokens_per_target_pass
    share = result.overhead_seconds / (result.draft_seconds + result.verify_seconds + result.overhead_seconds)
    record(series="engine", overhead_us=1e6 * result.overhead_seconds / rounds, overhead_share=share)
    assert share < 0.01

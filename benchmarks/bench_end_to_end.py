"""The embedded pair, plain and speculative, at temperature 0."""

import pytest
import specfast
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

"""The promise of the embedded pair: more than two tokens per target pass on held-out Python, at temperatures 0 and 1."""

import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import specfast

ROOT = Path(__file__).parents[1]
LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def repeats(tokens, n=16):
    return max(Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)).values(), default=0) > 1


@pytest.mark.parametrize(("temperature", "files", "per_file"), [(0.0, 20, 4), (1.0, 20, 2)])
def test_more_than_two_tokens_per_target_pass(temperature, files, per_file):
    engine = specfast.load()
    tokenizer = engine.pair.tokenizer
    names = [n for n in (ROOT / "training" / "heldout.txt").read_text().split() if (LIBRARY / n).is_file()]
    if len(names) < 10:
        pytest.skip("this Python lacks most of the held-out files")
    passes = tokens = counted = 0
    for name in names[:files]:
        text = tokenizer.encode((LIBRARY / name).read_text(encoding="utf-8", errors="replace"))
        for start in np.linspace(1, max(1, len(text) - 64), per_file).astype(int):
            result = engine.generate(
                [text[0], *text[start : start + 64]], max_tokens=128, temperature=temperature, seed=int(start)
            )
            if repeats(result.token_ids):
                continue
            counted += 1
            passes += result.stats.target_passes
            tokens += result.stats.tokens
    assert counted >= 8
    assert tokens / passes > 2.0

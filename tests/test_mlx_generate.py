"""specfast.mlx.stream_generate beside mlx-lm's: the same responses, and drafts judged by the law."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_models import random_model  # noqa: E402
from specfast import ConfigurationError, UnsupportedModelError, embedded  # noqa: E402
from specfast.mlx import accelerate, generate, report, stream_generate  # noqa: E402

PROMPT = "import os\n\ndef count_lines(path):\n"


@pytest.fixture(scope="module")
def pair():
    mx.set_default_device(mx.cpu)
    (target, tokenizer), (draft, _) = (mlx_lm.load(str(embedded.path(role))) for role in ("target", "draft"))
    return accelerate(target), tokenizer, draft


def run(pair, *, draft=False, **options):
    target, tokenizer, drafter = pair
    responses = list(stream_generate(target, tokenizer, PROMPT, draft_model=drafter if draft else None, **options))
    assert [r.generation_tokens for r in responses] == list(range(1, len(responses) + 1))
    assert [r.finish_reason is None for r in responses] == [True] * (len(responses) - 1) + [False]
    return responses


def seen(responses):
    return [(r.text, r.token, r.prompt_tokens, r.generation_tokens, r.finish_reason) for r in responses]


def theirs(target, tokenizer):
    """mlx-lm's own responses. Those of 2025 and before say the end in a response of its own; the first ones need Metal."""
    try:
        responses = seen(mlx_lm.stream_generate(target, tokenizer, PROMPT, max_tokens=64))
    except RuntimeError as error:
        pytest.skip(f"this mlx-lm cannot generate here: {error}")
    if responses[-1][3] == responses[-2][3]:
        (text, *_), (rest, *values) = responses.pop(-2), responses.pop()
        responses.append((text + rest, *values))
    return responses


@pytest.mark.parametrize("num_draft_tokens", [1, 4, 20, None])
def test_greedy_responses_are_mlx_lms(pair, num_draft_tokens):
    target, tokenizer, _ = pair
    expected = theirs(target, tokenizer)
    assert seen(run(pair, max_tokens=64)) == expected
    ours = run(pair, draft=True, max_tokens=64, num_draft_tokens=num_draft_tokens)
    assert seen(ours) == expected
    if num_draft_tokens:
        assert any(r.from_draft for r in ours)
    prompt = mx.array(tokenizer.encode(PROMPT))
    again = stream_generate(target, tokenizer, prompt, max_tokens=64)
    assert [r.token for r in again] == [t[1] for t in expected]


def test_an_end_token_stops(pair):
    target, tokenizer, _ = pair
    token = run(pair, max_tokens=24)[17].token
    before = set(tokenizer.eos_token_ids)
    tokenizer.eos_token_ids = {token}
    try:
        expected = theirs(target, tokenizer)
        assert expected[-1][-1] == "stop"
        assert len(expected) <= 18
        for options in ({}, {"draft": True, "num_draft_tokens": 4}):
            assert seen(run(pair, max_tokens=64, **options)) == expected
            assert seen(run(pair, max_tokens=-1, **options)) == expected
    finally:
        tokenizer.eos_token_ids = before


def test_a_seeds_text_does_not_depend_on_the_draft(pair):
    tokens = {
        tuple(
            r.token for r in run(pair, draft=draft, max_tokens=48, temp=0.8, top_p=0.95, min_p=0.01, top_k=50, seed=5)
        )
        for draft in (False, True)
    }
    assert len(tokens) == 1
    block = [
        [r.token for r in run(pair, draft=True, max_tokens=n, temp=0.8, seed=5, num_draft_tokens=4)] for n in (48, 30)
    ]
    assert block[0][:30] == block[1]
    other = run(pair, max_tokens=48, temp=0.8, top_p=0.95, min_p=0.01, top_k=50, seed=6)
    assert tuple(r.token for r in other) not in tokens


def test_rejection_sampling_accepts_an_equal_draft(pair):
    """A draft with the target's own law is always accepted; comparing samples, as mlx-lm does, accepts almost none."""
    target = accelerate(random_model("llama", "f32"))
    _, tokenizer, _ = pair
    prompt = list(range(1, 9))
    ours = list(stream_generate(target, tokenizer, prompt, 60, target, num_draft_tokens=4, temp=1.0, seed=1))
    assert [r.from_draft for r in ours] == [i % 5 != 4 for i in range(len(ours))]
    other = accelerate(random_model("llama", "f32", seed=1))
    ours = list(stream_generate(target, tokenizer, prompt, 60, other, num_draft_tokens=4, temp=1.0, seed=1))
    assert 0.05 < np.mean([r.from_draft for r in ours]) < 0.7


def test_the_law_of_the_first_token(pair):
    """Over seeds, drafted or not; a false alarm has probability 1e-6, and a wrong temperature is caught."""
    from scipy.stats import chi2

    target, draft = (accelerate(random_model("llama", "f32", seed=s), "f32") for s in (0, 1))
    _, tokenizer, _ = pair
    logits = np.asarray(target(mx.array([[1, 2, 3]]))[0, -1], np.float64) / 2
    p = np.exp(logits - logits.max())
    p /= p.sum()

    def statistic(temp, seeds=3000):
        counts = np.zeros(96)
        for seed in range(seeds):
            first = next(
                stream_generate(target, tokenizer, [1, 2, 3], 4, draft, num_draft_tokens=2, temp=temp, seed=seed)
            )
            counts[first.token] += 1
        often = p * seeds > 5
        observed, expected = (np.append(x[often], x[~often].sum()) for x in (counts, p * seeds))
        return ((observed - expected) ** 2 / expected).sum(), chi2.isf(1e-6, len(observed) - 1)

    value, limit = statistic(2.0)
    assert value < limit
    value, limit = statistic(1.6)
    assert value > limit


def test_refusals(pair):
    target, tokenizer, draft = pair
    for options, words in (
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"num_draft_tokens": 21}, "in 1 to 20"),
        ({"lenience": 3.0}, "lenience is 3"),
        ({"temp": -1.0}, "temperature is -1"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            stream_generate(target, tokenizer, PROMPT, draft_model=draft, **options)
    with pytest.raises(ConfigurationError, match="0 tokens"):
        stream_generate(target, tokenizer, [])
    with pytest.raises(ConfigurationError, match="needs a draft model"):
        stream_generate(target, tokenizer, PROMPT, drafter="combined")
    with pytest.raises(ConfigurationError, match="early_exit is 9, outside 1 to"):
        stream_generate(target, tokenizer, PROMPT, early_exit=9)
    with pytest.raises(UnsupportedModelError, match=r"early exit needs the native path.*bias"):
        stream_generate(random_model("llama", "f32", attention_bias=True), tokenizer, PROMPT, early_exit=1)


@pytest.mark.parametrize(
    "options",
    [
        {"drafter": "suffix"},
        {"drafter": "prompt-lookup", "num_draft_tokens": 5},
        {"drafter": "combined", "num_draft_tokens": 4, "draft": True},
        {"early_exit": 1, "num_draft_tokens": 3},
        {"early_exit": "auto"},
        {"prompt_cache": [], "draft": True, "num_draft_tokens": 4},
        {"logprobs": True, "drafter": "suffix"},
    ],
)
def test_every_drafter_leaves_the_text_alone(pair, options):
    target, tokenizer, drafter = pair
    expected = run(pair, max_tokens=48)
    draft = drafter if options.pop("draft", False) else None
    if "prompt_cache" in options:
        options["prompt_cache"] = make_prompt_cache(target)
    stream = stream_generate(target, tokenizer, PROMPT, 48, draft, **options)
    responses = list(stream)
    assert seen(responses) == seen(expected)
    stats = stream.stats
    assert stats["path"] in ("native", "primitives")
    assert stats["precision"] == report(target).precision
    assert stats["tokens"] == 48
    assert responses[-1].acceptance == stats["acceptance_rate"]
    assert stream.terms.drafter == stats["drafter"]
    assert (responses[0].logprobs is None) == (not options.keys() & {"logprobs", "prompt_cache"})


def test_generate_is_the_whole_text(pair, capsys):
    target, tokenizer, drafter = pair
    expected = "".join(r.text for r in run(pair, max_tokens=24))
    assert generate(target, tokenizer, PROMPT, max_tokens=24) == expected
    assert capsys.readouterr().out == ""
    assert generate(target, tokenizer, PROMPT, verbose=True, max_tokens=24, draft_model=drafter) == expected
    printed = capsys.readouterr().out
    assert expected in printed
    assert f"Path: native, precision {report(target).precision}, drafter model, acceptance" in printed


def test_a_bounded_cache_runs_natively(pair):
    """After it has wrapped several times drafts still leave the text alone, and it is not that of the whole context."""
    bounded = [r.token for r in run(pair, max_tokens=90, max_kv_size=24)]
    stream = stream_generate(pair[0], pair[1], PROMPT, 90, pair[2], max_kv_size=24, num_draft_tokens=4)
    assert [r.token for r in stream] == bounded
    assert stream.stats["path"] == "native"
    assert stream.stats["accepted"] > 0
    assert bounded != [r.token for r in run(pair, max_tokens=90)]
    with pytest.raises(ConfigurationError, match="max_kv_size is 4"):
        run(pair, max_tokens=4, max_kv_size=4)

"""specfast.mlx.generate_step beside mlx-lm's: samplers, processors, caches and log-probabilities, natively and in mlx-lm's layers."""

import inspect
import subprocess
import sys
import warnings

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx.utils import tree_map  # noqa: E402
from mlx_hosts import VOCAB, host_model  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.sample_utils import make_logits_processors, make_sampler  # noqa: E402
from mlx_models import generate_step as their_steps  # noqa: E402
from mlx_models import logits_of, random_model, speculative_generate_step  # noqa: E402
from random_laws import FULL  # noqa: E402
from specfast import ConfigurationError, ShapeError  # noqa: E402
from specfast.mlx import accelerate, generate_step  # noqa: E402
from specfast.mlx.samplers import processed, recognised, rows_law  # noqa: E402

PROMPT = np.random.default_rng(1).integers(0, VOCAB, 11).tolist()
NEXT = np.random.default_rng(2).integers(0, VOCAB, 5).tolist()


@pytest.fixture(autouse=True)
def _cpu():
    mx.set_default_device(mx.cpu)


@pytest.fixture(scope="module")
def native():
    """(target, another draft), accelerated at precision f32."""
    return tuple(accelerate(random_model("llama", "f32", seed), "f32") for seed in (0, 1))


@pytest.fixture(scope="module")
def hosted():
    return tuple(host_model("mixtral", seed) for seed in (0, 1))


@pytest.fixture(params=["native", "hosted"])
def pair(request):
    return request.getfixturevalue(request.param)


def ours(model, prompt=PROMPT, **options):
    return [step[0] for step in generate_step(prompt, model, **options)]


def theirs(model, prompt=PROMPT, **options):
    """mlx-lm's tokens from its own layers."""
    made = [token for token, _ in their_steps(mx.array(prompt), model, **options)]
    return [int(token) for token in made]


def test_greedy_steps_are_mlx_lms(pair):
    target, draft = pair
    expected = theirs(target, max_tokens=30)
    assert ours(target, max_tokens=30) == expected
    steps = list(generate_step(mx.array(PROMPT), target, max_tokens=30, draft_model=draft, num_draft_tokens=3))
    assert [step[0] for step in steps] == expected
    assert {len(step) for step in steps} == {3}
    assert {len(step) for step in generate_step(PROMPT, target, max_tokens=3)} == {2}
    for drafter in ("suffix", "prompt-lookup", "combined", "model"):
        assert ours(target, max_tokens=30, draft_model=draft, drafter=drafter, num_draft_tokens=5) == expected
    assert ours(target, max_tokens=0) == []


def test_log_probabilities(pair):
    target, draft = pair
    for options in ({}, {"draft_model": draft, "num_draft_tokens": 3}):
        steps = list(generate_step(PROMPT, target, max_tokens=12, **options))
        text = [*PROMPT, *(step[0] for step in steps)]
        logits = logits_of(target, text)[len(PROMPT) - 1 : -1].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        np.testing.assert_allclose([np.asarray(step[1]) for step in steps], expected, atol=1e-3)
        assert steps[0][1].shape == (logits.shape[1],)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7, "repetition_context_size": 8},
        {"logit_bias": {3: 4.0, 7: -9.0}},
        {"repetition_penalty": 1.3, "repetition_context_size": 100, "logit_bias": {5: 2.0}},
    ],
)
def test_logits_processors_see_every_position(pair, options):
    """Greedy, so that mlx-lm's own tokens must come out, whoever drafts; a processor that saw the wrong position would show."""
    target, draft = pair
    expected = theirs(target, max_tokens=30, logits_processors=make_logits_processors(**options))
    assert expected != theirs(target, max_tokens=30)
    for drafting in ({}, {"draft_model": draft}, {"draft_model": target}, {"drafter": "suffix"}):
        gamma = {"num_draft_tokens": 4} if drafting else {}
        processors = make_logits_processors(**options)
        assert ours(target, max_tokens=30, logits_processors=processors, **drafting, **gamma) == expected


def test_processors_get_the_tokens_before_a_row():
    seen = []

    def processor(tokens, logits):
        seen.append((tokens.tolist(), logits.shape))
        return logits

    processed([processor], [4, 5], mx.array([6, 7]), mx.zeros((3, 8)))
    assert seen == [([4, 5], (1, 8)), ([4, 5, 6], (1, 8)), ([4, 5, 6, 7], (1, 8))]


@pytest.mark.parametrize("rounds", [1, 3])
def test_prompt_caches_are_mlx_lms(pair, rounds):
    """Turn after turn in the same caches: the same tokens as mlx-lm, which leaves every token given out in them."""
    target, draft = pair
    for options in ({}, {"draft_model": draft, "num_draft_tokens": 3}, {"drafter": "suffix", "num_draft_tokens": 3}):
        mine, other = make_prompt_cache(target), make_prompt_cache(target)
        for turn in range(rounds):
            prompt = PROMPT if turn == 0 else NEXT
            expected = theirs(target, prompt, max_tokens=10, prompt_cache=other)
            assert ours(target, prompt, max_tokens=10, prompt_cache=mine, **options) == expected
            assert [c.offset for c in mine] == [c.offset for c in other]
            assert mine[0].offset == len(PROMPT) + turn * len(NEXT) + 10 * (turn + 1)


def test_a_draft_has_its_caches_behind_the_targets(pair):
    """As mlx-lm has it: with them the draft knows the earlier turns."""
    target, _ = pair
    caches = make_prompt_cache(target) + make_prompt_cache(target)
    for turn, prompt in enumerate((PROMPT, NEXT)):
        steps = list(
            generate_step(
                prompt, target, max_tokens=10, draft_model=target, num_draft_tokens=4, temp=1.0, prompt_cache=caches
            )
        )
        assert sum(step[2] for step in steps) == 8  # of 10 in rounds of 4 and 1: all that were drafted
        assert {c.offset for c in caches} == {len(PROMPT) + turn * len(NEXT) + 10 * (turn + 1)}


def test_a_prompt_is_only_read(pair):
    target, _ = pair
    cache = make_prompt_cache(target)
    assert ours(target, max_tokens=0, prompt_cache=cache) == []
    assert cache[0].offset == len(PROMPT)


def test_rotating_caches(hosted):
    """Wrapped several times: the text is plain decoding's; mlx-lm refuses to speculate there."""
    for model in (hosted[0], random_model("llama", "f32")):
        options = {"max_kv_size": 16, "prefill_step_size": 4, "temp": 1.0, "seed": 3, "rule": "coupled"}
        drafted = list(generate_step(PROMPT, model, max_tokens=60, draft_model=model, num_draft_tokens=4, **options))
        assert [step[0] for step in drafted] == ours(model, max_tokens=60, **options)
        assert any(step[2] for step in drafted)
    cache = make_prompt_cache(hosted[0], 16)
    theirs(hosted[0], max_tokens=20, prompt_cache=cache)
    refused = speculative_generate_step(mx.array(NEXT), *hosted, prompt_cache=cache + make_prompt_cache(hosted[1]))
    try:
        tokens = [int(token) for token, *_ in refused]
    except ValueError as error:
        assert "trimmable" in str(error)
    else:  # an older one, which goes on from a wrong place
        assert tokens != ours(hosted[0], NEXT, prompt_cache=cache)


needs_xtc = pytest.mark.skipif(
    "xtc_probability" not in inspect.signature(make_sampler).parameters,
    reason="this mlx-lm has no XTC, and other samplers",
)


def test_samplers_of_any_version():
    assert recognised(make_sampler(temp=0.0)) == {"temp": 0.0}
    assert recognised(make_sampler(temp=0.7)) == {"temp": 0.7}
    assert recognised(lambda scores: mx.argmax(scores, axis=-1)) is None


@needs_xtc
def test_samplers_that_are_recognised():
    for options in (
        {"temp": 0.0},
        {"temp": 0.7},
        {"temp": 0.7, "top_p": 0.9},
        {"temp": 1.2, "top_p": 0.8, "min_p": 0.05, "top_k": 7},
    ):
        assert recognised(make_sampler(**options)) == {
            name: value for name, value in options.items() if value or name == "temp"
        }
    assert recognised(make_sampler(temp=1.0, xtc_probability=0.5, xtc_threshold=0.1)) is None
    assert recognised(make_sampler(temp=1.0, min_p=0.1, min_tokens_to_keep=3)) is None


@needs_xtc
def test_recognised_samplers_have_the_same_law(pair):
    target, draft = pair
    options = {"temp": 0.9, "top_p": 0.9, "min_p": 0.02, "top_k": 20}
    drafting = {"draft_model": draft, "num_draft_tokens": 3, "seed": 5, "max_tokens": 30}
    assert ours(target, sampler=make_sampler(**options), **drafting) == ours(target, **options, **drafting)
    assert ours(target, sampler=make_sampler(temp=0.9), **drafting) != ours(target, **options, **drafting)
    assert ours(target, sampler=make_sampler(temp=0.0), max_tokens=20) == ours(target, max_tokens=20)


def test_a_drafts_law_is_truncated_like_the_targets():
    """In MLX's graph as in csrc, up to rounding."""
    from specfast import _core

    logits = 3 * np.random.default_rng(0).standard_normal((5, 200)).astype(np.float32)
    for law in (
        _core.Law(0.8, temper_last=True),
        _core.Law(1.3, 12, temper_last=True),
        _core.Law(1.0, 0, 0.85, temper_last=True),
        _core.Law(0.7, 0, 1.0, 0.1, temper_last=True),
        _core.Law(0.7, 9, 0.9, 0.05, temper_last=True),
    ):
        q = np.asarray(mx.softmax(rows_law(mx.array(logits), law), axis=-1))
        np.testing.assert_allclose(q, _core.law_rows(logits, law), atol=2e-6)


def test_unknown_samplers_decide_by_equality(pair):
    """Whatever a sampler does, the text is made of its own draws; a notice says so."""
    target, draft = pair

    def second(scores):  # a law that no option of ours describes
        return mx.argsort(scores, axis=-1)[:, -2]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(target, max_tokens=25, sampler=second)
        assert ours(target, max_tokens=25, sampler=second) == expected
        for drafting in ({"draft_model": target}, {"draft_model": draft}, {"drafter": "suffix"}):
            steps = list(generate_step(PROMPT, target, max_tokens=25, sampler=second, num_draft_tokens=4, **drafting))
            assert [step[0] for step in steps] == expected
            if drafting.get("draft_model") is target:
                assert sum(step[2] for step in steps) == 20
    with pytest.warns(UserWarning, match="only samples of this sampler's law are known"):
        generate_step(PROMPT, target, sampler=second)


@needs_xtc
def test_an_unknown_sampler_keeps_its_law():
    """XTC by mlx-lm's own function, over its random stream: drafted or not, the same law of the first token."""
    from scipy.stats import chi2_contingency

    target, draft = (host_model("phi3", seed) for seed in (0, 1))
    sampler = make_sampler(temp=1.0, xtc_probability=0.5, xtc_threshold=0.02)

    def counts(sampler, draws=2000 if FULL else 200, **drafting):
        found = np.zeros(VOCAB)
        mx.random.seed(0)
        for _ in range(draws):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[next(generate_step(PROMPT[:3], target, max_tokens=2, sampler=sampler, **drafting))[0]] += 1
        return found

    plain = counts(sampler)
    drafted = counts(sampler, draft_model=draft, num_draft_tokens=2)
    other = counts(
        make_sampler(temp=1.0, xtc_probability=1.0, xtc_threshold=0.02), draft_model=draft, num_draft_tokens=2
    )

    def chance(a, b):
        often = (a + b) > 10
        table = np.stack([np.append(x[often], x[~often].sum() + 0.5) for x in (a, b)])
        return chi2_contingency(table).pvalue

    assert chance(plain, drafted) > 1e-6
    assert chance(plain, other) < 1e-6


def test_progress(pair):
    calls = []
    ours(pair[0], max_tokens=2, prefill_step_size=4, prompt_progress_callback=lambda *c: calls.append(c), logprobs=True)
    assert calls == [(0, 11), (4, 11), (8, 11), (10, 11), (11, 11)]
    calls.clear()
    ours(pair[0], max_tokens=0, prompt_progress_callback=lambda *c: calls.append(c))
    assert calls == [(0, 11), (10, 11), (11, 11)]


def test_an_interrupted_prompt_is_not_read_on(pair):
    """An error leaves in a caller's caches whole passes, and runs no more."""
    cache, calls = make_prompt_cache(pair[0]), []

    def interrupt(done, _):
        calls.append(done)
        if done == 8:
            raise KeyboardInterrupt

    options = {"prefill_step_size": 4, "prompt_cache": cache, "prompt_progress_callback": interrupt}
    with pytest.raises(KeyboardInterrupt):
        ours(pair[0], max_tokens=2, **options)
    assert calls == [0, 4, 8]
    assert {c.offset for c in cache} == {8}
    expected = theirs(pair[0], max_tokens=4)
    assert ours(pair[0], PROMPT[8:], max_tokens=4, prompt_cache=cache) == expected


def test_refusals(pair):
    target, _ = pair
    for options, words in (
        ({"input_embeddings": mx.zeros((1, 4))}, "input_embeddings"),
        ({"max_tokens": -2}, "max_tokens is -2"),
        ({"drafter": "model"}, "needs a draft model"),
        ({"drafter": "oracle"}, "drafter is 'oracle'"),
        ({"drafter": "early-exit"}, "needs a layer"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0"),
        ({"sampler": make_sampler(0.5), "temp": 0.4}, "one or the other"),
        ({"rule": "fair"}, "rule is 'fair'"),
        ({"rule": "block", "lenience": 1.5}, "takes lenience 1"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"num_draft_tokens": 2.5}, "num_draft_tokens is 2.5, but must be a whole number in 1 to 20, or 'auto'"),
        ({"num_draft_tokens": True}, "num_draft_tokens is True"),
        ({"early_exit": 2.5}, "early_exit is 2.5"),
        ({"early_exit": "x"}, "early_exit is 'x'"),
        ({"early_exit": 1, "drafter": "suffix"}, "two ways to draft"),
        ({"early_exit": 1, "draft_model": target}, "two ways to draft"),
        ({"prefill_step_size": 1.5}, "prefill_step_size is 1.5, but must be a whole number, at least 1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"temp": "x"}, "temperature is 'x'"),
        ({"kv_bits": 0}, "kv_bits is 0"),
        ({"kv_bits": 7}, "kv_bits is 7"),
        ({"kv_bits": 8.0}, "kv_bits is 8.0"),
        ({"kv_bits": 4, "kv_group_size": 0}, "kv_group_size is 0"),
        ({"kv_group_size": -1}, "kv_group_size is -1"),
        ({"quantized_kv_start": -1}, "quantized_kv_start is -1"),
        ({"max_kv_size": 0}, "max_kv_size is 0, but must be at least 5"),
        ({"max_kv_size": 8.5}, "max_kv_size is 8.5"),
        ({"sampler": 4}, "sampler is 4"),
        ({"logits_processors": 4}, "logits_processors is 4"),
        ({"prompt_progress_callback": 4}, "prompt_progress_callback is 4"),
        ({"prompt_cache": []}, "holds 0 caches, but the model needs 2"),
        ({"prompt_cache": [1]}, r"prompt_cache is \[1\]"),
        ({"draft_model": "x"}, "draft_model is 'x', but must be a model"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            generate_step(PROMPT, target, **options)
    with pytest.raises(TypeError, match="no_such_option"):
        generate_step(PROMPT, target, no_such_option=1)
    for prompt, words in (
        ([], "0 tokens"),
        (None, "of type NoneType, but must be text or token ids"),
        (["a"], "holds 'a'"),
        ([1.5, 2], "holds 1.5"),
        (b"import", "of type bytes"),
        (mx.array([[1, 2]]), r"holds \[1, 2\]"),
        ("import", "encode it first"),
        ([{"role": "user", "content": "import"}], "encode it first"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            generate_step(prompt, target)
    with pytest.raises(ConfigurationError, match="model is None"):
        generate_step(PROMPT, None)


def test_what_user_code_gives_back_is_checked(pair):
    target, draft = pair
    with pytest.raises(ShapeError, match=r"a logits processor gave None, but must give .* \(1, \d+\)"):
        ours(target, max_tokens=3, logits_processors=[lambda tokens, logits: None])
    with pytest.warns(UserWarning, match="only samples"):
        steps = generate_step(PROMPT, target, max_tokens=3, sampler=lambda scores: 3)
    with pytest.raises(ShapeError, match="the sampler gave 3, but must give one token"):
        next(steps)
    with pytest.raises(ConfigurationError, match="kv_bits is 4 in groups of 128, which MLX refuses"):
        ours(target, max_tokens=3, kv_bits=4, kv_group_size=128, quantized_kv_start=0)
    assert ours(target, draft_model=draft, num_draft_tokens="auto", max_tokens=9) == ours(target, max_tokens=9)


@pytest.mark.parametrize("drafted", [False, True])
def test_mlx_seeds_a_request(pair, drafted):
    target, draft = pair
    options = {"draft_model": draft, "num_draft_tokens": 3} if drafted else {}
    texts = []
    for seed in (3, 3, 4):
        mx.random.seed(seed)
        texts.append([ours(target, max_tokens=20, temp=1.0, **options) for _ in range(2)])
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_two_requests_on_one_cache_are_noticed(pair):
    cache = make_prompt_cache(pair[0])
    first, second = (generate_step(PROMPT, pair[0], max_tokens=20, prompt_cache=cache) for _ in range(2))
    next(first)
    next(second)
    offset = cache[0].offset
    with pytest.raises(ShapeError, match=f"offset is {offset}, but this text left it at 11"):
        next(first)
    next(second)
    second.close()
    assert {c.offset for c in cache} == {2 * len(PROMPT) + 2}
    third = generate_step(PROMPT, pair[0], max_tokens=20, prompt_cache=cache)
    next(third)
    held = ours(pair[0], NEXT, max_tokens=4, prompt_cache=cache)
    offset = cache[0].offset
    third.close()  # leaves alone what is another request's by now
    assert len(held) == 4
    assert {c.offset for c in cache} == {offset}


def test_a_broken_draft_is_told(hosted):
    target, draft = hosted
    broken = host_model("mixtral", 1)
    broken.update(tree_map(lambda array: array * float("nan"), broken.parameters()))
    expected = ours(target, max_tokens=12)
    with pytest.warns(RuntimeWarning, match="drafting failed.*the draft's logits hold NaN"):
        assert ours(target, draft_model=broken, num_draft_tokens=3, max_tokens=12) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours(target, draft_model=draft, num_draft_tokens=3, max_tokens=12) == expected


UNFINISHED = """
import sys
import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache
from specfast import embedded
from specfast.mlx import generate_step, stream_generate

mx.set_default_device(mx.cpu)
model, tokenizer = mlx_lm.load(str(embedded.path("target")))
cache = make_prompt_cache(model)

def processor(tokens, logits):
    return logits

def unfinished():
    processors = [processor] if sys.argv[1] == "processor" else []
    begun = stream_generate(model, tokenizer, "import os", 30, prompt_cache=cache, logits_processors=processors)
    next(begun)
    return 1 / 0

if sys.argv[1] == "step":
    begun = generate_step([1, 2, 3], model, max_tokens=30, prompt_cache=cache)
elif sys.argv[1] == "stream":
    begun = stream_generate(model, tokenizer, "import os", 30, prompt_cache=cache)
else:
    unfinished()
next(begun)
"""


@pytest.mark.parametrize("unfinished", ["stream", "step", "processor", "exception"])
def test_python_ends_with_an_unfinished_request(unfinished):
    command = [sys.executable, "-c", UNFINISHED, unfinished]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if unfinished in ("stream", "step"):
        assert (run.returncode, run.stderr) == (0, "")
    else:
        assert run.returncode == 1
        assert run.stderr.strip().endswith("ZeroDivisionError: division by zero")

"""Any mlx-lm architecture through its own forward pass: the law, drafters, and caches that go back exactly."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_hosts import HOSTS, ROTATING, VOCAB, WINDOW, host_model  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_models import logits_of, random_model, speculative_generate_step  # noqa: E402
from random_laws import FULL  # noqa: E402
from specfast import ConfigurationError, UnsupportedModelError  # noqa: E402
from specfast.mlx import generate_step, report  # noqa: E402
from specfast.mlx.host import Draws, HostDrafter, HostTarget  # noqa: E402
from specfast.mlx.options import Options  # noqa: E402
from specfast.mlx.requests import begin  # noqa: E402
from specfast.mlx.sequence import CacheSequence, rotates_exactly  # noqa: E402

PROMPT = np.random.default_rng(0).integers(0, VOCAB, 9).tolist()


@pytest.fixture(autouse=True)
def _cpu():
    mx.set_default_device(mx.cpu)


@pytest.fixture(scope="module")
def models():
    """Target and another draft of the same architecture, made once."""
    made = {}

    def get(name, seed=0):
        if (name, seed) not in made:
            made[name, seed] = host_model(name, seed)
        return made[name, seed]

    return get


def one_by_one(model, tokens, cache=None):
    """Logits of plain decoding: a pass for every token."""
    cache = make_prompt_cache(model) if cache is None else cache
    return np.concatenate([logits_of(model, [token], cache) for token in tokens])


def tokens_of(model, max_tokens=40, **options):
    return [step[0] for step in generate_step(PROMPT, model, max_tokens=max_tokens, **options)]


def drafted_of(model, max_tokens=40, **options):
    steps = list(generate_step(PROMPT, model, max_tokens=max_tokens, **options))
    return [step[0] for step in steps], sum(step[2] for step in steps)


@pytest.mark.parametrize("name", HOSTS)
def test_a_seeds_text_does_not_depend_on_the_draft(models, name):
    """Coupled, so that the text is the plain one wherever the host gives a row the same result in passes of any size."""
    model = models(name)
    options = {"temp": 1.0, "seed": 3, "rule": "coupled"}
    plain = tokens_of(model, **options)
    assert report(model).path == "stock"
    assert len(set(plain)) > 5
    for drafting in (
        {"drafter": "suffix", "num_draft_tokens": 3},
        {"draft_model": model, "num_draft_tokens": 4},
        {"draft_model": models(name, 1), "num_draft_tokens": 4, "drafter": "combined"},
    ):
        tokens, drafted = drafted_of(model, **options, **drafting)
        assert tokens == plain, drafting
        if drafting.get("draft_model") is not model:
            assert drafted < 32
        elif rotates_exactly(0) or name not in ROTATING:
            assert drafted == 32
    assert tokens_of(model, temp=1.0, seed=4, rule="coupled") != plain


@pytest.mark.parametrize("name", HOSTS)
def test_caches_hold_what_was_given_out(models, name):
    """A caller's caches after any number of tokens, drafts rejected in between, against reading these tokens at once."""
    model, draft = models(name), models(name, 1)
    following = np.random.default_rng(5).integers(0, VOCAB, 6)
    for taken in (1, 4, 17, 30):
        cache = make_prompt_cache(model)
        steps = generate_step(
            PROMPT, model, max_tokens=30, draft_model=draft, num_draft_tokens=4, temp=1.5, seed=7, prompt_cache=cache
        )
        tokens = [next(steps)[0] for _ in range(taken)]
        steps.close()
        expected = one_by_one(model, [*PROMPT, *tokens, *following])[-6:]
        np.testing.assert_allclose(one_by_one(model, following, cache), expected, atol=2e-4)
        other = one_by_one(model, [*PROMPT, *tokens[:-1], *following])[-6:]  # one token fewer would be seen
        assert np.abs(other - expected).max() > 1e-2


@pytest.mark.parametrize("name", HOSTS)
def test_rows_are_undone(models, name):
    """At every place of a round, twice, before and after a sliding window has wrapped."""
    model = models(name)
    text = np.random.default_rng(6).integers(0, VOCAB, 60)
    for length in (5, WINDOW - 2, 40):
        for kept in range(5):
            sequence = CacheSequence(model, make_prompt_cache(model))
            sequence.read(text[:length].tolist(), 1)
            sequence.begin()
            mx.eval(sequence.run(mx.array(text[-4:])))
            sequence.keep(kept)
            assert sequence.length in (length, length + kept)
            sequence.undo()
            assert sequence.length == length
            logits = one_by_one(model, text[length : length + 8], sequence.caches)
            expected = one_by_one(model, text[: length + 8])[-8:]
            np.testing.assert_allclose(logits, expected, atol=2e-4)


def test_a_failing_pass_leaves_the_caches(models):
    if "falcon_h1" not in HOSTS:
        pytest.skip("this mlx-lm has no Falcon-H1")
    model = models("falcon_h1")
    sequence = CacheSequence(model, make_prompt_cache(model))
    sequence.read(PROMPT, 512)

    class Failing:
        def __call__(self, tokens, cache):
            model(tokens, cache=cache)
            cache[1].caches[1].offset += 1
            raise KeyboardInterrupt

    good, sequence._model = sequence._model, Failing()
    sequence.begin()
    with pytest.raises(KeyboardInterrupt):
        sequence.run(mx.array([1, 2, 3]))
    sequence.undo()
    sequence._model = good
    assert sequence.length == len(PROMPT)
    logits = np.asarray(sequence.run(mx.array([4, 5])))
    np.testing.assert_allclose(logits, logits_of(model, [*PROMPT, 4, 5])[-2:], atol=2e-4)


def chi_square(counts, p):
    """The statistic and its limit at a false-alarm rate of 1e-6; rare tokens are taken together."""
    from scipy.stats import chi2

    expected = p * counts.sum()
    often = expected > 5
    observed, wanted = (np.append(x[often], x[~often].sum()) for x in (counts, expected))
    wanted = np.maximum(wanted, 1e-9)
    return ((observed - wanted) ** 2 / wanted).sum(), chi2.isf(1e-6, len(observed) - 1)


@pytest.mark.parametrize(
    ("name", "rule"), [("mamba", "token"), ("mamba", "block"), ("mamba", "coupled"), ("mixtral", "block")]
)
def test_the_law_of_a_drafted_token(models, name, rule):
    """Over seeds, against the model's own law; a wrong temperature is caught."""
    model, draft = models(name), models(name, 1)
    seeds = 4000 if FULL else 700
    p = laws(model, PROMPT[:3], 1.5)

    def counts(temp):
        found = np.zeros(VOCAB)
        for seed in range(seeds):
            options = {"draft_model": draft, "num_draft_tokens": 2, "temp": temp, "seed": seed, "rule": rule}
            found[next(generate_step(PROMPT[:3], model, max_tokens=3, **options))[0]] += 1
        return found

    value, limit = chi_square(counts(1.5), p)
    assert value < limit
    if rule == "token":
        value, limit = chi_square(counts(0.5), p)
        assert value > limit


def laws(model, tokens, temp):
    logits = logits_of(model, tokens)[-1].astype(np.float64) / temp
    p = np.exp(logits - logits.max())
    return p / p.sum()


def test_rejection_sampling_beside_mlx_lm(models):
    """At temperature 1 with itself as a draft: mlx-lm keeps a token where two samples are equal, which is rare."""
    from mlx_lm.sample_utils import make_sampler

    model = models("phi3")
    for target in (model, random_model("llama", "f32", vocab_size=1024)):
        tokens = [1, 2, 3]
        ours = [
            s[2]
            for s in generate_step(tokens, target, max_tokens=100, draft_model=target, num_draft_tokens=4, temp=1.0)
        ]
        drafted = [ours[at] for at in range(len(ours)) if at % 5 != 4]
        assert np.mean(drafted) >= 0.99
    mx.random.seed(0)
    theirs = speculative_generate_step(
        mx.array(tokens), target, target, max_tokens=200, num_draft_tokens=4, sampler=make_sampler(temp=1.0)
    )
    tested, kept = 0, 0
    for _, _, *from_draft in theirs:
        if not from_draft:
            pytest.skip("this mlx-lm does not say what was drafted")
        tested, kept = tested + 1, kept + from_draft[0]
    rounds = tested - kept
    assert kept / (4 * rounds) < 0.1


def test_one_evaluation_a_round(models, monkeypatch):
    """Draft, pass, law and log-probabilities are one graph: what waits for the device is counted."""
    model, draft = models("gemma2"), models("gemma2", 1)
    waits = []
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(1), evaluate(*arrays))[1])
    request = begin(model, draft, PROMPT, 40, (), Options(temp=1.0, num_draft_tokens=4, seed=1))
    rounds = sum(1 for _ in request.generation)
    assert rounds >= 8
    assert len(waits) == rounds + 2  # and one for the prompt, of each model


def test_drafted_rows_are_lazy(models):
    """Nothing in a drafter waits: its tokens are still a graph when it is done."""
    model = models("gemma2")
    sequence = CacheSequence(model, make_prompt_cache(model))
    request = begin(model, None, PROMPT, 4, (), Options(temp=1.0, seed=1, num_draft_tokens=3))
    drafter = HostDrafter(sequence, request.target._draws, 512, VOCAB)
    assert isinstance(request.target, HostTarget)
    proposal = drafter.propose(request.generation.context, None, 3)
    assert proposal.laws is not None
    assert proposal.gamma == 3
    assert proposal.q.shape == (3, VOCAB)
    np.testing.assert_allclose(proposal.q.sum(1), 1, atol=1e-5)
    assert isinstance(request.target._draws, Draws)


def test_quantised_caches(models):
    """Drafting stops short of where a cache is quantised, so that the text is plain decoding's."""
    model = models("phi3")
    for start in (0, 5, 20):
        options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start, "temp": 1.0, "seed": 2}
        model_options = {"rule": "coupled", **options}
        plain = tokens_of(model, **model_options)
        tokens, drafted = drafted_of(model, draft_model=model, num_draft_tokens=4, **model_options)
        assert tokens == plain
        assert drafted > 20


def test_early_exit_needs_the_native_path(models):
    with pytest.raises(UnsupportedModelError, match=r"early exit needs the native path.*gemma2"):
        generate_step(PROMPT, models("gemma2"), early_exit=1)
    with pytest.raises(ConfigurationError, match="early exit does not go with logprobs"):
        generate_step(PROMPT, random_model("llama", "f32"), early_exit=1, logprobs=True)


def test_stats_name_the_path(models):
    request = begin(models("mamba"), models("mamba", 1), PROMPT, 24, (), Options(temp=1.0, num_draft_tokens=4, seed=1))
    assert request.path == "host"
    list(request.generation)
    stats = request.stats()
    assert stats["path"] == "host"
    assert stats["precision"] == "float32"
    assert stats["lossless"]
    assert stats["rule"] == "block"
    assert stats["reread_tokens"] > 0
    assert stats["target_passes"] >= stats["rounds"]

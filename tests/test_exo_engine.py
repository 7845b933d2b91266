"""exo's engine contract on tiny checkpoints: specfast's own tokens, many or one a step, whatever happens to requests."""

import asyncio
import inspect
import json
import shutil

import numpy as np
import pytest
from exo_home import EOT, SPECIAL, deep_decoder, drafting
from exo_session import DRAFT, GREEDY, OTHER, OTHER_DRAFT, SMALL, TARGET, Reference, Session, fake_exo, is_home
from exo_session import repository as repository_of
from specfast import ConfigurationError, UnsupportedModelError
from specfast.exo import contract, options, requests
from specfast.exo.engine import SpeculativeEngine
from specfast.exo.models import ENGINE_CLASSES, ExoModels
from tiny_directories import byte_level

TEXTS = ["def main(path):", "héllo wörld", "x = 1", "  a  b\tc\n", "return"]
MLX = ENGINE_CLASSES["mlx"]
LONG = "def main(path): return " * 60


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two families of a target and two drafts that often agree, with token maps of their own."""
    root = tmp_path_factory.mktemp("exo")
    with pytest.MonkeyPatch.context() as patch, fake_exo(hook=False):
        home = is_home(root, patch)
        for seed, (target, *drafts), tokenizer in (
            (5, (TARGET, DRAFT, SMALL), byte_level(*SPECIAL, start=None)),
            (6, (OTHER, OTHER_DRAFT, "qwen-2.5-0.5b"), byte_level(*SPECIAL, "<|im_end|>", start=None)),
        ):
            decoder = deep_decoder(3, seed=seed)
            home.add(repository_of(target, MLX), decoder, tokenizer=tokenizer, max_context=1024)
            for draft, noise in zip(drafts, (0.05, 0.5), strict=True):
                model = drafting(decoder, noise=noise)
                home.add(repository_of(draft, MLX), model, tokenizer=tokenizer, max_context=1024)
    return root


@pytest.fixture
def home(checkpoints, monkeypatch):
    with fake_exo():
        yield is_home(checkpoints, monkeypatch)


@pytest.fixture
def own_home(checkpoints, tmp_path, monkeypatch):
    """A copy of the checkpoints that a test may change."""
    shutil.copytree(checkpoints / "home", tmp_path / "home")
    with fake_exo():
        yield is_home(tmp_path, monkeypatch)


@pytest.fixture(params=["many", "one"])
def steps(request, monkeypatch):
    """Whether exo's node is the one known, and takes several tokens a step, or another, which takes one."""
    if request.param == "one":
        monkeypatch.setitem(contract.ATTRIBUTES, "exo.orchestration.node", {"": ("something_else",)})
    return request.param


def folder(home, model):
    return home.folder(repository_of(model, MLX))


def reference(home, target=TARGET, draft=None, **typed):
    return Reference(folder(home, target), draft and folder(home, draft), **typed)


def pair(**more):
    return {"target_model": TARGET, "draft_model": DRAFT, **GREEDY, **more}


def test_the_engine_has_the_complete_contract(home):
    session = Session(pair())
    engine = session.engine
    base = inspect.getmodule(type(engine)).InferenceEngine
    assert isinstance(engine, base)
    assert type(engine).__name__ == contract.CLASS_NAME
    assert not type(engine).__abstractmethods__
    for name in base.__abstractmethods__:
        assert inspect.iscoroutinefunction(getattr(engine, name))
    assert engine.shard is engine.tokenizer is None

    async def use():
        shard = session.node.get_current_shard(session.shard(TARGET))
        await engine.ensure_shard(shard)
        assert (engine.shard, engine.tokenizer.eos_token_id) == (shard, EOT)
        tokens = await engine.encode(shard, TEXTS[0])
        assert (tokens.ndim, tokens.dtype) == (1, np.int64)
        assert await engine.decode(shard, tokens) == TEXTS[0]
        result, state = await engine.infer_prompt("one", shard, TEXTS[0], {"other": "state"})
        assert (result.shape[0], result.dtype, state) == (1, np.int64, {"other": "state"})
        token = await engine.sample(result, temp=0.7)
        assert token.item() == result[0, -1]
        await engine.save_session("key", 1)
        await engine.clear_session()
        assert engine.session == {}
        for refused in (engine.load_checkpoint(shard, "path"), engine.train("one", shard), engine.evaluate()):
            with pytest.raises(ConfigurationError, match="mlx or tinygrad"):
                await refused
        await engine.cleanup()

    asyncio.run(use())


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_plain_greedy_decoding(home, steps, text):
    session = Session(pair())
    assert asyncio.run(session.ask(text)) == reference(home)(text, **GREEDY, disabled=True)
    most = max(len(tokens) for _, tokens, _ in session.events)
    assert (most > 1) == (steps == "many")
    assert session.stats["target_passes"] < 24
    assert [finished for *_, finished in session.events].count(True) == 1
    assert session.node.outstanding_requests == {}
    assert [token for _, tokens, _ in session.node.broadcasts for token in tokens] == session.tokens()


def test_a_host_that_differs_gets_one_token_a_step(home, monkeypatch, capfd):
    monkeypatch.setitem(contract.ATTRIBUTES, "exo.orchestration.node", {"": ("something_else",)})
    session = Session(pair())
    assert not session.engine.emits_many
    assert "something_else" in capfd.readouterr().err
    asyncio.run(session.ask("x"))
    assert all(len(tokens) == 1 for _, tokens, _ in session.events)


def test_an_end_token_ends_the_answer(own_home, steps):
    text = TEXTS[0]
    expected = reference(own_home)(text, **GREEDY, max_tokens=200)
    common = expected[10]
    for model in (TARGET, DRAFT):
        decoder = deep_decoder(3)
        decoder = decoder if model == TARGET else drafting(decoder)
        decoder.head[EOT] = 1.01 * decoder.head[common]
        own_home.add(repository_of(model, MLX), decoder, max_context=1024)
    until = expected[: expected.index(common)]
    session = Session(pair(), max_tokens=100)
    assert asyncio.run(session.ask(text)) == [*until, EOT]
    assert session.events[-1][2] is True
    assert session.stats["under_way"] == 0


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_the_hosts_limit_ends_the_answer(home, steps, limit):
    expected = reference(home)(TEXTS[0], **GREEDY)
    options._command_line = options.CommandLine(pair(), max_tokens=100)
    session = Session(max_tokens=limit)
    assert asyncio.run(session.ask(TEXTS[0])) == expected[:limit]
    assert session.node.outstanding_requests == {}


@pytest.mark.parametrize("limit", [1, 7])
def test_a_request_that_reached_the_hosts_limit_is_over(home, steps, limit, capfd):
    session = Session(pair(), max_tokens=limit)
    asyncio.run(session.ask(TEXTS[0]))
    assert (session.stats["under_way"], session.stats["tokens"]) == (0, limit)
    assert "request one" in capfd.readouterr().err


def test_requests_under_way_together_each_have_their_own_answer(home, steps):
    plain = reference(home)
    session = Session(pair())
    assert asyncio.run(session.ask_all(TEXTS)) == [plain(text, **GREEDY) for text in TEXTS]
    order = [who for who, *_ in session.events]
    assert order != sorted(order)
    assert session.stats["under_way"] == 0


def test_requests_that_lose_their_caches_go_on_where_they_were(home, steps, monkeypatch):
    monkeypatch.setattr(requests, "MOST_CACHED", 2)
    plain = reference(home)
    session = Session(pair())
    assert asyncio.run(session.ask_all(TEXTS)) == [plain(text, **GREEDY) for text in TEXTS]
    if steps == "many":
        assert session.stats["prompt_tokens"] > sum(len(plain.tokenizer.encode(text)) for text in TEXTS)
        assert session.stats["tokens"] == 24 * len(TEXTS)


def test_a_seed_gives_the_same_text_whatever_else_is_under_way(home, steps, monkeypatch):
    sampled = {"temperature": 0.7, "seed": 2}
    alone = asyncio.run(Session(pair()).ask(TEXTS[0], **sampled))
    monkeypatch.setattr(requests, "MOST_CACHED", 2)
    assert asyncio.run(Session(pair()).ask_all([TEXTS[0]] * 5, **sampled)) == [alone] * 5


def test_more_requests_than_have_room_wait_and_none_reads_its_prompt_twice(home):
    session = Session(pair())
    texts = [TEXTS[i % len(TEXTS)] for i in range(requests.MOST_CACHED + 5)]
    plain = reference(home)
    assert asyncio.run(session.ask_all(texts)) == [plain(text, **GREEDY) for text in texts]
    assert session.stats["prompt_tokens"] == sum(len(plain.tokenizer.encode(text)) for text in texts)
    assert session.stats["under_way"] == 0


def test_models_nobody_knows_are_refused_at_run_time(home):
    engine = Session(pair()).engine
    for names in (("no-such-model", None), (TARGET, "no-such-draft")):
        with pytest.raises(ConfigurationError, match="is no model of exo's"):
            engine.set_models(*names)
    engine.set_models(TARGET, "none")
    assert engine.resolved.config.draft_model == "none"


def test_the_oldest_of_too_many_requests_is_forgotten(home, monkeypatch):
    monkeypatch.setattr(requests, "MOST_CACHED", 1)
    monkeypatch.setattr(requests, "MOST_KNOWN", 2)
    session = Session(pair())

    async def begin():
        shard = session.node.get_current_shard(session.shard(TARGET))
        for name in "abc":
            await session.engine.infer_prompt(name, shard, "x")
        assert [session.engine.owns(name) for name in "abc"] == [False, True, True]
        with pytest.raises(ConfigurationError, match="send its prompt again"):
            await session.engine.step("a")

    asyncio.run(begin())


def test_a_cancelled_request_ends_and_the_others_go_on(home, steps, capfd):
    session = Session(pair(), max_tokens=200)

    def cancel(request_id, tokens, finished):
        if request_id == "one" and len(session.tokens()) >= 5:
            session.engine.cancel("one")

    session.node.on_token.register("cancel").on_next(cancel)

    async def use():
        one = asyncio.create_task(session.ask(TEXTS[0], request_id="one"))
        two = await session.ask(TEXTS[1], request_id="two")
        while session.engine.owns("one"):
            await asyncio.sleep(0.001)
        await session.settled()
        one.cancel()
        return two

    assert asyncio.run(use()) == reference(home)(TEXTS[1], **GREEDY, max_tokens=200)
    got = [token for token in session.tokens("one") if token != EOT]
    assert 5 <= len(got) < 40
    assert got == reference(home)(TEXTS[0], **GREEDY, max_tokens=200)[: len(got)]
    assert "one" not in session.node.outstanding_requests
    assert "cancelled" in capfd.readouterr().err


def test_a_request_cancelled_while_its_prompt_is_read_gives_no_token(home, steps, monkeypatch):
    session = Session(pair())
    check, seen = requests.Request._stop_if_cancelled, []

    def cancel(request, done, total):
        seen.append(done)
        session.engine.cancel(request.id)
        check(request, done, total)

    monkeypatch.setattr(requests.Request, "_stop_if_cancelled", cancel)

    async def use():
        await session.node.process_prompt(session.shard(TARGET), LONG, request_id="one")
        await session.settled()

    asyncio.run(use())
    assert len(seen) == 1  # of several chunks
    assert session.tokens() == ([] if steps == "many" else [EOT])
    assert session.stats["target_passes"] == session.stats["under_way"] == 0
    assert session.node.outstanding_requests == {}
    monkeypatch.setattr(requests.Request, "_stop_if_cancelled", check)
    assert asyncio.run(session.ask("x", request_id="two")) == reference(home)("x", **GREEDY)


def test_the_requests_own_options_count(home, steps):
    request = {"temperature": 0.7, "seed": 7, "top_p": 0.8, "max_tokens": 9}
    session = Session(pair(), max_tokens=100)
    got = asyncio.run(session.ask(TEXTS[0], **request))
    expected = reference(home, draft=DRAFT)(TEXTS[0], **request)
    assert len(expected) == 9
    assert got == expected if steps == "many" else got == [*expected, EOT]
    other = Session(pair(), max_tokens=9)
    assert asyncio.run(other.ask(TEXTS[0], **{**request, "seed": 8})) != expected


@pytest.mark.parametrize(
    ("typed", "host", "request_", "model", "expected"),
    [
        ({"temperature": 0.5}, {"temperature": 1.5}, {"temperature": 0.3}, TARGET, 0.3),
        ({"temperature": 0.5}, {"temperature": 1.5}, {}, TARGET, 0.5),
        ({}, {"temperature": 1.5}, {}, TARGET, 1.5),
        ({"auto_config": True}, {"temperature": 1.5}, {}, OTHER, 1.5),
        ({"auto_config": True}, {}, {}, OTHER, 0.8),
        ({}, {}, {}, OTHER, 1.0),
    ],
)
def test_the_temperature_is_the_nearest_that_was_given(home, typed, host, request_, model, expected):
    law = {"top_k_threshold": 0.5, "rule": "block"}  # unset, an automatic gamma and a seed would choose another
    typed = {**typed, "disabled": True, **law}
    options._command_line = options.CommandLine(typed, host, max_tokens=24)
    session = Session()
    got = asyncio.run(session.ask(TEXTS[0], model, seed=3, **request_))
    plain = reference(home, model, **law)
    texts = {t: plain(TEXTS[0], seed=3, temperature=t) for t in (0.3, 0.5, 0.8, 1.0, 1.5)}
    assert len({tuple(text) for text in texts.values()}) == 5
    assert got == texts[expected]


def test_the_family_gives_draft_and_options_with_auto_config_only(home):
    for automatic in (True, False):
        session = Session({"auto_config": True, **GREEDY} if automatic else GREEDY)
        assert asyncio.run(session.ask("x", OTHER)) == reference(home, OTHER)("x", **GREEDY)
        draft = session.stats["models"][OTHER]["draft"]
        assert draft in (OTHER_DRAFT, "qwen-2.5-0.5b") if automatic else draft is None
        assert session.stats["drafted"] > 0 or not automatic
        assert "model" not in session.stats["drafters"] or automatic
        assert session.fetched == {OTHER}  # the draft was there


@pytest.mark.parametrize("layers", [1, 2, "auto"])
def test_the_targets_first_layers_can_draft(home, steps, layers):
    session = Session({"target_model": TARGET, "auto_config": True, "early_exit": layers, "gamma": 4, **GREEDY})
    assert asyncio.run(session.ask(TEXTS[0])) == reference(home)(TEXTS[0], **GREEDY, disabled=True)
    stats = session.stats
    assert (stats["draft_model"], stats["model_family_compatibility"]) == (f"early exit {layers}", "compatible")
    assert (stats["lossless"], stats["fallback"], stats["fallbacks"]) == (True, None, 0)
    assert stats["drafted"] > 0
    assert session.fetched == {TARGET}  # and no draft


def test_a_layer_typed_for_one_target_is_not_used_with_another(home):
    for layers, draft in ((1, None), ("auto", "early exit auto")):
        session = Session({"target_model": TARGET, "early_exit": layers, "gamma": 4, **GREEDY})
        assert asyncio.run(session.ask("x", OTHER)) == reference(home, OTHER)("x", **GREEDY)
        assert session.stats["models"][OTHER]["draft"] == draft


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize(("other", "suggested"), [(OTHER, {OTHER_DRAFT, "qwen-2.5-0.5b"}), (SMALL, {None})])
def test_another_model_than_the_target_never_gets_its_draft(home, automatic, other, suggested):
    session = Session(pair(**({"auto_config": True} if automatic else {})))
    plain = reference(home), reference(home, other)

    async def use():
        return await asyncio.gather(session.ask("x", TARGET, "one"), session.ask("x", other, "two"))

    assert asyncio.run(use()) == [model("x", **GREEDY) for model in plain]
    models = session.stats["models"]
    assert models[TARGET]["draft"] == DRAFT
    assert models[other]["draft"] in (suggested if automatic else {None})


def test_disabled_never_looks_for_a_draft(home, monkeypatch):
    asked, find = [], ExoModels.__call__

    def record(models, name, **kind):
        asked.append(name)
        return find(models, name, **kind)

    monkeypatch.setattr(ExoModels, "__call__", record)
    for disabled in (True, False):
        asked.clear()
        session = Session(pair(disabled=disabled, auto_config=True))
        assert asyncio.run(session.ask("x")) == reference(home)("x", **GREEDY)
        assert session.fetched == {TARGET}
        assert set(asked) == ({TARGET} if disabled else {TARGET, DRAFT})
        assert (session.stats["drafted"] == 0) == disabled


def test_an_incompatible_draft_is_told_in_the_documented_words(home, capfd):
    session = Session(pair(draft_model=OTHER_DRAFT))
    assert asyncio.run(session.ask("x")) == reference(home)("x", **GREEDY)
    error = capfd.readouterr().err
    warning = (
        "Warning: Models may be incompatible for speculative decoding:\n"
        f"  Target: {TARGET}, Draft: {OTHER_DRAFT}\n"
        "  Tokens match: False, Vocab match: True\n"
    )
    assert f"\n{warning}" in error
    assert error.count("Warning:") == 1
    stats = session.stats
    assert (stats["model_family_compatibility"], stats["drafted"]) == ("incompatible", 0)
    assert "incompatible draft" in error.splitlines()[-1]


@pytest.mark.parametrize("same", [True, False])
def test_weights_of_a_draft_are_fetched_only_if_its_tokens_are_the_targets(own_home, tmp_path, same):
    draft = DRAFT if same else OTHER_DRAFT
    at = folder(own_home, draft)
    (tmp_path / "remote").mkdir()
    shutil.copytree(at, tmp_path / "remote" / at.name)
    for weights in at.glob("model.safetensors*"):
        weights.unlink()
    session = Session(pair(draft_model=draft))
    session.downloader.remote = tmp_path / "remote"
    assert asyncio.run(session.ask("x")) == reference(own_home)("x", **GREEDY)
    assert session.fetched == ({TARGET, DRAFT} if same else {TARGET})
    assert (session.stats["drafted"] > 0) == same


def test_a_draft_that_cannot_be_fetched_says_so(own_home):
    for weights in folder(own_home, DRAFT).glob("model.safetensors*"):
        weights.unlink()
    session = Session(pair())
    with pytest.raises(ConfigurationError.__base__, match=rf"{DRAFT}.*out of reach"):
        asyncio.run(session.ask("x"))


def rule(text, tokenizer, length):
    """What the stand-in's own engine says."""
    token, tokens = tokenizer.encode(text)[-1], []
    for _ in range(length):
        token = (3 * token + 1) % 320
        tokens.append(token)
        if token == EOT:
            break
    return tokens


def make_unsupported(home, model):
    """Another architecture, by what config.json says."""
    path = folder(home, model) / "config.json"
    other = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    path.write_text(json.dumps(json.loads(path.read_text()) | other))


def test_a_model_the_native_decoder_cannot_run_goes_to_the_hosts_engine(own_home, capfd):
    make_unsupported(own_home, TARGET)
    session = Session(pair(), max_tokens=6)
    answers = asyncio.run(session.ask_all(["x", "def"]))
    tokenizer = reference(own_home, OTHER).tokenizer
    assert answers == [rule(text, tokenizer, 6) for text in ("x", "def")]
    told = [line for line in capfd.readouterr().err.splitlines() if "is decoded plainly by exo's mlx engine" in line]
    assert len(told) == 1
    assert "deepseek" in told[0].lower()
    stats = session.stats
    assert (stats["host_requests"], stats["drafted"], stats["tokens"]) == (2, 0, 0)
    assert stats["fallback"]
    assert stats["fallback"] == stats["models"][TARGET]["fallback"]
    assert stats["model_family_compatibility"] == "compatible"


def test_the_hosts_engine_samples_at_the_same_temperature(own_home):
    make_unsupported(own_home, TARGET)
    session = Session(pair(temperature=0.6), max_tokens=3)
    asyncio.run(session.ask("x", request_id="one"))
    asyncio.run(session.ask("x", request_id="two", temperature=0.4))
    assert session.engine._models.host.temperatures == [0.6] * 3 + [0.4] * 3


@pytest.mark.parametrize("layers", [(0, 0), (1, 1)])
def test_a_part_of_a_model_goes_to_the_hosts_engine(home, layers, capfd):
    from exo.inference.shard import Shard

    session = Session(pair())

    async def use():
        for _ in range(2):
            logits, _ = await session.engine.infer_tensor("one", Shard(TARGET, *layers, 2), np.array([[5, 6]]))
            assert (logits.shape, logits.dtype) == ((1, 2, 320), np.float32)
        assert (await session.engine.sample(logits, temp=0.0)).item() == 19

    asyncio.run(use())
    assert capfd.readouterr().err.count("is decoded plainly") == 1
    assert session.stats["host_requests"] == 1
    assert "layers" in session.stats["fallback"]


def test_a_host_without_its_engine_says_both_reasons(home):
    from exo.inference.shard import Shard

    session, shard = Session(pair(target_engine="tinygrad")), Shard(TARGET, 0, 0, 2)
    asyncio.run(session.engine.ensure_shard(shard))  # exo's, ahead of requests, which say it
    with pytest.raises(UnsupportedModelError, match=r"does not speculate.*tinygrad"):
        asyncio.run(session.engine.encode(shard, "x"))


def test_why_a_request_with_a_seed_is_decoded_plainly_is_said(home, capfd):
    session = Session({"target_model": TARGET})
    asyncio.run(session.ask(TEXTS[0], request_id="seeded", temperature=1.0, seed=4))
    asyncio.run(session.ask(TEXTS[0], request_id="free", temperature=1.0))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("specfast: request ")]
    assert lines[0].endswith("fallback: a seed, and no drafter asked for (--speculative-drafter suffix)")
    assert lines[1].endswith("fallback: none")


def test_models_can_be_changed_at_run_time(home):
    session = Session(pair(), max_tokens=60)
    engine, plain = session.engine, reference(home)

    def change(request_id, tokens, finished):
        if request_id == "one" and engine.resolved.config.draft_model == DRAFT:
            engine.set_models(TARGET, SMALL)

    session.node.on_token.register("change").on_next(change)

    async def use():
        return await session.ask(TEXTS[0], request_id="one"), await session.ask(TEXTS[1], request_id="two")

    assert list(asyncio.run(use())) == [plain(text, **GREEDY, max_tokens=60) for text in TEXTS[:2]]
    assert session.stats["draft_model"] == session.stats["models"][TARGET]["draft"] == SMALL
    assert session.stats["tokens"] == 120
    engine.set_models(OTHER, OTHER_DRAFT)
    assert asyncio.run(session.ask("x", OTHER, "three")) == reference(home, OTHER)("x", **GREEDY, max_tokens=60)
    assert (session.stats["target_model"], session.stats["draft_model"]) == (OTHER, OTHER_DRAFT)


def test_stats_before_anything_is_loaded(home):
    stats = Session(pair()).stats
    assert (stats["target_model"], stats["draft_model"]) == (TARGET, DRAFT)
    assert (stats["model_family_compatibility"], stats["fallback"]) == ("unknown", None)
    assert (stats["acceptance_rate"], stats["host_requests"], stats["under_way"], stats["models"]) == (0.0, 0, 0, {})
    assert Session(GREEDY).stats["target_model"] is None


def test_low_acceptance_is_told_once(own_home, capfd):
    own_home.add(repository_of(DRAFT, MLX), drafting(deep_decoder(2, seed=77)), max_context=1024)
    session = Session(pair())
    said = []
    for i, text in enumerate(TEXTS):
        asyncio.run(session.ask(text, request_id=str(i)))
        said.append(capfd.readouterr().err.count("low acceptance rate"))
        assert sum(said) == (session.stats["drafted"] >= 64)
    assert sum(said) == 1
    assert session.stats["acceptance_rate"] < 0.3


def test_a_good_draft_gets_no_hint(home, capfd):
    session = Session(pair(), max_tokens=80)
    asyncio.run(session.ask(TEXTS[0]))
    assert session.stats["drafted"] >= 64
    assert "low acceptance" not in capfd.readouterr().err


def test_a_change_of_peers_swaps_no_speculative_engine(home):
    session = Session(pair())
    node, statuses = session.node, []
    node.on_opaque_status.register("status").on_next(lambda *status: statuses.append(status))
    node.topology_inference_engines_pool.append(["tinygrad"])
    asyncio.run(node.select_best_inference_engine())
    assert node.inference_engine is session.engine
    types = [json.loads(status)["type"] for _, status in statuses]
    assert types == ["supported_inference_engines", "specfast"]  # and no engine of exo's is told to be another one
    from exo.inference.inference_engine import get_inference_engine

    node.inference_engine = other = get_inference_engine("mlx", session.downloader)
    asyncio.run(node.select_best_inference_engine())
    assert node.inference_engine is not other


def test_other_engines_are_as_ever(home):
    from exo.inference.inference_engine import get_inference_engine, inference_engine_classes
    from exo.models import build_base_shard

    session = Session(pair())
    for name in ("mlx", "dummy"):
        assert type(get_inference_engine(name, session.downloader)).__name__ == inference_engine_classes[name]
    with pytest.raises(ValueError, match="Unsupported"):
        get_inference_engine("other", session.downloader)
    session.node.inference_engine = get_inference_engine("mlx", session.downloader)
    session.node.max_generate_tokens = 5

    async def use():
        await session.node.process_prompt(build_base_shard(TARGET, MLX), "x", request_id="one")
        while session.node.outstanding_requests:
            await asyncio.sleep(0)

    asyncio.run(use())
    assert session.tokens() == rule("x", reference(home).tokenizer, 5)


def test_text_models_are_registered_and_others_not(home):
    for engine, kind in ((None, "mlx-community"), ("mlx", "mlx-community"), ("tinygrad", "plain")):
        with fake_exo():
            Session({**GREEDY, "target_engine": engine})
            assert repository_of(TARGET).startswith(kind)
            assert repository_of("deepseek-v3").startswith("mlx-community")
            for name in ("llava-1.5-7b-hf", "stable-diffusion-2-1-base", "dummy"):
                assert repository_of(name) is None


def test_the_documented_functions_are_where_exo_has_its_own(home):
    from exo.inference.inference_engine import (
        get_inference_engine,
        get_model_family_variants,
        inference_engine_classes,
        suggest_speculative_config,
    )

    config = suggest_speculative_config(TARGET)
    assert DRAFT in get_model_family_variants(TARGET)["suggested_drafts"]
    assert inference_engine_classes["speculative"] == contract.CLASS_NAME
    engine = get_inference_engine("speculative", Session(GREEDY).downloader, config)
    assert isinstance(engine, SpeculativeEngine)
    assert (engine.resolved.config.target_model, engine.resolved.config.gamma) == (TARGET, 6)
    with pytest.raises(ConfigurationError, match="gamma"):
        get_inference_engine("speculative", None, {**config, "gamma": 21})

"""`--speculative-target-engine` and `--speculative-draft-engine`: every pair of hosts has the tokens of plain decoding."""

import asyncio

import pytest
from exo_home import SPECIAL, deep_decoder, drafting
from exo_session import DRAFT, GREEDY, OTHER, TARGET, Reference, Session, fake_exo, is_home, repository
from specfast.config import resolve_config
from specfast.exo import hosts
from specfast.exo.models import ENGINE_CLASSES
from tiny_directories import byte_level

pytest.importorskip("tinygrad")

TEXTS = ["def main(path):", "  a  b\tc\n"]
MLX = ENGINE_CLASSES["mlx"]
ENGINES = ["native", "mlx", "tinygrad"]
PAIR = {"target_model": TARGET, "draft_model": DRAFT, "gamma": 4}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("exo")
    with pytest.MonkeyPatch.context() as patch, fake_exo(hook=False):
        home = is_home(root, patch)
        decoder, tokenizer = deep_decoder(3), byte_level(*SPECIAL, start=None)
        for engine in ENGINE_CLASSES.values():
            home.add(repository(TARGET, engine), decoder, tokenizer=tokenizer, max_context=1024)
            draft = drafting(decoder, noise=0.2)
            home.add(repository(DRAFT, engine), draft, tokenizer=tokenizer, max_context=1024)
        other = deep_decoder(3, architecture="qwen2")
        for name in filter(None, (repository(OTHER, engine) for engine in ENGINE_CLASSES.values())):
            home.add(name, other, architecture="qwen2", tokenizer=tokenizer, max_context=1024)
    return root


@pytest.fixture
def home(checkpoints, monkeypatch):
    with fake_exo():
        yield is_home(checkpoints, monkeypatch)


def installed(engine):
    return engine if all(hosts.importlib.util.find_spec(name) for name in hosts.MODULES.get(engine, ())) else "native"


@pytest.mark.parametrize("draft", ENGINES)
@pytest.mark.parametrize("target", ENGINES)
def test_every_pair_has_the_tokens_of_plain_decoding(home, capfd, target, draft):
    model = Reference(home.folder(repository(TARGET, MLX)), None)
    session = Session({**PAIR, **GREEDY, "target_engine": target, "draft_engine": draft})
    for text in TEXTS:
        assert asyncio.run(session.ask(text, request_id=text)) == model(text, disabled=True, **GREEDY)
    stats = session.stats
    found = stats["models"][TARGET]
    assert (found["engine"], found["draft_engine"]) == (installed(target), installed(draft))
    assert stats["host_requests"] == 0
    assert stats["drafted"] > 0
    assert stats["target_passes"] < stats["tokens"]
    printed = capfd.readouterr().err
    assert f", engine {installed(target)}" in printed
    if installed(target) != installed(draft):
        assert f"drafts {installed(draft)}" in printed


def test_a_seed_has_one_text_on_all_hosts(home):
    texts = [
        asyncio.run(Session({**PAIR, "rule": "coupled", **more}).ask(TEXTS[0], temperature=1.0, seed=5))
        for more in (
            {"disabled": True}, {"target_engine": "tinygrad"}, {"draft_engine": "tinygrad"},
            {"target_engine": "tinygrad", "draft_engine": "mlx"},
        )
    ]  # fmt: skip
    assert all(text == texts[0] for text in texts)
    other = asyncio.run(Session({**PAIR, "rule": "coupled"}).ask(TEXTS[0], temperature=1.0, seed=6))
    assert other != texts[0]


def test_early_exit_on_tinygrads_weights(home):
    session = Session({"target_model": TARGET, "target_engine": "tinygrad", "early_exit": 2, "gamma": 3, **GREEDY})
    model = Reference(home.folder(repository(TARGET, MLX)), None)
    assert asyncio.run(session.ask(TEXTS[0])) == model(TEXTS[0], disabled=True, **GREEDY)
    assert session.stats["models"][TARGET]["engine"] == "tinygrad"
    assert session.stats["drafted"] > 0


def test_what_a_host_cannot_have_runs_natively_and_is_said(home, capfd):
    """Qwen's weights, which exo has for MLX only."""
    session = Session({"target_model": OTHER, "target_engine": "tinygrad", "drafter": "suffix", **GREEDY})
    model = Reference(home.folder(repository(OTHER, MLX)), None)
    assert asyncio.run(session.ask(TEXTS[0], model=OTHER)) == model(TEXTS[0], disabled=True, **GREEDY)
    assert session.stats["models"][OTHER]["engine"] == "native"
    assert "runs in specfast's own decoder, not on its tinygrad host" in capfd.readouterr().err


def test_a_tinygrad_that_is_refused_is_said(home, monkeypatch, capfd):
    def refuse(directory):
        raise ImportError("tinygrad 9 is outside 0.10.2 to 0.14")

    monkeypatch.setitem(hosts._LOADERS, "tinygrad", refuse)
    session = Session({**PAIR, **GREEDY, "target_engine": "tinygrad", "draft_engine": "native"})
    model = Reference(home.folder(repository(TARGET, MLX)), None)
    assert asyncio.run(session.ask(TEXTS[0])) == model(TEXTS[0], disabled=True, **GREEDY)
    assert session.stats["models"][TARGET]["engine"] == "native"
    assert "not on its tinygrad host: tinygrad 9 is outside" in capfd.readouterr().err


def test_without_tinygrad_its_checkpoints_run_natively(home, monkeypatch, capfd):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)
    session = Session({**PAIR, **GREEDY, "target_engine": "tinygrad"})
    assert "native, from tinygrad's checkpoints" in capfd.readouterr().err
    model = Reference(home.folder(repository(TARGET, MLX)), None)
    assert asyncio.run(session.ask(TEXTS[0])) == model(TEXTS[0], disabled=True, **GREEDY)


def test_on_an_apple_gpu_models_run_in_mlx_unless_something_else_was_typed(monkeypatch):
    def where(**typed):
        resolved = resolve_config({"target_model": TARGET, **typed})
        return [hosts.host_of(resolved, role) for role in ("target", "draft")]

    assert where() == ["native", "native"]
    monkeypatch.setattr(hosts, "on_apple_gpu", lambda: True)
    assert where() == [installed("mlx")] * 2
    assert where(target_engine="native") == ["native", "native"]
    assert where(draft_engine="native") == [installed("mlx"), "native"]
    assert where(target_engine="tinygrad") == [installed("tinygrad")] * 2
    assert where(early_exit=2) == ["native", "native"]

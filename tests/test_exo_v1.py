"""exo's second generation, by a stand-in: the same tokens in fewer passes, on demand, and everything else left to exo."""

import importlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mlx_lm")

import _specfast_exo_hook
import mlx_lm
from exo_home import SPECIAL, deep_decoder, drafting
from exo_session import _forget
from exo_v1_home import PYTHON, environment
from specfast.exo import contract, v1, v1_hooks
from tiny_directories import byte_level, write_model

FAKES = Path(__file__).parent / "exo_v1_fakes"
MODEL, DRAFT = "mlx-community/Llama-3.1-8B-Instruct-4bit", "mlx-community/Llama-3.2-1B-Instruct-4bit"
OPTIONS = {"draft_model": DRAFT, "gamma": 4}
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 1.0, "seed": 3}


def task(**options):
    plain = {
        "top_p": 1.0,
        "repetition_penalty": None,
        "stop": None,
        "bench": False,
        "max_output_tokens": 24,
        "seed": None,
    }
    return SimpleNamespace(**{**plain, **options})


@contextmanager
def fake_v1():
    finders = list(sys.meta_path)
    _forget()
    sys.path.insert(0, str(FAKES))
    _specfast_exo_hook.install()
    try:
        yield
    finally:
        sys.meta_path[:] = finders
        sys.path.remove(str(FAKES))
        _forget()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from exo_home import write_chat_tokenizer

    root = tmp_path_factory.mktemp("models")
    decoder = deep_decoder(4)
    for name, weights in ((MODEL, decoder), (DRAFT, drafting(decoder, noise=0.3))):
        folder = root / name.replace("/", "--")
        write_model(folder, weights, eos=301, max_context=1024)
        write_chat_tokenizer(folder, byte_level(*SPECIAL, start=None))
    return root, *mlx_lm.load(str(root / MODEL.replace("/", "--")))


@pytest.fixture
def build(models, monkeypatch):
    root, model, tokenizer = models
    monkeypatch.setenv("EXO_DEFAULT_MODELS_DIR", str(root))
    monkeypatch.setenv("SPECFAST_MEASUREMENTS", "0")
    for name in v1.OWN_SPECULATION:
        monkeypatch.delenv(name, raising=False)

    def made(options=OPTIONS, *, module=None, **more):
        monkeypatch.setenv("SPECFAST_EXO", "0" if options is None else "1")
        monkeypatch.setenv("SPECFAST_EXO_OPTIONS", json.dumps(options or {}))
        builder = importlib.import_module("exo.worker.engines.mlx.builder")
        if options is not None and builder.MlxBuilder.build.__module__ != v1.__name__:
            v1_hooks.after(builder)
        return builder.MlxBuilder(MODEL, model, tokenizer, **more).build()

    with fake_v1():
        yield made


def run(engine, *tasks, text="def main(path):"):
    """Tokens of tasks submitted together, and the most that one had in a step."""
    for i, params in enumerate(tasks):
        engine.submit((i, params, text if i == 0 else f"{text} {i}"))
    tokens, most, left, steps = [[] for _ in tasks], 0, set(range(len(tasks))), 0
    while left:
        steps += 1
        assert steps < 1000
        found = engine.step()
        for i, response in found:
            tokens[i].append(response.token)
            if response.finish_reason is not None:
                left.discard(i)
        most = max([most, *([name for name, _ in found].count(i) for i in range(len(tasks)))])
    return tokens, most


REQUESTS = [
    GREEDY,
    SAMPLED,
    {**SAMPLED, "top_p": 0.9},
    {**SAMPLED, "repetition_penalty": 1.4},
    {**GREEDY, "repetition_penalty": 1.4},
]


@pytest.mark.parametrize("options", REQUESTS, ids=str)
@pytest.mark.parametrize(
    "typed", [OPTIONS, {"drafter": "suffix", "gamma": 3}, {"gamma": "auto", "draft_model": DRAFT}], ids=str
)
def test_tokens_are_exos_own(build, options, typed):
    expected, one = run(build(None), task(**options))
    engine = build(typed)
    found, most = run(engine, task(**options))
    assert found == expected
    assert len(found[0]) == 24
    assert one == 1
    stats = engine._gen._speculation.stats
    assert (stats.tokens, stats.requests) == (24, 1)
    if typed == OPTIONS:
        assert most > 1
        assert stats.target_passes < 24
        assert stats.accepted > 0


def test_an_end_token_and_a_stop_string_end_the_text(build):
    (plain,), _ = run(build(None), task(**GREEDY))
    tokenizer = build(None)._gen.tokenizer
    stop = tokenizer.decode(plain[:9])[-3:]
    expected = run(build(None), task(**GREEDY, stop=stop))[0]
    assert run(build(), task(**GREEDY, stop=stop))[0] == expected
    assert len(expected[0]) < 24
    tokenizer.eos_token_ids.add(plain[7])
    try:
        assert run(build(), task(**GREEDY))[0] == run(build(None), task(**GREEDY))[0]
    finally:
        tokenizer.eos_token_ids.remove(plain[7])


def test_a_prompt_seen_before_is_not_read_again(build):
    engine = build()
    first, second = run(engine, task(**GREEDY))[0], run(engine, task(**GREEDY))[0]
    assert first == second
    assert engine.prefix.hits == 1


@pytest.mark.parametrize("count", [2, 5])
def test_requests_that_come_together_are_exos_batch(build, count):
    expected, _ = run(build(None), *(task(**GREEDY) for _ in range(count)))
    engine = build()
    found, most = run(engine, *(task(**GREEDY) for _ in range(count)))
    assert (found, most) == (expected, 1)
    assert engine._gen._batch.known == count
    assert run(engine, task(**GREEDY))[1] > 1  # alone again


def test_a_request_that_comes_later_is_exos_and_both_end(build):
    expected = [run(build(None), task(**GREEDY), text=text)[0][0] for text in ("one", "two")]
    engine = build()
    engine.submit((0, task(**GREEDY), "one"))
    tokens = {0: [], 1: []}
    for step in range(100):
        if step == 2:
            engine.submit((1, task(**GREEDY), "two"))
        for i, response in engine.step():
            tokens[i].append(response.token)
    assert list(tokens.values()) == expected
    assert engine._gen._batch.known == 1


def test_cancelling_and_closing(build):
    engine = build()
    engine.submit(
        (
            0,
            task(
                **GREEDY,
            ),
            "one",
        )
    )
    engine.step()
    (uid,) = engine.names
    engine._gen.cancel([uid])
    assert not engine._gen.has_work
    assert run(engine, task(**GREEDY))[0] == run(build(None), task(**GREEDY))[0]
    engine._gen.close()
    assert engine._gen._batch.closed


def test_what_is_left_to_exo(build, monkeypatch, capfd):
    def kind(**more):
        return type(getattr(build(**more), "_gen", None)).__name__

    assert kind() == "SpeculativeBatch"
    assert kind(options=None) == "ExoBatchGenerator"
    assert kind(group=object()) == "ExoBatchGenerator"
    assert "spread over several nodes" in capfd.readouterr().err
    assert kind(sequential=True) == "NoneType"
    assert "--no-batch" in capfd.readouterr().err
    assert kind(options={"disabled": True}) == "ExoBatchGenerator"
    engine = build()
    expected = run(build(None), task(**GREEDY))[0]
    assert run(engine, task(**GREEDY, bench=True)) == (expected, 1)
    monkeypatch.setattr(v1, "can_roll_back", lambda caches: False)
    assert run(engine, task(**GREEDY), text="other")[1] == 1
    for name in v1.OWN_SPECULATION:
        monkeypatch.setenv(name, "1")
        assert kind() == "ExoBatchGenerator"
        assert f"exo speculates itself ({name})" in capfd.readouterr().err
        monkeypatch.delenv(name)


def test_a_draft_that_fails_or_is_not_there_ends_no_request(build, monkeypatch, capfd):
    expected = run(build(None), task(**GREEDY))[0]
    assert run(build({"draft_model": "/no/such", "gamma": 4}), task(**GREEDY))[0] == expected
    assert "no draft model" in capfd.readouterr().err
    monkeypatch.setattr("specfast.drafters.ModelDrafter.propose", lambda *_: 1 / 0)
    assert run(build(), task(**GREEDY))[0] == expected
    assert "drafting failed" in capfd.readouterr().err


@pytest.mark.parametrize("name", v1.MODULES)
def test_an_exo_that_differs_decodes_plainly(build, monkeypatch, capfd, name):
    monkeypatch.setenv("SPECFAST_EXO", "1")
    module = importlib.import_module(name)
    path = next(iter(v1.MODULES[name]))
    *owner, last = path.split(".")
    holder = getattr(module, owner[0]) if owner else module
    monkeypatch.setattr(holder, last, lambda self, other: None)
    builder = importlib.import_module("exo.worker.engines.mlx.builder")
    before = builder.MlxBuilder.build
    v1_hooks.after(builder)
    assert builder.MlxBuilder.build is before
    assert f"{name}.{path} takes (self other), not (" in capfd.readouterr().err


START = "import _specfast_exo_hook as h, sys; h.install(); import exo.main; a = exo.main.main(); import os; print(a.no_batch, os.environ.get('SPECFAST_EXO'), os.environ.get('SPECFAST_EXO_OPTIONS'), 'specfast.exo' in sys.modules)"


def start(*arguments, code=0, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SPECFAST")}
    done = subprocess.run(
        [sys.executable, "-c", START, *arguments], capture_output=True, text=True, check=False,
        env={**kept, "PYTHONPATH": str(FAKES), **environment},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_the_documents_flags_are_taken_and_handed_on():
    assert start() == "False None None False\n"
    assert start("--no-batch") == "True None None False\n"
    out = start(
        "--speculative-draft-model", "d", "--speculative-gamma", "6", "--inference-engine", "speculative", "--no-batch"
    )
    assert out == 'True 1 {"draft_model": "d", "gamma": 6} True\n'
    assert start("--inference-engine", "mlx", "--speculative-gamma", "6") == "False None None True\n"
    assert "invalid" in start("--speculative-gamma", "99", code=2) or "1 to 20" in start(
        "--speculative-gamma", "99", code=2
    )
    assert "this exo has mlx" in start("--inference-engine", "tinygrad", code=2)
    answer = start("run", "llama-3.1-8b", "--inference-engine", "speculative", "--prompt", "x", code=2)
    assert "place llama-3.1-8b" in answer
    assert "/v1/chat/completions" in answer
    assert "--speculative-draft-model" in start("--speculative-gamma", "2", "--help")


REAL = """
import importlib, json, sys
from specfast.exo import contract, v1
print("\\n" + json.dumps([d for n in v1.MODULES for d in contract.compare(importlib.import_module(n), n, v1.MODULES[n])]))
"""


@pytest.mark.skipif(
    PYTHON is None, reason="SPECFAST_EXO_V1_PYTHON does not name the interpreter of an environment with exo"
)
def test_the_real_exo_agrees_with_the_table(tmp_path):
    (tmp_path / "dashboard").mkdir()
    command = [PYTHON, "-c", REAL]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_stand_in_agrees_with_the_table(build):
    for name, signatures in v1.MODULES.items():
        assert contract.compare(importlib.import_module(name), name, signatures) == []

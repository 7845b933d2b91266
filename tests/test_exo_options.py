"""exo's command line with speculation: what is typed, checked, shown and run."""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from exo_home import SPECIAL, deep_decoder, drafting
from exo_session import DRAFT, FAKES, OTHER, TARGET, Reference, fake_exo, is_home
from exo_session import repository as repository_of
from specfast.config import resolve_config
from specfast.exo import options
from specfast.exo.engine import SpeculativeEngine
from specfast.exo.models import ENGINE_CLASSES
from specfast.exo.serving import _config_of
from tiny_directories import byte_level

SPECULATIVE = ["--inference-engine", "speculative"]
AUTOMATIC = ["--speculative-target-model", TARGET, "--speculative-auto-config"]
FLAGS = {
    "--speculative-target-model": ("target_model", TARGET, TARGET),
    "--speculative-draft-model": ("draft_model", DRAFT, DRAFT),
    "--speculative-target-engine": ("target_engine", "mlx", "mlx"),
    "--speculative-draft-engine": ("draft_engine", "tinygrad", "tinygrad"),
    "--speculative-gamma": ("gamma", "7", 7),
    "--speculative-temperature": ("temperature", "0.5", 0.5),
    "--speculative-top-k": ("top_k_threshold", "0.2", 0.2),
    "--speculative-lenience": ("lenience", "1.5", 1.5),
    "--speculative-early-exit": ("early_exit", "3", 3),
    "--speculative-auto-config": ("auto_config", None, True),
    "--disable-speculative": ("disabled", None, True),
}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts the stand-in with a command line; its main module."""
    is_home(tmp_path, monkeypatch)

    def start(*arguments):
        monkeypatch.setattr("sys.argv", ["exo", *arguments])
        return importlib.import_module("exo.main")

    with fake_exo():
        yield start


def refused(start, capfd, *arguments):
    """What a usage error says."""
    with pytest.raises(SystemExit) as stop:
        start(*arguments)
    assert stop.value.code == 2
    return capfd.readouterr().err


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_reaches_the_configuration(start, flag):
    name, text, value = FLAGS[flag]
    main = start(*SPECULATIVE, flag, *([text] if text else []))
    resolved = main.inference_engine.resolved
    assert isinstance(main.inference_engine, SpeculativeEngine)
    assert (getattr(resolved.config, name), resolved.sources[name]) == (value, "typed")
    assert dict(resolved.typed) == {name: value}


def test_nothing_typed_is_nothing_typed(start):
    main = start(*SPECULATIVE)
    assert set(main.inference_engine.resolved.sources.values()) == {"default"}
    assert (main.args.default_temp, main.args.default_model, main.args.time) == (0.0, None, False)
    assert not options.command_line().host


@pytest.mark.parametrize(
    ("flag", "low", "high", "outside"),
    [
        ("--speculative-gamma", "1", "20", ["0", "21", "-1", "2.5", "many"]),
        ("--speculative-temperature", "0.1", "2.0", ["0.05", "2.1", "-1", "nan", "warm"]),
        ("--speculative-top-k", "0.1", "1.0", ["0.05", "1.1", "40", "inf"]),
        ("--speculative-lenience", "0.5", "2.0", ["0.4", "2.1", "x"]),
    ],
)
def test_values_out_of_range_are_usage_errors(start, capfd, flag, low, high, outside):
    for value in (low, high):
        start(*SPECULATIVE, flag, value)
        sys.modules.pop("exo.main")
    for value in outside:
        error = refused(start, capfd, *SPECULATIVE, f"{flag}={value}")
        assert f"argument {flag}" in error
        assert value in error
        sys.modules.pop("exo.main", None)


@pytest.mark.parametrize("value", ["0", "auto"])
def test_values_beside_the_range(start, value):
    flag = "--speculative-temperature" if value == "0" else "--speculative-gamma"
    config = start(*SPECULATIVE, flag, value).inference_engine.resolved.config
    assert config.temperature == 0 if value == "0" else config.gamma == "auto"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--speculative-target-engine", "cuda"], ["cuda", "mlx, tinygrad"]),
        (["--speculative-early-exit", "0"], ["--speculative-early-exit", "early_exit is 0", "'auto'"]),
        (["--speculative-early-exit", "last"], ["--speculative-early-exit", "'last'", "'auto'"]),
        (
            ["--speculative-target-model", TARGET, "--speculative-early-exit", "2"],
            ["early_exit is 2", "outside 1 to 1", TARGET],
        ),
        (
            ["--speculative-early-exit", "3", "--speculative-draft-model", DRAFT],
            ["early_exit 3", f"draft_model {DRAFT}", "two ways"],
        ),
        (["--speculative-rule", "coupled", "--speculative-lenience", "1.1"], ["coupled", "lenience 1"]),
        (["run", TARGET, "--speculative-target-model", OTHER], [TARGET, OTHER, "different models"]),
        (["--run-model", TARGET, "--speculative-target-model", OTHER], [TARGET, OTHER, "different models"]),
        (["--speculative-target-model", "llama-3.1-8"], ["--speculative-target-model", "'llama-3.1-8'", TARGET]),
        (["--speculative-draft-model", "lama-3.2-3b"], ["--speculative-draft-model", "'lama-3.2-3b'", DRAFT]),
        (["train", TARGET], ["train does not speculate", "mlx or tinygrad"]),
        (["eval", TARGET], ["eval does not speculate", "mlx or tinygrad"]),
    ],
)
def test_what_cannot_be_is_a_usage_error(start, capfd, arguments, words):
    error = refused(start, capfd, *SPECULATIVE, *arguments)
    for word in words:
        assert word in error


@pytest.mark.parametrize("command", ["train", "eval"])
def test_training_with_another_engine_is_exos_business(start, command):
    assert start(command, TARGET, "--inference-engine", "dummy").args.command == command


def test_run_may_name_the_target_too(start):
    assert start("run", TARGET, *SPECULATIVE, "--speculative-target-model", TARGET).args.model_name == TARGET


@pytest.mark.parametrize("name", ["none", "None"])
def test_the_draft_none_is_no_draft_for_any_model(start, name):
    resolved = start(*SPECULATIVE, "--speculative-draft-model", name, *AUTOMATIC).inference_engine.resolved
    assert (resolved.config.draft_model, resolved.sources["draft_model"]) == ("none", "typed")
    for model in (TARGET, OTHER):
        assert _config_of(model, resolved).config.draft_model == "none"
    typed = resolve_config({**resolved.typed, "draft_model": DRAFT})
    assert [_config_of(model, typed).config.draft_model for model in (TARGET, OTHER)] == [DRAFT, None]


def test_a_draft_may_be_a_repository_or_a_directory(start, tmp_path):
    for draft in ("org/model", str(tmp_path)):
        engine = start(*SPECULATIVE, "--speculative-draft-model", draft).inference_engine
        assert engine.resolved.config.draft_model == draft
        sys.modules.pop("exo.main")


def test_help_shows_every_flag_and_range(start, capfd):
    with pytest.raises(SystemExit) as stop:
        start("--help")
    assert stop.value.code == 0
    text = re.sub(r"\s+", " ", capfd.readouterr().out)
    for flag in (*FLAGS, "--time", "--default-model"):
        assert f" {flag} " in text or f"[{flag}]" in text
    for words in ("1-20|auto", "0|0.1-2.0", "0.1-1.0", "0.5-2.0", "or speculative"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "expected", "source"),
    [
        ([], 1.0, "default"),
        (["--default-temp", "0.5"], 0.5, "host"),
        (["--default-temp", "0"], 0.0, "host"),
        (["--default-temp", "0.5", "--speculative-temperature", "0.7"], 0.7, "typed"),
    ],
)
def test_the_hosts_temperature_counts_when_typed(start, arguments, expected, source):
    main = start(*SPECULATIVE, *arguments)
    resolved = main.inference_engine.resolved
    assert (resolved.config.temperature, resolved.sources["temperature"]) == (expected, source)
    assert main.args.default_temp == (float(arguments[1]) if arguments else 0.0)


@pytest.mark.parametrize("value", ["0.05", "3", "-1", "nan"])
def test_a_host_temperature_out_of_range_is_a_usage_error(start, capfd, value):
    assert "temperature" in refused(start, capfd, *SPECULATIVE, f"--default-temp={value}")


@pytest.mark.parametrize("value", ["0.05", "3", "-1"])
def test_a_host_temperature_is_exos_business_with_another_engine(start, value):
    assert start("--inference-engine", "dummy", f"--default-temp={value}").args.default_temp == float(value)


def test_the_default_model_is_the_target(start):
    assert start(*SPECULATIVE, "--speculative-target-model", TARGET).api.default_model == TARGET
    sys.modules.pop("exo.main")
    typed = start(*SPECULATIVE, "--speculative-target-model", TARGET, "--default-model", OTHER)
    assert typed.api.default_model == OTHER


def test_flags_without_the_engine_are_warned_of(start, capfd):
    main = start("--inference-engine", "dummy", "--speculative-gamma", "3", "--speculative-target-model", TARGET)
    (line,) = capfd.readouterr().err.splitlines()
    assert "no effect without --inference-engine speculative" in line
    assert main.args.default_model is None
    sys.modules.pop("exo.main")
    start("--inference-engine", "dummy")
    assert capfd.readouterr().err == ""


def test_exo_as_a_library_has_nothing_typed(start):
    from exo.inference.inference_engine import get_inference_engine

    assert get_inference_engine("speculative", None).resolved.typed == {}


def test_another_programs_parser_is_untouched(start):
    class Registry:
        def __call__(self):
            raise AssertionError("exo's registry was asked for")

    options.watch_parser(Registry())
    other = argparse.ArgumentParser()
    other.add_argument("--gamma")
    assert vars(other.parse_args(["--gamma", "90"])) == {"gamma": "90"}
    assert "--speculative-gamma" not in other.format_help()


def test_only_exos_own_parser_is_extended_and_only_once(start):
    original = argparse.ArgumentParser.parse_args
    start(*SPECULATIVE)
    assert argparse.ArgumentParser.parse_args is original
    assert argparse.ArgumentParser().parse_args([]) == argparse.Namespace()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("exo")
    with pytest.MonkeyPatch.context() as patch, fake_exo(hook=False):
        home = is_home(root, patch)
        decoder, tokenizer = deep_decoder(3), byte_level(*SPECIAL, start=None)
        for model, weights in ((TARGET, decoder), (DRAFT, drafting(decoder, noise=0.05))):
            home.add(repository_of(model, ENGINE_CLASSES["mlx"]), weights, tokenizer=tokenizer)
    return home


def run(home, *arguments):
    """The stand-in's command line in a process of its own."""
    code = "import _specfast_exo_hook; _specfast_exo_hook.install(); from exo.main import run; run()"
    environment = {**os.environ, **home.environment(), "PYTHONPATH": str(FAKES)}
    command = [sys.executable, "-c", code, "run", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=60)


def test_run_with_time_from_start_to_end(home):
    pair = ("--speculative-target-model", TARGET, "--speculative-draft-model", DRAFT, "--speculative-temperature", "0")
    done = run(home, TARGET, *SPECULATIVE, *pair, "--prompt", "x = 1", "--max-generate-tokens", "30", "--time")
    assert done.returncode == 0, done.stderr
    plain = Reference(home.folder("mlx-community/Llama-3.1-8B-4bit"))
    prompt = re.search(r"^Processing prompt: (.*)$", done.stdout, re.M)[1]
    assert "x = 1" in prompt
    answer = plain.tokenizer.decode(plain(prompt, temperature=0.0, max_tokens=30))
    assert f"\nGenerated response:\n{answer}\n" in done.stdout
    figures = done.stdout.split(answer)[-1]
    for pattern in (
        r"^load: [\d.]+ s$",
        rf"^prompt: {len(plain.tokenizer.encode(prompt))} tokens, [\d.]+ tok/s$",
        r"^first token: [\d.]+ s$",
        r"^generation: 30 tokens, [\d.]+ tok/s$",
        r"^acceptance: 0\.\d\d, [2-6]\.\d\d tokens per target pass$",
    ):
        assert re.search(pattern, figures, re.M), figures
    assert re.search(rf"^specfast: request \w+: {TARGET}, 30 tokens in \d+ target passes", done.stderr, re.M)


def test_run_with_time_and_another_engine(home):
    done = run(home, TARGET, "--inference-engine", "mlx", "--max-generate-tokens", "9", "--time")
    assert done.returncode == 0, done.stderr
    assert "generation: " in done.stdout
    assert "acceptance" not in done.stdout
    assert "exo's own answer" not in done.stdout
    plain = run(home, TARGET, "--inference-engine", "mlx", "--max-generate-tokens", "9")
    assert "exo's own answer" in plain.stdout
    assert plain.stderr == ""


def test_run_of_what_exo_does_not_know_fails(home):
    done = run(home, "no-such-model", *SPECULATIVE)
    assert done.returncode == 2
    assert "'no-such-model' is no model of exo's" in done.stderr


def test_no_tokens_at_all_is_a_usage_error(home):
    done = run(home, TARGET, *SPECULATIVE, "--max-generate-tokens", "0")
    assert done.returncode == 2
    assert "--max-generate-tokens is 0" in done.stderr


def test_a_family_is_told_from_the_model_that_is_run(home):
    done = run(home, TARGET, *SPECULATIVE, "--speculative-auto-config", "--max-generate-tokens", "3")
    assert "gamma auto, at most 6 (family)" in done.stderr
    assert "lenience 1.1 (family)" in done.stderr


@pytest.mark.parametrize(
    ("files", "timed"),
    [
        ("tokenizer*", []),
        ("tokenizer*", ["--time"]),
        ("nothing", []),
    ],
)
def test_run_of_a_model_that_cannot_be_fetched_fails(home, files, timed):
    folder = home.folder("mlx-community/Qwen2.5-7B-4bit")
    for file in folder.iterdir():
        file.unlink()
    for file in home.folder("mlx-community/Llama-3.1-8B-4bit").glob(files):
        shutil.copy(file, folder)
    done = run(home, OTHER, *SPECULATIVE, *timed)
    assert done.returncode == 1
    assert re.search(r"^Error: ", done.stderr, re.M)
    assert "Traceback" not in done.stderr

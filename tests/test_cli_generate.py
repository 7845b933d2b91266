"""The command line: what goes to stdout and stderr, exit codes, and the same options under all their names."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import specfast
from specfast import cli
from specfast.cli.generate import BUILT_IN_PROMPT
from tiny_directories import byte_level, write_pair, write_tokenizer

REQUIRED = {
    *("text", "token_ids", "prompt_tokens", "target_passes", "drafted", "accepted", "tok_s", "lossless", "precision"),
    *("finish_reason", "gamma", "seed", "config", "prefill_seconds", "draft_seconds", "verify_seconds"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return [str(path) for path in write_pair(tmp_path_factory.mktemp("pair"), max_context=400)]


@pytest.fixture
def run(pair, capsys, monkeypatch):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    def command(*arguments, models=True):
        models = ["--model", pair[0], "--draft-model", pair[1]] if models and arguments[0] == "generate" else []
        try:
            code = cli.main([*arguments, *models])
        except SystemExit as exit_:
            code = exit_.code
        return (code, *capsys.readouterr())

    return command


def as_json(out):
    return json.loads(out.splitlines()[-1])


def test_text_goes_to_stdout_and_one_last_line_to_stderr(run, pair):
    code, out, err = run("generate", "--prompt", "def main", "--max-tokens", "12", "--temperature", "0")
    expected = specfast.load(*pair).generate("def main", max_tokens=12, temperature=0.0)
    assert code == 0
    assert out == expected.text + "\n"
    last = err.splitlines()[-1]
    assert last.startswith(f"{expected.stats.tokens} tokens, ")
    for part in ("tok/s", "acceptance 0.", f"{expected.stats.tokens_per_target_pass:.2f} tokens per target pass"):
        assert part in last
    start = err.splitlines()[-2]
    for part in ("gamma 5 (default)", "temperature 0 (typed)", f"target {pair[0]} (typed)", "native f32 (default)"):
        assert part in start


def test_the_last_line_is_json(run, pair):
    code, out, _ = run("generate", "--prompt", "x", "--max-tokens", "9", "--seed", "4", "--json", "--time")
    values = as_json(out)
    expected = specfast.load(*pair).generate("x", max_tokens=9, seed=4)
    assert code == 0
    assert set(values) >= REQUIRED
    assert (values["text"], values["token_ids"]) == (expected.text, expected.token_ids)
    assert (values["lossless"], values["precision"], values["seed"]) == (True, "f32", 4)
    assert values["config"]["gamma"] == {"value": 5, "source": "default"}
    assert out.startswith(expected.text)


def test_8_bit_keys_and_values_are_said(run, pair):
    code, out, err = run(
        "generate", "--prompt", "x", "--max-tokens", "9", "--temperature", "0", "--kv-bits", "8", "--json"
    )
    values = as_json(out)
    engine = specfast.load(*pair, kv_bits=8)
    expected = engine.generate("x", max_tokens=9, temperature=0.0, disabled=True)
    assert (code, values["token_ids"], values["precision"]) == (0, expected.token_ids, "f32, kv 8 bit")
    assert "native f32, kv 8 bit" in err
    assert expected.terms.precision == engine.get_speculation_stats()["precision"] == "f32, kv 8 bit"


def test_quiet_and_no_stream(run):
    code, out, err = run("generate", "--prompt", "x", "--max-tokens", "5", "--seed", "1", "--quiet")
    assert (code, err) == (0, "")
    assert run("generate", "--prompt", "x", "--max-tokens", "5", "--seed", "1", "--no-stream")[1] == out


def test_time_splits_the_time(run):
    err = run("generate", "--prompt", "x", "--max-tokens", "5", "--time")[2]
    for part in ("first token after", "draft", "verify", "prompt 2 tokens at"):
        assert part in err


ALIASES = [
    (("--gamma", "3"), ("--speculative-gamma", "3")),
    (("--temperature", "0.5"), ("--speculative-temperature", "0.5")),
    (("--top-k-threshold", "0.8"), ("--speculative-top-k", "0.8")),
    (("--lenience", "0.9"), ("--speculative-lenience", "0.9")),
    (("--target-engine", "native"), ("--speculative-target-engine", "native")),
    (("--draft-engine", "native"), ("--speculative-draft-engine", "native")),
    (("--auto-config",), ("--speculative-auto-config",)),
    (("--plain",), ("--disable-speculative",)),
    (("--rule", "token"), ("--speculative-rule", "token")),
]


@pytest.mark.parametrize(("short", "documented"), ALIASES)
def test_both_names_are_one_option(run, short, documented):
    common = ("generate", "--prompt", "x", "--max-tokens", "6", "--seed", "2", "--json")
    one, other, neither = (as_json(run(*common, *given)[1]) for given in (short, documented, ()))
    assert one["config"] == other["config"] != neither["config"]
    assert (one["token_ids"], one["drafted"]) == (other["token_ids"], other["drafted"])


def test_an_engine_may_be_none(run):
    code, out, _ = run("generate", "--prompt", "x", "--max-tokens", "3", "--json", "--speculative-draft-engine", "None")
    assert (code, as_json(out)["config"]["draft_engine"]) == (0, {"value": None, "source": "typed"})


def test_the_documented_names_of_the_models(run, pair):
    models = ("--speculative-target-model", pair[0], "--speculative-draft-model", pair[1])
    code, out, _ = run("generate", "--prompt", "x", "--json", "--max-tokens", "4", *models, models=False)
    assert code == 0
    assert as_json(out)["drafted"] > 0


def test_compare_prints_both_and_whether_they_are_identical(run):
    code, out, _ = run("generate", "--compare", "--prompt", "x", "--temperature", "0", "--max-tokens", "30", "--json")
    assert code == 0
    lines = out.splitlines()
    assert "identical: yes" in lines
    assert sum(line.startswith(("plain: ", "speculative: ")) for line in lines) == 2
    values = as_json(out)
    assert values["identical"] is True
    assert values["plain"]["token_ids"] == values["speculative"]["token_ids"] == values["token_ids"]
    assert (values["plain"]["drafted"], values["plain"]["target_passes"]) == (0, len(values["token_ids"]))


@pytest.mark.parametrize(("slow", "pairs"), [(1.0, 3), (40.0, 1)])
def test_compare_runs_alternately_and_reports_the_pair_with_the_median_ratio(run, monkeypatch, slow, pairs):
    honest, requests = specfast.Engine.stream, []
    seconds = iter([slow, *(9.0, 3.0), *(4.0, 4.0), *(6.0, 3.0)])  # of the warm-up, then plain and speculative

    def stream(self, prompt, **options):
        requests.append((bool(options.get("disabled")), options["max_tokens"]))
        made = honest(self, prompt, **options)
        result, took = made.result, next(seconds)

        def timed():
            found = result()
            found.stats.total_seconds, found.stats.prefill_seconds = took, 0.0
            return found

        made.result = timed
        return made

    monkeypatch.setattr(specfast.Engine, "stream", stream)
    greedy = ("--prompt", "x", "--temperature", "0", "--max-tokens", "30", "--json")
    code, out, _ = run("generate", "--compare", *greedy)
    assert (code, "identical: yes" in out.splitlines()) == (0, True)
    assert requests == [(False, 30)] + [(True, 30), (False, 30)] * pairs
    values = as_json(out)
    times = [values[name]["total_seconds"] for name in ("plain", "speculative")]
    assert (times, values["speedup"]) == (([6.0, 3.0], 2.0) if pairs == 3 else ([9.0, 3.0], 3.0))
    assert out.startswith(values["text"] + "\nplain: ")  # the text once, and before the figures


def test_compare_says_no_and_fails_when_greedy_tokens_differ(run, monkeypatch):
    honest = specfast.Engine.generate, specfast.Engine.stream

    def stream(self, prompt, **options):
        return honest[1](self, "x" if options.get("disabled") else "y", **options)

    monkeypatch.setattr(specfast.Engine, "stream", stream)
    common = ("generate", "--compare", "--prompt", "x", "--max-tokens", "30", "--seed", "1")
    code, out, _ = run(*common, "--temperature", "0")
    assert (code, out.splitlines()[-1]) == (1, "identical: no")
    code, out, _ = run(*common)
    assert (code, out.splitlines()[-1]) == (0, "identical: no (sampled: the law is the same, the draws are not)")


def test_compare_needs_a_draft(run, pair, tmp_path):
    write_tokenizer(tmp_path, byte_level("<think>"))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 999}))
    for draft in ((), ("--draft-model", str(tmp_path))):
        code, out, err = run("generate", "--compare", "--model", pair[0], *draft, "--prompt", "x", models=False)
        assert (code, out) == (2, "")
        assert "--draft-model" in err.splitlines()[-1]


def test_compare_takes_a_drafter_that_needs_no_draft(run, pair):
    greedy = ("--temperature", "0", "--max-tokens", "40", "--ignore-eos", "--drafter", "suffix")
    code, out, _ = run("generate", "--compare", *greedy, "--model", pair[0], "--prompt", "x", models=False)
    assert (code, "identical: yes" in out) == (0, True)


USAGE = {
    "gamma": ("--gamma", "21"),
    "gamma word": ("--gamma", "many"),
    "temperature": ("--temperature", "3"),
    "threshold": ("--speculative-top-k", "40"),
    "lenience": ("--lenience", "3"),
    "tokens": ("--max-tokens", "0"),
    "seed": ("--seed", "-1"),
    "top-p": ("--top-p", "2"),
    "threads": ("--threads", "0"),
    "context": ("--context", "0"),
    "mlx": ("--speculative-target-engine", "mlx"),
    "tinygrad": ("--speculative-draft-engine", "tinygrad"),
    "unknown engine": ("--speculative-draft-engine", "torch"),
    "early exit": ("--speculative-early-exit", "0"),
    "early exit word": ("--early-exit", "last"),
    "early exit beyond": ("--early-exit", "99"),
    "early exit and draft": ("--early-exit", "1", "--draft-model", "x"),
    "early exit and drafter": ("--early-exit", "1", "--drafter", "suffix", "--draft-model", "none"),
    "bias twice": ("--logit-bias", "5=1", "--logit-bias", "6=1", "--logit-bias", "5=-1"),
    "rule": ("--speculative-rule", "typical"),
    "rule and lenience": ("--speculative-rule", "block", "--lenience", "1.1"),
    "min-p": ("--min-p", "-0.1"),
    "top-k": ("--top-k", "-1"),
    "stop": ("--stop", ""),
    "raw system": ("--raw", "--system", "be brief"),
    "quiet time": ("--quiet", "--time"),
    "compare plain": ("--compare", "--plain"),
    "compare none": ("--compare", "--draft-model", "none"),
    "both": ("--prompt-file", "x"),
    "unknown": ("--speculate",),
    "abbreviated": ("--speculative-gam", "3"),
    "file": ("--precision", "int3"),
    "bits": ("--kv-bits", "4"),
}


def test_the_targets_first_layers_draft(run, pair):
    for layers in ("1", "auto"):
        arguments = ("--model", pair[0], "--early-exit", layers, "--temperature", "0", "--max-tokens", "20", "--json")
        code, out, err = run("generate", "--prompt", "def main", "--compare", *arguments, models=False)
        assert code == 0
        assert "identical: yes" in out
        assert f"draft early exit {layers} (typed)" in err
        assert as_json(out)["config"]["early_exit"] == {"value": layers if layers == "auto" else 1, "source": "typed"}


@pytest.mark.parametrize("arguments", USAGE.values(), ids=list(USAGE))
def test_usage_errors_exit_with_2_on_stderr_before_anything_is_loaded(run, pair, monkeypatch, arguments):
    monkeypatch.setattr("specfast.models.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    models = ("--model", pair[0], "--draft-model", pair[1])
    code, out, err = run("generate", "--prompt", "x", *models, *arguments, models=False)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("specfast")


def test_a_system_message_needs_a_template(run):
    code, out, err = run("generate", "--prompt", "x", "--system", "be brief")
    assert (code, out) == (2, "")
    assert "chat template" in err


@pytest.mark.parametrize("name", ["none", "None"])
def test_the_draft_none_is_no_draft(run, pair, name):
    for models in ((), ("--auto-config",), ("--model", pair[0])):
        given = ("--prompt", "x", "--max-tokens", "4", "--temperature", "0", "--json", "--draft-model", name, *models)
        code, out, err = run("generate", *given, models=False)
        assert (code, as_json(out)["drafted"]) == (0, 0)
        assert "draft none (typed)" in err
    assert specfast.load(draft=name).pair.draft is None
    assert specfast.load().pair.draft is not None


def test_messages_name_the_remedy(run):
    assert "--top-k" in run("generate", "--prompt", "x", *USAGE["threshold"])[2]
    assert "native" in run("generate", "--prompt", "x", *USAGE["mlx"])[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "/no/such/place"), "no such model"),
        (("--model", "not-a-model"), "no such model"),
        (("--draft-model", "/no/such/place"), "no such model"),
        (("--prompt", "word " * 500), "shorten the prompt"),
    ],
)
def test_failures_exit_with_1_on_stderr(run, arguments, words):
    given = () if "--prompt" in arguments else ("--prompt", "x")
    models = "--prompt" in arguments
    code, out, err = run("generate", *given, *arguments, models=models)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("specfast generate: ")
    assert words in err


def test_an_empty_prompt_is_refused(run):
    code, _, err = run("generate", "--prompt", "")
    assert code == 2
    assert "0 tokens" in err


def test_a_draft_of_other_tokens_is_warned_about(run, pair, tmp_path):
    write_tokenizer(tmp_path, byte_level("<think>"))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 999}))
    models = ("--model", pair[0], "--draft-model", str(tmp_path))
    code, out, err = run("generate", "--prompt", "x", "--max-tokens", "4", "--json", *models, models=False)
    assert code == 0
    assert (
        "Warning: Models may be incompatible for speculative decoding:\n"
        f"  Target: {pair[0]}, Draft: {tmp_path}\n"
        "  Tokens match: False, Vocab match: False\n"
    ) in err
    assert (as_json(out)["drafted"], as_json(out)["model_family_compatibility"]) == (0, "incompatible")


def test_where_the_prompt_comes_from(run, pair, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("héllo", encoding="utf-8")
    common = ("generate", "--max-tokens", "6", "--temperature", "0", "--quiet")
    expected = run(*common, "--prompt", "héllo")[1]
    assert run(*common, "--prompt-file", str(file))[1] == expected
    for option in ((), ("--prompt-file", "-")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("héllo"))
        assert run(*common, *option)[1] == expected
    built_in = run(*common, "--prompt", BUILT_IN_PROMPT)[1]
    assert built_in != expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run(*common)[1] == built_in
    file.write_bytes(b"\xff\xff")
    for path in (file, tmp_path / "missing", tmp_path):
        code, _, err = run(*common, "--prompt-file", str(path))
        assert code == 2
        assert "prompt" in err


def test_stop_and_raw_reach_the_engine(run):
    whole = run("generate", "--prompt", "x", "--max-tokens", "40", "--temperature", "0", "--ignore-eos", "--quiet")[1]
    stop = whole[10:12]
    options = ("--max-tokens", "40", "--temperature", "0", "--ignore-eos", "--raw", "--stop", stop, "--json")
    values = as_json(run("generate", "--prompt", "x", *options)[1])
    assert values["text"] == whole[: whole.index(stop)]
    assert values["finish_reason"] == "stop"


def command(*arguments):
    return [sys.executable, "-m", "specfast", *arguments]


def test_ctrl_c_in_the_middle_prints_what_there_is_and_exits_with_130(pair):
    arguments = (
        "--max-tokens",
        "390",
        "--temperature",
        "0",
        "--ignore-eos",
        "--threads",
        "1",
        "--json",
        "--prompt",
        "x",
    )
    pause = "import time, specfast.generation as g, specfast.cli as c, sys\n"
    pause += "rounds = g.rounds\n"
    pause += "def slow(*a):\n    for chunk in rounds(*a):\n        yield chunk\n        time.sleep(0.05)\n"
    pause += "g.rounds = slow\nsys.exit(c.main(sys.argv[1:]))"
    models = ("--model", pair[0], "--draft-model", pair[1])
    child = subprocess.Popen(
        [sys.executable, "-c", pause, "generate", *arguments, *models],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdout.read(1)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    values = as_json(out)
    assert values["finish_reason"] == "interrupted"
    assert 0 < len(values["token_ids"]) < 390
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"{len(values['token_ids'])} tokens, ")
    full = specfast.load(*pair).generate("x", max_tokens=390, temperature=0.0, ignore_eos=True).token_ids
    assert values["token_ids"] == full[: len(values["token_ids"])]


def test_the_module_runs_and_a_closed_pipe_is_no_crash(pair):
    done = subprocess.run(command("--version"), capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"specfast {specfast.__version__}\n"
    child = subprocess.Popen(
        command("generate", "--prompt", "x", "--max-tokens", "300", "--ignore-eos", "--model", pair[0], "--plain"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    child.stdout.close()
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert b"Traceback" not in err


def test_an_unknown_instruction_set_is_an_error_without_a_traceback():
    environment = {**os.environ, "SPECFAST_ISA": "pentium"}

    def run(*arguments):
        return subprocess.run(
            command(*arguments), capture_output=True, text=True, check=False, env=environment, timeout=60
        )

    for arguments in (("generate", "--prompt", "x"), ("bench", "--shape", "demo")):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "pentium" in done.stderr
        assert "unset it" in done.stderr
        assert "Traceback" not in done.stderr
    done = run("doctor")
    assert (done.returncode, done.stderr) == (1, "")
    for part in (
        "none selected (SPECFAST_ISA=pentium)",
        "problem: no kernels named 'pentium'",
        "unset it",
        "hosts:",
        "exo",
    ):
        assert part in done.stdout
    report = json.loads(run("doctor", "--json").stdout)
    assert (report["isa"], report["selected"], report["hosts"]["native"]["used"]) == (None, [], False)
    assert run("--version").returncode == 0


def test_help_teaches(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in cli.COMMANDS)
    assert "examples:" in out
    code, out, _ = run("generate", "--help")
    assert code == 0
    assert "examples:" in out
    documented = [option for pair in ALIASES for option in pair[1] if option.startswith("--")]
    assert all(option in out for option in documented)
    assert run("generate", "-h", models=False)[0] == 0
    assert run("nonsense")[0] == 2


def test_suggest(run):
    code, out, _ = run("suggest", "llama-3.1-8b")
    assert code == 0
    assert out.index("llama-3.2-3b") < out.index("llama-3.2-1b")
    assert "gamma 6" in out
    values = as_json(run("suggest", "qwen-2.5-7b", "--json")[1])
    assert (values["gamma"], values["top_k"], values["draft_model_id"]) == (4, 0.85, "qwen-2.5-1.5b")
    code, out, _ = run("suggest", "unheard-of")
    assert (code, "suffix drafter" in out) == (0, True)
    assert "deepseek" in as_json(run("suggest", "--json")[1])
    assert "deepseek: deepseek-v3" in run("suggest")[1]


def test_convert_refuses_what_is_there_before_it_downloads(run, tmp_path, monkeypatch):
    monkeypatch.setattr("specfast.hub.resolve", lambda *_, **__: pytest.fail("a model was looked for"))
    code, out, err = run("convert", "llama-3.2-1b", str(tmp_path))
    assert (code, out) == (2, "")
    assert "exists already" in err


def test_doctor(run):
    code, out, _ = run("doctor")
    info = specfast.build_info()
    assert code == 0
    assert f"kernels: {info['isa']} selected" in out
    values = as_json(run("doctor", "--json")[1])
    assert values["version"] == specfast.__version__
    assert values["kernels"] == info["kernels"]
    assert set(values["hosts"]) == {"native", "mlx", "mlx_lm", "tinygrad", "exo"}
    for host in values["hosts"].values():
        assert host["why"]
        assert host["found"] or not host["used"]
    assert values["hosts"]["mlx"]["used"] == values["hosts"]["mlx_lm"]["found"]

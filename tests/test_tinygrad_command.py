"""`python -m specfast.tinygrad`: what it prints, and one line with an exit code where it cannot."""

import json
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("tinygrad", reason="tinygrad is not installed; pip install 'specfast[tinygrad]'")
try:
    from specfast.tinygrad import __main__ as command
except ImportError as error:
    pytest.skip(f"tinygrad cannot run here: {error}", allow_module_level=True)

import numpy as np
from gguf_writer import decoder_metadata, decoder_tensors, encode, tokenizer_metadata, write_gguf
from tiny_directories import byte_level
from tiny_models import random_decoder
from tinygrad_models import write_model

PREFIX = "python -m specfast.tinygrad: "
WORDS = [sys.executable, "-m", "specfast.tinygrad"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tinygrad")
    write_model(directory / "target.gguf")
    write_model(directory / "draft.gguf", kind="Q8_0", layers=1)
    return directory / "target.gguf", directory / "draft.gguf"


def write_other(path, metadata, **more):
    decoder = random_decoder(
        3, V=300, hidden=64, heads=4, kv_heads=2, head_dim=16, layers=2, architecture="llama", tied=False
    )
    tensors, _ = decoder_tensors(decoder, "llama", "F32")
    known = decoder_metadata(decoder, "llama", max_context=256) | tokenizer_metadata(byte_level())
    write_gguf(path, known | metadata, tensors | more)
    return path


def in_a_process(*arguments, **options):
    options = {"capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run([*WORDS, *map(str, arguments)], check=False, **options)


@pytest.fixture
def run(capsys):
    def run(*arguments):
        try:
            code = command.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_what_is_printed(files, run):
    target, draft = files
    prompt = ("--prompt", "def main", "--max-tokens", 24)
    code, out, err = run("--model", target, "--draft-model", draft, *prompt, "--json", "--gamma", 4)
    found = json.loads(out)
    assert code == 0
    assert (found["drafter"], found["gamma"], found["rule"], len(found["token_ids"])) == ("model", 4, "greedy", 24)
    assert found["report"]["path"] == "graph"
    first, counts, last = err.splitlines()
    for part in ("target.gguf (path graph, precision int8", "draft draft.gguf", "drafter model, gamma 4, rule greedy"):
        assert part in first
    assert counts == f"drafted {found['stats']['drafted']} tokens, {found['stats']['accepted']} accepted"
    assert found["stats"]["drafted"] > 0
    assert last.startswith("24 tokens, ")
    assert run("--model", target, *prompt, "--drafter", "none", "--quiet") == (0, found["text"] + "\n", "")
    code, out, err = run("--model", target, *prompt, "--time", "--early-exit", "1")
    assert (code, out) == (0, found["text"] + "\n")
    assert "drafter early-exit" in err
    assert "verify" in err


def test_the_prompt_may_come_from_stdin_or_a_file(files, tmp_path):
    arguments = ("--model", files[0], "--max-tokens", 8, "--quiet")
    (tmp_path / "prompt.txt").write_text("def main")
    expected = in_a_process(*arguments, "--prompt", "def main").stdout
    assert in_a_process(*arguments, input="def main").stdout == expected
    assert in_a_process(*arguments, "--prompt-file", tmp_path / "prompt.txt").stdout == expected


def test_a_text_that_ends_with_the_context_is_told(files, run):
    code, _, err = run("--model", files[0], "--prompt", "def", "--max-tokens", 200, "--context", 16, "--quiet", "--raw")
    assert (code, err) == (0, f"{PREFIX}the context of 16 tokens is full; the text may go on\n")


def test_notices_of_a_file_are_one_line(run, tmp_path):
    ones = ("F32", (8,), encode(np.ones(8), "F32")[0])
    path = write_other(tmp_path / "factors.gguf", {}, **{"rope_freqs.weight": ones})
    code, out, err = run("--model", path, "--prompt", "x", "--max-tokens", 2, "--quiet", "--json")
    assert code == 0
    assert "rope_freqs.weight" in json.loads(out)["report"]["notice"]
    assert err.startswith(f"{PREFIX}factors.gguf: tinygrad leaves")
    assert err.count("\n") == 1


USAGE = [
    ("--gamma", "0"),
    ("--gamma", "many"),
    ("--early-exit", "²"),
    ("--early-exit", "1" * 5000),
    ("--early-exit", "9"),
    ("--lenience", "9"),
    ("--context", "0"),
    ("--context", "-5"),
    ("--max-tokens", "0"),
    ("--temperature", "-1"),
    ("--top-p", "2"),
    ("--seed", "-1"),
    ("--threads", "0"),
    ("--precision", "int3"),
    ("--drafter", "oracle"),
    ("--drafter", "model"),
    ("--drafter", "early-exit"),
    ("--draft-model", "DRAFT", "--drafter", "none"),
    ("--draft-model", "DRAFT", "--drafter", "suffix"),
    ("--draft-model", "DRAFT", "--early-exit", "1"),
    ("--early-exit", "1", "--drafter", "suffix"),
    ("--draft-model", "/"),
    ("--draft-model", ""),
    ("--draft-model", "weights.bin"),
    ("--prompt-file", "x"),
    ("--time", "--quiet"),
]


@pytest.mark.parametrize("arguments", USAGE, ids=lambda words: " ".join(words)[:40])
def test_usage_errors_exit_with_2_before_anything_is_loaded(files, run, monkeypatch, arguments):
    monkeypatch.setattr(
        sys.modules["specfast.tinygrad.generate"], "load_gguf", lambda *_: pytest.fail("a model was loaded")
    )
    arguments = [str(files[1]) if word == "DRAFT" else word for word in arguments]
    code, out, err = run("--model", files[0], "--prompt", "x", *arguments)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith(PREFIX)
    assert "num_draft_tokens" not in last
    assert len(last) < 400


def test_failures_are_one_line_and_exit_with_1(files, run, tmp_path):
    (tmp_path / "damaged.gguf").write_bytes(files[0].read_bytes()[:5000])
    os.mkfifo(tmp_path / "pipe.gguf")
    other = write_other(tmp_path / "other.gguf", {"tokenizer.ggml.tokens": [str(i) for i in range(300)]})
    empty = write_other(tmp_path / "empty.gguf", {"tokenizer.chat_template": "{{ '' }}"})
    for arguments, code, message in (
        (("--model", tmp_path / "damaged.gguf"), 1, "damaged"),
        (("--model", tmp_path / "none.gguf"), 1, "cannot be read"),
        (("--model", tmp_path / "pipe.gguf"), 1, "no regular file"),
        (("--model", files[0], "--draft-model", tmp_path / "pipe.gguf"), 1, "no regular file"),
        (("--model", files[0], "--draft-model", other), 1, "the tokens of"),
        (("--model", empty), 2, "--raw passes the prompt as it is"),
    ):
        found, out, err = run(*arguments, "--prompt", "x", "--max-tokens", 2)
        assert (found, out, err.count("\n")) == (code, "", 1)
        assert err.startswith(PREFIX)
        assert message in err


def test_a_prompt_of_other_bytes_is_refused(files):
    done = in_a_process("--model", files[0], "--prompt", b"\xff".decode("utf-8", "surrogateescape"))
    assert (done.returncode, done.stderr) == (2, f"{PREFIX}the prompt is not UTF-8 text; convert it first\n")


def test_the_help_teaches_without_tinygrad(tmp_path):
    (tmp_path / "tinygrad").mkdir()
    (tmp_path / "tinygrad" / "__init__.py").write_text("raise ImportError('none here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = in_a_process("--help", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("examples:", "echo ", "prompt-lookup", "(model with a draft", "0.5", "Exit codes:", "DEV", "coupled"):
        assert part in done.stdout
    done = in_a_process("--model", "m.gguf", "--prompt", "x", env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"{PREFIX}specfast.tinygrad needs tinygrad (none here); install it with: pip install 'specfast[tinygrad]'\n"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "CC",
            "/none/clang",
            "'/none/clang'); tinygrad's CPU device compiles with clang: install it (apt-get install clang)",
        ),
        ("XDG_CACHE_HOME", "/proc/none", "'/proc/none'); tinygrad keeps files in XDG_CACHE_HOME"),
        ("DEV", "NONSENSE", "ops_nonsense'); DEV is 'NONSENSE': use DEV=CPU"),
        ("DEV", "NULL", "DEV is 'NULL': use DEV=CPU"),
        ("METAL", "1", "METAL=1 is deprecated, use DEV=METAL instead)\n"),
    ],
)
def test_a_device_that_cannot_be_used_is_one_line_with_its_cause(files, name, value, message):
    environment = {**os.environ, "CCACHE": "0" if name == "CC" else "1", name: value}
    if name != "DEV":
        environment.pop("DEV", None)
    done = in_a_process("--model", files[0], "--prompt", "x", env=environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert message in done.stderr
    if name != "CC":
        assert "clang" not in done.stderr
    code = "import specfast.tinygrad"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "UnsupportedHostError" in done.stderr
    assert message.strip() in done.stderr


def test_a_full_disk_and_a_closed_pipe_are_no_crash(files):
    arguments = [*map(str, files[:1]), "--prompt", "x", "--max-tokens", "200", "--quiet", "--raw"]
    with open("/dev/full", "w") as full:
        done = in_a_process("--model", *arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, f"{PREFIX}No space left on device\n")
    child = subprocess.Popen([*WORDS, "--model", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (1, b"")


def test_characters_that_the_terminal_lacks_are_no_crash(files):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    arguments = ("--model", files[0], "--prompt", "x", "--max-tokens", 40, "--quiet")
    done = in_a_process(*arguments, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "?" in done.stdout


def test_ctrl_c_while_tinygrad_is_imported_is_no_traceback(files, tmp_path):
    (tmp_path / "tinygrad").mkdir()
    (tmp_path / "tinygrad" / "__init__.py").write_text("import time\nprint('.', flush=True)\ntime.sleep(60)\n")
    child = subprocess.Popen(
        [*WORDS, "--model", str(files[0]), "--prompt", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert child.stdout.readline() == ".\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, f"{PREFIX}interrupted\n")


def test_ctrl_c_in_the_middle_prints_what_there_is(files):
    arguments = ("--model", str(files[0]), "--prompt", "x", "--raw", "--json", "--quiet")
    slow = (
        "import sys, time, specfast.generation as g\nfrom specfast.tinygrad.__main__ import main\nrounds = g.rounds\n"
    )
    slow += "def slowly(*a):\n    for chunk in rounds(*a):\n        yield chunk\n        print('.', flush=True)\n"
    slow += "        time.sleep(1)\ng.rounds = slowly\nsys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", slow, *arguments]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == ".\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    found = json.loads(out.splitlines()[-1])
    assert (child.returncode, err, found["finish_reason"]) == (130, "", "interrupted")
    assert len(found["token_ids"]) >= 1

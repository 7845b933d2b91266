"""python -m specfast.mlx.generate: mlx-lm's flags and specfast's, output, refusals, Ctrl-C, and models from a hub."""

import json
import os
import signal
import subprocess
import sys

import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache  # noqa: E402
from mlx_models import logits_of, random_model  # noqa: E402
from specfast import embedded  # noqa: E402
from specfast.mlx import accelerate, command, stream_generate  # noqa: E402
from test_hub import serving  # noqa: E402

EMBEDDED = ["--model", "embedded", "--prompt", "import os\\n", "--max-tokens", "24"]


@pytest.fixture(autouse=True)
def _cpu():
    mx.set_default_device(mx.cpu)


def run(*arguments):
    return command.main([*EMBEDDED, *arguments])


def last_object(text):
    return json.loads(text.strip().splitlines()[-1])


def test_its_flags_are_mlx_lms():
    """Every flag of the installed mlx-lm is known, and none of them is one that we forgot."""
    import importlib

    theirs = vars(importlib.import_module("mlx_lm.generate").setup_arg_parser().parse_args([]))
    ours = vars(command.build_parser().parse_args([]))
    assert {name: ours[name] for name in theirs} == theirs
    assert set(theirs) <= {*command._THEIRS, "image"}
    assert set(ours) - set(theirs) == set(command._OURS)


def test_verbose_output(capsys):
    assert run("--draft-model", "embedded", "--temp", "0.8", "--seed", "4", "--gamma", "3", "--time") == 0
    out, err = capsys.readouterr()
    assert out.startswith("==========\n")
    assert "Prompt: 4 tokens" in out
    assert "Path: native, precision int8, drafter model, acceptance" in out
    first = err.splitlines()[0]
    assert first.startswith("specfast: model embedded (path native, precision int8, ")
    assert first.endswith("drafter model, gamma 3, rule block, lossless, seed 4")
    assert "model: accepted by position" in err
    assert "prefill" in err


def test_the_text_is_stream_generates(capsys):
    model, tokenizer = mlx_lm.load(str(embedded.path("target")))
    expected = "".join(r.text for r in stream_generate(model, tokenizer, "import os\n", 24, temp=0.7, seed=9))
    for more in ([], ["--drafter", "suffix"], ["--early-exit", "1"]):
        assert run("--verbose", "False", "--temp", "0.7", "--seed", "9", "--rule", "coupled", "--json", *more) == 0
        out, err = capsys.readouterr()
        found = last_object(out)
        assert found["text"] == expected
        assert out.startswith(expected)
        assert err == ""
        assert found["path"] == "native"
        assert found["precision"] == "int8"
        assert len(found["token_ids"]) == 24
        assert found["finish_reason"] == "length"


def test_host_path_is_named(capsys, monkeypatch):
    other = random_model("llama", "f32", attention_bias=True, vocab_size=4096)
    tokenizer = mlx_lm.load(str(embedded.path("target")))[1]
    monkeypatch.setattr(mlx_lm, "load", lambda *_, **__: (other, tokenizer))
    assert run("--drafter", "suffix", "--json") == 0
    out, err = capsys.readouterr()
    assert "path host, mlx-lm's layers in float32: " in err
    assert "bias" in err
    assert last_object(out)["path"] == "host"
    assert last_object(out)["precision"] == "float32"


def test_a_prompt_cache_file(capsys, tmp_path):
    model, tokenizer = mlx_lm.load(str(embedded.path("target")))
    accelerate(model)
    cache = make_prompt_cache(model)
    logits_of(model, tokenizer.encode("def count_lines(path):\n"), cache)
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, cache, {"model": "embedded", "tokenizer_config": "{}"})
    arguments = ["--prompt-cache-file", file, "--prompt", "    with", "--max-tokens", "12", "--json", "--verbose", "F"]
    assert command.main(arguments) == 0
    found = last_object(capsys.readouterr().out)
    whole = tokenizer.encode("def count_lines(path):\n") + tokenizer.encode("    with")
    expected = [r.token for r in stream_generate(model, tokenizer, whole, 12)]
    assert found["token_ids"][:6] == expected[:6]
    assert command.main([*arguments, "--model", "other"]) == 2
    assert "the prompt cache was made with embedded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "./missing"], 1, "no such model"),
        (["--max-tokens", "0"], 2, "max_tokens is 0"),
        (["--drafter", "model"], 2, "needs a draft model"),
        (["--early-exit", "99"], 2, "outside 1 to"),
        (["--lenience", "3"], 2, "lenience is 3"),
        (["--extra-eos-token", "zzz"], 2, "--extra-eos-token is 'zzz'"),
        (["--gamma", "3", "--num-draft-tokens", "4"], 2, "give one of them"),
        (["--early-exit", "2", "--draft-model", "embedded"], 2, "--draft-model embedded are two ways to draft"),
        (["--drafter", "model"], 2, "give --draft-model, or use --drafter suffix"),
        (["--drafter", "early-exit"], 2, "give --early-exit N"),
        (["--model", "./missing", "--kv-bits", "7"], 2, "kv_bits is 7"),
        (["--model", "./missing", "--kv-group-size", "0"], 2, "kv_group_size is 0"),
        (["--model", "./missing", "--max-kv-size", "3"], 2, "max_kv_size is 3"),
        (["--image", "a.png"], 2, "--image is not supported here"),
        (["--prompt-cache-file", "/missing.safetensors"], 1, "missing.safetensors"),
    ],
)
def test_refusals_are_one_line(capsys, arguments, code, words):
    if "--image" in arguments and "image" not in vars(command.build_parser().parse_args([])):
        pytest.skip("this mlx-lm has no --image")
    assert run(*arguments) == code
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("python -m specfast.mlx.generate: ")
    assert words in err[-1]


def test_a_bounded_cache_changes_the_text(capsys):
    texts = []
    for arguments in ([], ["--max-kv-size", "8"]):
        assert run("--max-tokens", "60", "--temp", "0", "--json", *arguments) == 0
        texts.append(last_object(capsys.readouterr().out)["token_ids"])
    assert texts[0][:2] == texts[1][:2]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("arguments", [["--gamma", "21"], ["--gamma", "x"], ["--drafter", "x"], ["--early-exit", "x"]])
def test_usage(arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2


def environment(**more):
    return {**os.environ, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", **more}


def module(*arguments, **more):
    line = [sys.executable, "-m", "specfast.mlx.generate", *arguments]
    return subprocess.run(
        line, check=False, env=environment(**more), capture_output=True, text=True, timeout=300, input="import os\n"
    )


def test_a_model_from_the_hub(tmp_path):
    """By repo id: downloaded with progress, resumed where it broke off, then from the cache; the prompt from stdin."""
    source = embedded.path("draft")
    files = {
        path.name: path.read_bytes() for path in source.iterdir() if path.suffix == ".json" or "safe" in path.suffix
    }
    arguments = ("--model", "org/model", "--prompt", "-", "--max-tokens", "8", "--json")
    with serving(files) as (endpoint, handler):
        handler.cut = 1000
        broken = module(*arguments, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
        assert broken.returncode == 1
        assert "org/model could not be downloaded" in broken.stderr.splitlines()[-1]
        assert "it resumes where it stopped" in broken.stderr
        handler.cut = 0
        done = module(*arguments, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    assert "model org/model (path native" in done.stderr
    assert "RuntimeWarning" not in done.stderr
    again = module(*arguments, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert last_object(again.stdout)["token_ids"] == last_object(done.stdout)["token_ids"]


LISTENING = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it runs in the background
from specfast.mlx.command import main
sys.exit(main())
"""


def test_ctrl_c_ends_the_text():
    line = [sys.executable, "-u", "-c", LISTENING, *EMBEDDED, "--max-tokens", "-1", "--json"]
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(40).startswith(b"==========")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert last_object(out.decode())["finish_reason"] == "interrupted"

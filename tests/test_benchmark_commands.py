"""The benchmarks that are commands: their arguments, and what they print, on tiny shapes."""

import json
import sys
from pathlib import Path

import pytest
from specfast.bench import shapes
from specfast.bench.shapes import Shape

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import document_pairs
import memory
import prompt_classes

TINY = Shape("tiny", 256, 2, 4, 2, 64, 512, 1000, True)
OTHER = Shape("other", 128, 1, 2, 1, 64, 256, 900, True)


@pytest.fixture(autouse=True)
def _tiny_shapes(monkeypatch):
    for shape in (TINY, OTHER):
        monkeypatch.setitem(shapes.SHAPES, shape.name, shape)
    monkeypatch.setattr(document_pairs, "PAIRS", (("tiny", 3, ("other",)), ("other", 2, ("other",))))
    monkeypatch.setattr(memory.time, "sleep", lambda _: None)


@pytest.mark.parametrize("command", [document_pairs, memory, prompt_classes])
def test_help_and_unknown_options(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert "--json" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main(["--nonsense"])


def test_document_pairs(capsys):
    assert document_pairs.main(["--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["target"], row["draft"], row["gamma"]) for row in rows] == [
        ("tiny", "other", 3),
        ("other", "other", 2),
    ]
    assert set(rows[0]["speedups"]) == {"0.6", "0.7", "0.8"}
    assert document_pairs.main(["--target", "other"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("other with other, gamma 2, ")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_memory(tmp_path, capsys):
    arguments = ["--shape", "tiny", "--repeats", "1", "--context", "20", "--cache", str(tmp_path), "--json"]
    assert memory.main(arguments) == 0
    layouts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [layout["layout"] for layout in layouts] == ["in place", "packed"]
    assert all(0 < layout["peak_mb"] < layout["limit_mb"] for layout in layouts)


@pytest.mark.parametrize("wrong", [("--repeats", "0"), ("--repeats", "x"), ("--context", "9000"), ("--context", "-1")])
def test_memory_refuses(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        memory.main(["--shape", "tiny", "--cache", str(tmp_path / "none"), *wrong])
    assert "is not a whole number in 1 to" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_memory_says_what_the_measured_process_said(tmp_path):
    directory = tmp_path / "tiny-q4g64"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="model_type"):
        memory.main(["--shape", "tiny", "--repeats", "1", "--cache", str(tmp_path)])


def test_prompt_classes(capsys):
    arguments = ["--classes", "code", "editing", "--only", "suffix", "controller", "--pairs", "1"]
    assert prompt_classes.main([*arguments, "--tokens", "60", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompts"], row["drafter"]) for row in rows] == [
        ("code", "suffix"),
        ("code", "controller"),
        ("editing", "suffix"),
        ("editing", "controller"),
    ]
    assert all(row["pairs"] == 1 and row["low"] <= row["ratio"] <= row["high"] for row in rows)
    assert rows[2]["tokens_per_pass"] > 2  # the promise for texts that are copied
    assert prompt_classes.main([*arguments[:2], "--only", "model", "--pairs", "1", "--tokens", "30"]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    with pytest.raises(SystemExit, match="2"):
        prompt_classes.main(["--pairs", "0"])


def test_loops_are_runs_that_are_not_in_the_prompt():
    run = list(range(20))
    assert prompt_classes.loops([*run, 99, *run], [1, 2])
    assert not prompt_classes.loops([*run, 99, *run], run)
    assert not prompt_classes.loops(run, [])

"""`specfast bench` on a tiny shape: its figures, its JSON, its refusals."""

import json
from pathlib import Path

import pytest
from specfast import build_info
from specfast.bench import shapes
from specfast.bench.random_model import QUANTS, random_model
from specfast.bench.roofline import measure_rows
from specfast.bench.shapes import Shape, find_shape
from specfast.bench.speculate import measure_speculation
from specfast.cli import bench, main
from specfast.errors import ConfigurationError

TINY = Shape("tiny", 256, 2, 4, 2, 64, 512, 1000, True, True)
SMALLER = Shape("smaller", 128, 1, 2, 1, 64, 256, 1000, False)
ODD = Shape("odd", 96, 1, 2, 1, 48, 96, 100, True)


@pytest.fixture(autouse=True)
def _tiny_shapes(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setitem(shapes.SHAPES, "smaller", SMALLER)
    monkeypatch.setitem(shapes.SHAPES, "odd", ODD)


@pytest.mark.parametrize("quant", QUANTS)
def test_every_format_runs(quant):
    result = measure_rows(random_model(TINY, quant), [2, 9], context=40, repeats=2)
    assert [row.rows for row in result.rows] == [1, 2, 9]
    for row in result.rows:
        assert row.p10_ms <= row.median_ms <= row.p90_ms
        assert row.ratio_to_roofline > 0


def test_rows_as_json(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert (
        main(["bench", "--shape", "tiny", "--rows", "1,2,6", "--context", "30", "--repeats", "2", "--json", str(file)])
        == 0
    )
    figures = json.loads(file.read_text())
    assert figures["read_bandwidth_gb_s"] > 0
    assert figures["peak_gmac_s"] > 0
    assert {"rows", "median_ms", "weight_gb_s", "roofline_ms", "ratio_to_1", "ratio_to_roofline"} <= set(
        figures["rows"][0]
    )
    expected = max(
        (figures["weight_bytes"] + figures["kv_bytes"]) / figures["read_bandwidth_gb_s"],
        6 * figures["macs_per_row"] / figures["peak_gmac_s"],
    )
    assert figures["rows"][-1]["roofline_ms"] == pytest.approx(expected / 1e6)
    assert "T(M)/R(M)" in capsys.readouterr().out


def test_speculation_keeps_the_tokens(capsys):
    arguments = [
        "bench",
        "--shape",
        "tiny",
        "--draft-shape",
        "smaller",
        "--speculate",
        "--acceptance",
        "0.7",
        "--gamma",
        "4",
    ]
    assert main([*arguments, "--tokens", "60"]) == 0
    out = capsys.readouterr().out
    assert "random weights, acceptance set to 0.7" in out
    assert "identical: yes" in out


@pytest.mark.parametrize(("acceptance", "low", "high"), [(0.0, 1.0, 1.0), (0.8, 2.0, 4.9), (1.0, 5.0, 5.0)])
def test_set_acceptance_is_met(acceptance, low, high):
    target, draft = random_model(TINY, "q4g64"), random_model(SMALLER, "q4g64", seed=1)
    result = measure_speculation(target, draft, gamma=4, acceptance=acceptance, tokens=100)
    assert low <= result.tokens_per_target_pass <= high
    assert result.identical


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "nothing"], "demo-draft, or a model directory"),
        (["--shape", "odd"], "cannot be quantised"),
        (["--quant", "q5"], "invalid choice"),
        (["--rows", "0"], "1 to 21"),
        (["--rows", "22"], "1 to 21"),
        (["--rows", "x"], "list of integers"),
        (["--repeats", "0"], "1 to 1000"),
        (["--context", "0"], "1 to 1000000"),
        (["--speculate", "--context", "-1"], "1 to 1000000"),
        (["--speculate", "--tokens", "0"], "1 to 100000"),
        (["--speculate", "--gamma", "21"], "1 to 20"),
        (["--speculate", "--acceptance", "1.5"], "0 to 1"),
        (["--speculate", "--acceptance", "nan"], "0 to 1"),
        (["--speculate", "--draft-shape", "nothing"], "'nothing' is unknown"),
        (["--speculate", "--draft-shape", "odd"], "cannot be quantised"),
        (["--speculate", "--rows", "1"], "--rows does not go with --speculate"),
        (["--gamma", "4"], "--gamma goes only with --speculate"),
        (["--draft-shape", "smaller"], "--draft-shape goes only with --speculate"),
        (["--threads", "0"], "1 to 256"),
        (["--isa", "foo"], "choose one of scalar"),
        (["--json", "/no/such/place/rows.json"], "No such file or directory"),
        (["--json", "/"], "Is a directory"),
        (["--spec"], "unrecognized"),
    ],
)
def test_refusals_come_before_any_work(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(bench, "random_model", lambda *_, **__: pytest.fail("weights were made"))
    try:
        code = main(["bench", *([] if "--shape" in arguments else ["--shape", "tiny"]), *arguments])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("specfast")
    assert words in err


def test_the_check_of_the_output_leaves_no_file_and_keeps_one_that_is_there(tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise ConfigurationError("stopped")

    monkeypatch.setattr(bench, "random_model", stop)
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("{}")
    for file in (new, old):
        assert main(["bench", "--shape", "tiny", "--json", str(file)]) == 2
    assert "stopped" in capsys.readouterr().err
    assert not new.exists()
    assert old.read_text() == "{}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_full_in_the_end_is_one_line(capsys):
    arguments = ["bench", "--shape", "tiny", "--rows", "1", "--repeats", "1", "--context", "8", "--json", "/dev/full"]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert "T(M)/R(M)" in out
    assert err.splitlines()[-1].startswith("specfast bench: No space left on device")


def test_a_long_context_and_many_tokens_fit(capsys):
    sizes = ["--context", "8100", "--tokens", "200"]
    assert (
        main(["bench", "--shape", "smaller", "--draft-shape", "smaller", "--speculate", "--gamma", "20", *sizes]) == 0
    )
    assert "identical: yes" in capsys.readouterr().out


@pytest.mark.parametrize("draft", [[], ["--draft-shape", "draft-128k"], ["--draft-shape", "smaller"]])
def test_the_draft_takes_the_targets_vocabulary(draft, capsys):
    assert main(["bench", "--shape", "demo", "--speculate", "--tokens", "20", *draft]) == 0
    assert "identical: yes" in capsys.readouterr().out


def test_in_place_packs_neither_model(capsys, monkeypatch):
    packed = []

    def recorded(shape, quant, **options):
        model = random_model(shape, quant, **options)
        packed.append((shape.name, model.packed_bytes > 0))
        return model

    monkeypatch.setattr(bench, "random_model", recorded)
    isa = ["--isa", "avx512"] if "avx512" in build_info()["isas_supported"] else []
    common = ["bench", "--shape", "tiny", "--draft-shape", "smaller", "--speculate", "--tokens", "4", *isa]
    assert main([*common, "--in-place"]) == 0
    assert packed == [("tiny", False), ("smaller", False)]
    packed.clear()
    assert main(common) == 0
    assert packed == [("tiny", bool(isa)), ("smaller", bool(isa))]


def test_shapes():
    one = find_shape("llama-3.2-1b")
    weights = (
        one.layers
        * one.hidden
        * (one.heads * one.head_dim * 2 + 2 * one.kv_heads * one.head_dim + 3 * one.intermediate)
    )
    assert weights + one.vocab * one.hidden == pytest.approx(1.236e9, rel=1e-3)
    with pytest.raises(ConfigurationError, match="cannot be quantised"):
        random_model(ODD, "q4g64")

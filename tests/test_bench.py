"""`specfast bench` on a tiny shape: its figures, its JSON, its refusals."""

import json

import pytest
from specfast.bench import shapes
from specfast.bench.random_model import QUANTS, random_model
from specfast.bench.roofline import measure_rows
from specfast.bench.shapes import Shape, find_shape
from specfast.bench.speculate import measure_speculation
from specfast.cli import main
from specfast.errors import ConfigurationError

TINY = Shape("tiny", 256, 2, 4, 2, 64, 512, 1000, True, True)
SMALLER = Shape("smaller", 128, 1, 2, 1, 64, 256, 1000, False)


@pytest.fixture(autouse=True)
def _tiny_shapes(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setitem(shapes.SHAPES, "smaller", SMALLER)


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
    "arguments",
    [
        ["--shape", "nothing"],
        ["--quant", "q4g128", "--shape", "qwen-2.5-0.5b-like"],
        ["--rows", "0"],
        ["--rows", "22"],
        ["--rows", "x"],
        ["--context", "0"],
        ["--speculate", "--acceptance", "1.5"],
        ["--speculate", "--draft-shape", "draft-128k"],
        ["--threads", "0"],
    ],
)
def test_refusals(arguments, capsys):
    assert main(["bench", *([] if "--shape" in arguments else ["--shape", "tiny"]), *arguments]) == 2
    assert "specfast bench:" in capsys.readouterr().err


def test_shapes():
    one = find_shape("llama-3.2-1b")
    weights = (
        one.layers
        * one.hidden
        * (one.heads * one.head_dim * 2 + 2 * one.kv_heads * one.head_dim + 3 * one.intermediate)
    )
    assert weights + one.vocab * one.hidden == pytest.approx(1.236e9, rel=1e-3)
    with pytest.raises(ConfigurationError, match="cannot be quantised"):
        random_model(Shape("odd", 96, 1, 2, 1, 48, 96, 100, True), "q4g64")

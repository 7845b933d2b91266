"""The benchmark gate: a slower ratio fails, a slower minute does not."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import compare


def run_file(path, *, nine=1.5, speed=1.0, numpy=8.0):
    def entry(series, median, **info):
        return {"extra_info": {"series": series, **info}, "stats": {"median": median * speed}}

    benchmarks = [entry("matmul_rows_q4g64", t, M=m) for m, t in ((1, 1.0), (9, nine))]
    benchmarks += [entry("verify_tokens", 1.0), entry("verify_tokens_numpy", numpy)]
    machine = {"specfast": {"cpu": "Test CPU (R) 3000", "threads": 2}}
    path.write_text(json.dumps({"benchmarks": benchmarks, "machine_info": machine}))
    return str(path)


@pytest.fixture
def judged(tmp_path):
    for nine in (1.48, 1.5, 1.51):
        assert (
            compare.main([run_file(tmp_path / "r.json", nine=nine), "--baselines", str(tmp_path / "b"), "--update"])
            == 0
        )
    return lambda **run: compare.main([run_file(tmp_path / "r.json", **run), "--baselines", str(tmp_path / "b")])


def test_a_regression_fails(judged, capsys):
    assert judged(nine=1.8) == 1
    assert "SLOW matmul_rows_q4g64 T(9)/T(1)" in capsys.readouterr().out
    assert judged(numpy=4.0) == 1


def test_noise_and_slow_machines_pass(judged):
    assert judged(nine=1.55) == 0
    assert judged(speed=3.0) == 0


def test_a_wide_spread_widens_the_limit(tmp_path):
    for nine in (1.2, 1.5):
        compare.main([run_file(tmp_path / "r.json", nine=nine), "--baselines", str(tmp_path / "b"), "--update"])
    assert compare.main([run_file(tmp_path / "r.json", nine=1.8), "--baselines", str(tmp_path / "b")]) == 0


def test_an_unknown_cpu_is_told_how(tmp_path, capsys):
    assert compare.main([run_file(tmp_path / "r.json"), "--baselines", str(tmp_path / "b")]) == 0
    assert "--update" in capsys.readouterr().out

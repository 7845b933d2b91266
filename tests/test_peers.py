"""The peers' benchmark without any peer: its arithmetic, its tables from recorded numbers, and what it says of a missing one."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "peers"))
import engines
import report
import run
import speculation
import turns


def enumerated_tokens(acceptance, gamma):
    """The mean over every outcome of gamma independent tests: the accepted prefix and one token of the target's."""
    mean = 0.0
    for outcome in itertools.product((True, False), repeat=gamma):
        weight, prefix = 1.0, 0
        for accepted in outcome:
            weight *= acceptance if accepted else 1 - acceptance
        while prefix < gamma and outcome[prefix]:
            prefix += 1
        mean += weight * (prefix + 1)
    return mean


@pytest.mark.parametrize("gamma", range(9))
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.8, 1.0])
def test_expected_tokens_by_enumeration(acceptance, gamma):
    assert speculation.expected_tokens(acceptance, gamma) == pytest.approx(enumerated_tokens(acceptance, gamma))
    if acceptance < 1:
        closed = (1 - acceptance ** (gamma + 1)) / (1 - acceptance)
        assert speculation.expected_tokens(acceptance, gamma) == pytest.approx(closed)


def test_an_impossible_acceptance_is_refused():
    with pytest.raises(ValueError, match=r"1\.2"):
        speculation.expected_tokens(1.2, 3)


def test_speeds():
    found = speculation.speeds(10.0, {1: 100.0, 2: 100.0, 3: 300.0}, 0.5)
    assert [speed.gamma for speed in found] == [0, 1, 2]
    assert found[0].tok_s == pytest.approx(10.0)  # one token in 100 ms
    assert found[1].tok_s == pytest.approx(1.5e3 / 110)  # 1.5 tokens in one draft and one target pass
    assert found[2].tok_s == pytest.approx(1.75e3 / 320)
    assert speculation.best(found) == found[1]
    slow_draft = speculation.speeds(1000.0, {1: 100.0, 2: 100.0}, 0.5)
    assert speculation.best(slow_draft).gamma == 1  # the best that speculates, though plain is faster


def lane(engine, shape, medians, **about):
    times = [{"rows": m, "repeats": 20, "p10_ms": t - 1, "median_ms": t, "p90_ms": t + 1} for m, t in medians.items()]
    about = {"version": "1", "weights": "4 bit", "weight_bytes": 1_000_000_000, **about}
    return {"engine": engine, "shape": shape, "about": about, "idle_cpu_percent": 0.0, "times": times}


def record(*lanes, **more):
    return {
        "name": "llama-3.1-8b", "shape": "llama-3.1-8b", "command": "python run.py", "date": "2026-01-01", "commit": "abc",
        "context": 512, "threads": 2, "repeats": 20, "lanes": list(lanes), "left_out": ["MLX at that shape: slow"],
        "machine": {"cpu": "Test CPU", "cores": 2, "memory_gb": 8.0, "system": "Linux", "python": "3.11", "cpu_flags": "avx2"},
        "conditions": {
            "read_bandwidth_gb_s": 50.0, "read_p10_gb_s": 45.0, "read_p90_gb_s": 55.0, "peak_gmac_s": 100.0, "others_cpu_percent": 0.5, "seconds": 60.0,
        },
    } | more  # fmt: skip


def test_rows_table():
    fast = lane("specfast", "llama-3.1-8b", {1: 22.0, 4: 90.0}, macs_per_row=2e9)
    table = report.rows_table(record(fast, lane("other", "llama-3.1-8b", {1: 40.0, 2: 60.0})), "llama-3.1-8b")
    head, _, one, two, four = table.splitlines()
    assert head == "| M | R(M) of specfast | specfast | other |"
    # 1 GB of weights and 2 x 2 x 32 x 8 x 128 x 512 bytes of keys and values at 50 GB/s; 4 rows of 2 GMAC at 100 GMAC/s.
    assert one == "| 1 | 21.3 | 22.0 (21.0 .. 23.0), 1.00 | 40.0 (39.0 .. 41.0), 1.00 |"
    assert two == "| 2 | 40.0 |  | 60.0 (59.0 .. 61.0), 1.50 |"
    assert four == "| 4 | 80.0 | 90.0 (89.0 .. 91.0), 4.09 |  |"


def test_document():
    target = lane("specfast", "llama-3.1-8b", {1: 100.0, 2: 100.0, 3: 400.0}, macs_per_row=2e9)
    draft = lane("specfast", "llama-3.2-1b", {1: 20.0})
    fewer = [lane("other", "llama-3.1-8b", {1: 100.0, 3: 200.0}), lane("other", "llama-3.2-1b", {1: 22.0})]
    run_record = record(*fewer, target, draft, draft_shape="llama-3.2-1b", acceptance=0.8)
    text = report.document({"a": run_record}, "peers.svg")
    assert "| plain | 1.00 | 10.00 (1.00) | 10.00 (1.00) |" in text
    assert "| 1 | 1.80 |  | **15.00 (1.50)** |" in text  # 1.8 tokens in 20 + 100 ms
    assert "| 2 | 2.44 | **10.00 (1.00)** | 5.55 (0.55) |" in text  # 2.44 in 2 x 22 + 200 and in 2 x 20 + 400 ms
    assert "Computed, not run" in text
    assert "Not measured: MLX at that shape: slow." in text
    assert "(peers.svg)" in text
    assert "(peers.svg)" not in report.document({"a": run_record}, None)


def test_the_committed_document_is_that_of_its_records():
    docs = Path(__file__).parents[1] / "docs"
    records = json.loads((docs / "peers.json").read_text())
    assert (docs / "peers.md").read_text() == report.document(records, "peers.svg")


def test_turns():
    assert turns.rotated([1, 2, 3], 4) == [2, 3, 1]
    for wanted, repeats in ((20, 20), (3, 20), (7, 20)):
        part = [turns.takes_part(repeat, wanted, repeats) for repeat in range(repeats)]
        assert sum(part) == wanted


def test_a_missing_peer_says_what_to_install(monkeypatch, capsys):
    absent = engines.Engine("Absent", "peer_absent", ("no_such_package.core",), "no-such-package")
    monkeypatch.setitem(engines.ENGINES, "Absent", absent)
    assert run.main(["--peers", "Absent"]) == 1
    error = capsys.readouterr().err
    assert "Absent: left out, Python finds no module no_such_package.core; pip install no-such-package" in error


def test_shapes_and_rows_a_peer_is_measured_at():
    chosen, left_out = run.choose(run.parse(["--peers", "specfast", "--speculate"]))
    assert chosen == [("specfast", "llama-3.2-1b"), ("specfast", "llama-3.1-8b")]
    assert not left_out


@pytest.mark.parametrize("arguments", [["--peers", "x"], ["--rows", "1,a"], ["--rows", "0"], ["--acceptance", "2"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_help_needs_no_peer():
    out = subprocess.run([sys.executable, run.__file__, "--help"], capture_output=True, text=True, check=True)
    assert "requirements.txt" in out.stdout

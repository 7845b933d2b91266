"""The benchmark gate: a slower ratio fails, a slower minute does not."""

import json
import sys
from pathlib import Path

import pytest
from specfast.bench import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import compare


def run_file(path, *, nine=1.5, speed=1.0, numpy=8.0, numbers="25-17"):
    def entry(series, median, **info):
        return {"extra_info": {"series": series, **info}, "stats": {"median": median * speed}}

    benchmarks = [entry("matmul_rows_q4g64", t, M=m) for m, t in ((1, 1.0), (9, nine))]
    benchmarks += [entry("verify_tokens", 1.0), entry("verify_tokens_numpy", numpy)]
    machine = {"specfast": {"cpu": "Test CPU (R) 3000", "cpu_numbers": numbers, "threads": 2}}
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


def test_an_unknown_cpu_is_told_how(judged, tmp_path, capsys):
    capsys.readouterr()
    assert judged(nine=9.0, numbers="26-2") == 0  # another generation under the same name
    out = capsys.readouterr().out
    assert "no baseline for this CPU" in out
    assert "test-cpu-r-3000-26-2-2-threads; there are: test-cpu-r-3000-25-17-2-threads" in out
    assert f"python benchmarks/compare.py {tmp_path / 'r.json'} --update" in out


def test_what_is_no_record_is_a_usage_error(tmp_path, capsys):
    (tmp_path / "r.json").write_text('{"benchmarks": []}')
    for file in ("r.json", "missing.json"):
        with pytest.raises(SystemExit, match="2"):
            compare.main([str(tmp_path / file)])
        assert "is no record" in capsys.readouterr().err


def test_stored_baselines_are_named_by_their_machine():
    files = list(compare.BASELINES.glob("*.json"))
    assert files
    for file in files:
        assert compare.cpu_key({"machine_info": {"specfast": json.loads(file.read_text())["machine"]}}) == file.stem


X86 = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n"
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("text", "name", "numbers"),
    [
        (X86, "AMD EPYC", "26-2"),
        (f"{X86}\n{X86.replace('26', '25')}", "AMD EPYC", "26-2"),
        (ARM, "", "0x41-0xd0c"),
        ("cpu\t: POWER9\n", "", ""),
        ("", "", ""),
    ],
)
def test_the_processor(text, name, numbers, monkeypatch, tmp_path):
    assert machine.read_cpuinfo(text) == machine.Cpu(name, numbers)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu().name
    machine.CPUINFO.write_text(text)
    assert machine.cpu().numbers == machine.environment()["cpu_numbers"] == numbers
    assert machine.cpu().name == (name or machine.cpu().name) != ""

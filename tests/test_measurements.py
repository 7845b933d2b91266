"""What controllers measure: cost tables, acceptance by position, and the file that keeps both."""

import json
import math
import os
import shutil
import stat

import pytest
import specfast
from hypothesis import given
from hypothesis import strategies as st
from specfast.drafters import Offer
from specfast.measurements import Acceptance, CostTable, Measurements
from specfast.measurements_file import SWITCH, load_measurements, measurements_path, save_measurements
from specfast.stats import Round, SpeculationStats, wilson_interval
from tiny_directories import write_pair

MODEL = Offer("model", "model", 0.7, 64)


def test_a_cost_table_is_a_line_through_its_neighbours():
    table = CostTable({1: 1.0, 5: 1.4, 9: 3.0})
    assert [round(table.at(n), 6) for n in (1, 3, 5, 7, 9, 17)] == [1.0, 1.2, 1.4, 2.2, 3.0, 5.0]
    assert CostTable({4: 2.0}).at(1) == CostTable({4: 2.0}).at(20) == 2.0
    assert CostTable({1: 2.0, 5: 1.0}).at(9) == 2.0  # noise: more rows are not cheaper


def test_a_cell_forgets_cold_samples_and_does_not_believe_interruptions():
    table = CostTable()
    for seconds in (9.0, 1.0, 1.2):
        table.add(3, seconds)
    assert table.at(3) == 1.0
    for _ in range(CostTable.SETTLED - 3):
        assert table.add(3, 1.1) == 1.0
    settled = table.at(3)
    assert 1.05 < settled < 1.1
    assert table.add(3, 1000.0) == 2.0
    assert table.at(3) < 1.05 * settled
    for _ in range(200):
        table.add(3, 2.0)
    assert table.at(3) == pytest.approx(2.0, rel=0.01)


def test_a_slower_machine_is_slower_for_passes_that_were_not_measured_since():
    measured = Measurements()
    for _ in range(CostTable.SETTLED):
        for rows, seconds in ((1, 1.0), (4, 1.2)):
            measured.add_verify(rows, 100, seconds)
        measured.add_draft(MODEL, 3, 0.3)
    for _ in range(30):
        measured.add_verify(4, 100, 2.4)
    assert measured.verify_seconds(4, 100) == pytest.approx(2.4, rel=0.02)
    assert measured.verify_seconds(1, 100) == pytest.approx(2.0, rel=0.3)
    assert measured.draft_seconds(MODEL, 3) == pytest.approx(0.6, rel=0.3)
    assert measured.as_dict()["verify"]["0"]["1"] == 1.0  # at the usual pace


@given(chances=st.lists(st.floats(0, 1), min_size=1, max_size=8), gamma=st.integers(0, 20))
def test_expected_tokens_of_an_acceptance(chances, gamma):
    acceptance = Acceptance(0.5)
    acceptance.tested = [1e9] * len(chances)
    acceptance.accepted = [1e9 * chance for chance in chances]
    followed = [*chances, *[chances[-1]] * 20][:gamma]  # beyond what was seen, as at the last position
    expected = acceptance.expected_tokens(gamma)
    assert len(expected) == gamma + 1
    assert expected[-1] == pytest.approx(1 + sum(math.prod(followed[: i + 1]) for i in range(gamma)), rel=0.03)


def test_an_acceptance_starts_at_its_prior_and_follows_recent_rounds():
    acceptance = Acceptance(0.7)
    assert acceptance.expected_tokens(2) == pytest.approx([1, 1.7, 2.19])
    for _ in range(60):
        acceptance.add(4, 4)
    assert acceptance.expected_tokens(4)[-1] > 4.3
    for _ in range(60):
        acceptance.add(4, 1)
    first, second = (a / t for a, t in zip(acceptance.accepted[:2], acceptance.tested[:2], strict=True))
    assert (first > 0.99, second < 0.25) == (True, True)
    assert len(acceptance.tested) == 4


def test_passes_at_contexts_never_seen_are_taken_from_the_nearest():
    measured = Measurements()
    for rows, seconds in ((1, 1.0), (5, 1.4)):
        measured.add_verify(rows, 100, seconds)
    assert measured.verify_seconds(3, 5000) == pytest.approx(1.2)
    measured.add_verify(5, 5000, 2.8)
    assert measured.verify_seconds(1, 5000) == pytest.approx(2.0)  # twice as slow there
    measured.add_verify(1, 5000, 2.5)
    assert measured.verify_seconds(1, 5000) == 2.5
    assert measured.verify_seconds(1, 100) == 1.0


def test_what_is_read_first_is_told_from_drafting():
    measured = Measurements()
    for gamma in (1, 4):
        measured.add_draft(MODEL, gamma, 0.1 * gamma)
    late = MODEL._replace(unread=101)
    measured.add_draft(late, 4, 0.4 + 1.01)
    assert measured.draft_seconds(late, 4) == pytest.approx(0.4)
    assert measured.reading_seconds(late) == pytest.approx(1.01)
    assert measured.reading_seconds(MODEL) == 0.0


def some_measurements():
    measured = Measurements()
    measured.add_verify(1, 100, 0.01)
    measured.add_verify(6, 100, 0.012)
    measured.add_draft(MODEL, 5, 0.003)
    measured.acceptance_of(MODEL).add(5, 3)
    return measured


def test_a_file_gives_back_what_was_saved(tmp_path):
    path = tmp_path / "a" / "b.json"
    save_measurements(path, some_measurements())
    assert load_measurements(path).as_dict() == some_measurements().as_dict()
    assert [file.name for file in path.parent.iterdir()] == ["b.json"]
    save_measurements(path, Measurements())  # replaced
    assert load_measurements(path).as_dict() == Measurements().as_dict()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"verify": {}, "draft": {}, "reading": {}}',
        b'{"verify": {"0": {}}, "draft": {}, "reading": {}, "acceptance": {}}',
        b'{"verify": {"0": {"1": -1}}, "draft": {}, "reading": {}, "acceptance": {}}',
        b'{"verify": {"0": {"1": NaN}}, "draft": {}, "reading": {}, "acceptance": {}}',
        b'{"verify": {"x": {"1": 1}}, "draft": {}, "reading": {}, "acceptance": {}}',
        b'{"verify": {}, "draft": {}, "reading": {}, "acceptance": {"model": [0.5, [1], [2]]}}',
        b'{"verify": {}, "draft": {}, "reading": {}, "acceptance": {"model": [0.5, [1], []]}}',
        b'{"verify": {}, "draft": {}, "reading": {}, "acceptance": {"model": "x"}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_as_good_as_none(tmp_path, damage):
    path = tmp_path / "m.json"
    path.write_bytes(damage)
    assert load_measurements(path).as_dict() == Measurements().as_dict()
    save_measurements(path, some_measurements())
    assert json.loads(path.read_bytes())["draft"] == {"model": {"0": 0.0, "5": 0.003}}


def test_where_nothing_can_be_written_nothing_happens(tmp_path):
    (tmp_path / "file").write_text("")
    save_measurements(tmp_path / "file" / "m.json", some_measurements())
    save_measurements(None, some_measurements())
    if os.getuid():
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        save_measurements(tmp_path / "m.json", some_measurements())
        assert not (tmp_path / "m.json").exists()


def test_measurements_last_from_one_engine_to_the_next(tmp_path, monkeypatch):
    directories = write_pair(tmp_path / "pair", max_context=300)
    monkeypatch.setenv("SPECFAST_MEASUREMENTS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"max_tokens": 120, "temperature": 0.0, "ignore_eos": True}
    engine = specfast.load(*directories)
    fixed = engine.generate("x", **options)
    assert not (tmp_path / "cache").exists()  # nothing is measured with a fixed gamma
    made = engine.generate("x", **options, gamma="auto")
    (file,) = (tmp_path / "cache" / "specfast" / "measurements").iterdir()
    known = load_measurements(file)
    assert known.verify
    again = specfast.load(*directories).stream("x", **options, gamma="auto")
    assert again._controller.measured.as_dict() == known.as_dict()
    assert [token for chunk in again for token in chunk.token_ids] == made.token_ids == fixed.token_ids

    pair = engine.pair
    paths = {measurements_path(pair.target, pair.draft), measurements_path(pair.target, None)}
    other = specfast.load(*directories, precision="bf16").pair
    paths.add(measurements_path(other.target, other.draft))
    threads = specfast.build_info()["threads"]
    try:
        specfast.inference.set_threads(1)
        paths.add(measurements_path(pair.target, pair.draft))
    finally:
        specfast.inference.set_threads(threads)
    assert len(paths) == (4 if threads > 1 else 3)
    monkeypatch.setenv("SPECFAST_MEASUREMENTS", "0")
    assert measurements_path(pair.target, pair.draft) is None


@pytest.mark.parametrize("used_before", [False, True])
def test_an_automatic_gamma_outlives_the_models_directory(tmp_path, monkeypatch, used_before):
    monkeypatch.delenv(SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target, draft = write_pair(tmp_path)
    engine = specfast.load(target, draft, gamma="auto", precision="f32")
    expected = engine.generate("def", max_tokens=8, temperature=0, gamma="auto" if used_before else 2).token_ids
    path = measurements_path(engine.pair.target, engine.pair.draft) if used_before else None
    shutil.rmtree(target)
    assert engine.generate("def", max_tokens=8, temperature=0).token_ids == expected
    assert measurements_path(engine.pair.target, engine.pair.draft) == path


@pytest.mark.parametrize("home", ["", "relative/cache"])
def test_a_relative_cache_is_ignored(tmp_path, monkeypatch, home):
    engine = specfast.load(*write_pair(tmp_path), precision="f32")
    monkeypatch.delenv(SWITCH)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    path = measurements_path(engine.pair.target, None)
    assert path.parent == tmp_path / "home" / ".cache" / "specfast" / "measurements"


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.json")  # opening it would wait for a writer
    assert load_measurements(tmp_path / "fifo.json").as_dict() == Measurements().as_dict()


def test_wilson_intervals():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    low, high = wilson_interval(900, 1000)
    assert (low < 0.9 < high, high - low < 0.04) == (True, True)


@pytest.mark.parametrize(
    ("kept", "accepted", "tested"),
    [(1, 1, 1), (3, 3, 3), (4, 4, 4), (5, 4, 5)],
    ids=["1", "3", "all accepted", "whole"],
)
def test_a_round_cut_by_the_end_of_the_text_counts_what_entered_it(kept, accepted, tested):
    stats = SpeculationStats()
    stats.count(Round(6, 4, kept, 0.1, 0.2, 0.01, 0.02, 10, MODEL))
    made = stats.as_dict()
    model = made["drafters"]["model"]
    assert made["accepted"] == model["accepted"] == sum(one["accepted"] for one in model["positions"]) == accepted
    assert sum(one["tested"] for one in model["positions"]) == tested
    assert made["acceptance_rate"] == model["acceptance_rate"] == accepted / 6


def test_stats_by_drafter_and_position_add_up():
    stats, copied = SpeculationStats(), Offer("suffix", "suffix/3", 0.8, 64)
    for round_ in (
        Round(4, 2, 3, 0.1, 0.2, 0.01, 0.02, 10, MODEL),
        Round(4, 4, 5, 0.1, 0.2, 0.01, 0.02, 13, MODEL),
        Round(2, 0, 1, 0.0, 0.2, 0.01, 0.02, 18, copied),
        Round(0, 0, 1, 0.0, 0.1, 0.01, 0.02, 19),
    ):
        stats.count(round_)
    total = SpeculationStats()
    total.add(stats)
    total.add(stats)
    for made, times in ((stats, 1), (total, 2)):
        by_drafter = json.loads(json.dumps(made.as_dict()))["drafters"]
        model = by_drafter["model"]
        assert (model["rounds"], model["drafted"], model["accepted"]) == (2 * times, 8 * times, 6 * times)
        assert model["gammas"] == {"4": 2 * times}
        assert [one["tested"] for one in model["positions"]] == [2 * times, 2 * times, 2 * times, times]
        assert [one["accepted"] for one in model["positions"]] == [2 * times, 2 * times, times, times]
        assert (by_drafter["suffix"]["acceptance_rate"], by_drafter["none"]["rounds"]) == (0.0, times)
        assert made.drafted == sum(one["drafted"] for one in by_drafter.values())
        assert made.accepted == sum(one["accepted"] for one in by_drafter.values())
    assert "model: 2 rounds, gamma 4 x2" in stats.decision_lines()
    assert "plain: 1 rounds" in stats.decision_lines()

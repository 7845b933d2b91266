"""exo's second generation for real: its own tokens in fewer passes, with its prefix cache, samplers and cancelling.

First its engine in one process, then the application: its command line, API, master, worker and the process that runs a model.
"""

import contextlib
import re
import subprocess
import threading
from pathlib import Path

import pytest
from exo_ring import wait_until
from exo_v1_home import DRAFT, MODEL, PYTHON, application, drive, environment, make_folders

pytestmark = pytest.mark.skipif(
    PYTHON is None,
    reason="SPECFAST_EXO_V1_PYTHON does not name the interpreter of an environment with exo's second generation",
)
GREEDY = {"temperature": 0.0, "max_output_tokens": 32}
SAMPLED = {"temperature": 1.0, "seed": 5, "max_output_tokens": 32}
OPTIONS = {"draft_model": DRAFT, "gamma": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("v1")
    make_folders(root)
    return root


@pytest.fixture
def v1(folders):
    def run(requests, *, options=OPTIONS, environment=None, **job):
        return drive(folders, requests, options=options, more=environment or {}, **job)

    return run


REQUESTS = [
    [GREEDY],
    [SAMPLED],
    [{**SAMPLED, "top_p": 0.9, "repetition_penalty": 1.3}],
    [{**GREEDY, "presence_penalty": 0.5}],
]


def tokens(answer):
    return [found["tokens"] for found in answer["found"]]


def test_tokens_are_exos_own_in_fewer_passes(v1):
    plain, printed = v1(REQUESTS, options=None)
    assert plain["generator"] == "ExoBatchGenerator"
    assert "specfast" not in printed
    speculative, printed = v1(REQUESTS)
    assert speculative["generator"] == "SpeculativeBatch"
    assert f"draft {DRAFT} (compatible)" in printed
    for own, ours in zip(plain["answers"], speculative["answers"], strict=True):
        assert tokens(ours) == tokens(own)
        assert (own["most"], len(tokens(own)[0])) == (1, 32)
        assert ours["most"] > 1
        print(f"passes {own['passes']['all']} -> {ours['passes']['all']}")
    assert speculative["answers"][0]["passes"]["all"] < 0.8 * plain["answers"][0]["passes"]["all"]
    assert sum(a["passes"]["all"] for a in speculative["answers"]) < sum(a["passes"]["all"] for a in plain["answers"])


@pytest.mark.parametrize(
    "options", [{"drafter": "suffix", "gamma": 4}, {"gamma": "auto", "draft_model": DRAFT}], ids=str
)
def test_other_drafters(v1, options):
    assert tokens(v1([[GREEDY]], options=options)[0]["answers"][0]) == tokens(
        v1([[GREEDY]], options=None)[0]["answers"][0]
    )


def test_a_prompt_seen_before_comes_from_the_prefix_cache(v1):
    text = {"text": "the quick brown fox " * 90, **GREEDY}
    found = {}
    for name, options in (("plain", None), ("speculative", OPTIONS)):
        answers = v1([[dict(text)], [dict(text)]], options=options)[0]["answers"]
        first, second = (answer["found"][0] for answer in answers)
        assert first["tokens"] == second["tokens"]
        assert second["cached"] > 0.9 * second["prompt"]
        assert first["cached"] == 0
        found[name] = first["tokens"]
    assert found["plain"] == found["speculative"]


@pytest.mark.parametrize("count", [1, 4, 16])
def test_requests_that_come_together_are_exos_batch(v1, count):
    requests = [[{**GREEDY, "text": f"text {i}"} for i in range(count)]]
    plain, _ = v1(requests, options=None)
    ours, _ = v1([[dict(each) for each in requests[0]]])
    assert len(set(map(tuple, tokens(plain["answers"][0])))) > min(count, 3) - 1
    assert tokens(ours["answers"][0]) == tokens(plain["answers"][0])
    print(count, "requests, passes:", plain["answers"][0]["passes"]["all"], "->", ours["answers"][0]["passes"]["all"])


def test_cancel(v1):
    long = {"temperature": 0.0, "max_output_tokens": 1500}
    for options in (None, OPTIONS):
        answers = v1([[long], [GREEDY]], options=options, cancel_after=20)[0]["answers"]
        assert answers[0]["ended"] == ["CancelledResponse"]
        assert len(tokens(answers[0])[0]) < 1500
        assert len(tokens(answers[1])[0]) == 32


@pytest.mark.parametrize("name", ["EXO_SPECULATIVE", "EXO_DRAFT_MODE"])
def test_off_where_exo_speculates_itself(v1, name):
    answer, printed = v1([[GREEDY]], environment={name: "1"})
    assert answer["generator"] == "ExoBatchGenerator"
    assert f"exo speculates itself ({name})" in printed


FLAGS = ("--speculative-draft-model", DRAFT, "--speculative-gamma", "4")
CHATS = (
    {"temperature": 0, "max_tokens": 32},
    {"temperature": 1.0, "seed": 5, "max_tokens": 32},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9, "max_tokens": 32},
)


@pytest.fixture(scope="module")
def texts(folders):
    """exo's own, of requests one after another and of four at once."""
    with application(folders) as exo:
        found = [exo.text(**body) for body in CHATS], four_at_once(exo)
        assert "specfast" not in exo.printed()
    assert len(set(found[0])) > 1
    return found


def four_at_once(exo):
    answers = {}

    def ask(i):
        answers[i] = exo.text(text=f"text {i}", temperature=0, max_tokens=32)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [answers[i] for i in range(4)]


def passes(exo):
    """(tokens, passes of the target) of each request that was decoded speculatively."""
    return [tuple(map(int, each)) for each in re.findall(r"(\d+) tokens in (\d+) target passes", exo.printed())]


@pytest.mark.parametrize(
    ("arguments", "more", "program"),
    [
        (FLAGS, {}, "exo"),
        (("--inference-engine", "speculative", "--speculative-target-model", "llama-3.1-8b", *FLAGS), {}, "exo"),
        ((), {"SPECFAST_EXO": "1"}, "exo"),
        (FLAGS, {"SPECFAST_EXO_HOOK": "0"}, "specfast-exo"),
    ],
    ids=["flags", "the document's flags", "variable", "without the hook"],
)
def test_the_application_says_the_same_in_fewer_passes(folders, texts, arguments, more, program):
    alone, together = texts
    with application(folders, *arguments, program=program, **more) as exo:
        assert [exo.text(**body) for body in CHATS] == alone
        wait_until(lambda: len(passes(exo)) == len(CHATS), exo.printed)
        counted = passes(exo)
        assert four_at_once(exo) == together
        print("tokens, passes:", counted)
        assert [tokens for tokens, _ in counted] == [32] * len(CHATS)
        assert not arguments or counted[0][1] < 0.8 * 32  # else gamma is automatic


def test_a_client_of_the_application_that_leaves(folders, texts):
    with application(folders, *FLAGS) as exo:
        answer = exo.stream(model=MODEL, temperature=0, max_tokens=1500)
        answer.read(100)
        with contextlib.suppress(OSError):
            answer.close()
        wait_until(lambda: len(passes(exo)) == 1, exo.printed)
        assert passes(exo)[0][0] < 1500
        assert exo.text(**CHATS[0]) == texts[0][0]
        wait_until(lambda: [tokens for tokens, _ in passes(exo)][1:] == [32], exo.printed)


def test_the_application_has_no_run(folders):
    command = [str(Path(PYTHON).with_name("exo")), "run", "llama-3.1-8b", *FLAGS]
    done = subprocess.run(command, env=environment(folders), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "this exo has no `run`" in done.stderr
    assert "/place_instance" in done.stderr

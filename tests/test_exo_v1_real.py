"""exo's second generation for real, in process: its own tokens in fewer passes, with its prefix cache, samplers and cancelling."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from exo_home import MLX, make_home

PYTHON = os.environ.get("SPECFAST_EXO_V1_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None,
    reason="SPECFAST_EXO_V1_PYTHON does not name the interpreter of an environment with exo's second generation",
)
MODEL, DRAFT = MLX + "Meta-Llama-3.1-8B-Instruct-4bit", MLX + "Llama-3.2-3B-Instruct-4bit"
GREEDY = {"temperature": 0.0, "max_output_tokens": 32}
SAMPLED = {"temperature": 1.0, "seed": 5, "max_output_tokens": 32}
OPTIONS = {"draft_model": DRAFT, "gamma": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("v1")
    home = make_home(root, models=("llama",))
    models = root / "models"
    for repository in (MODEL, DRAFT):
        shutil.copytree(home.folder(repository), models / repository.replace("/", "--"))
    (root / "dashboard").mkdir()
    return root


@pytest.fixture
def v1(folders):
    def run(requests, *, options=OPTIONS, environment=None, **job):
        hidden = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SPECFAST", "EXO"))
        }
        own = {
            **hidden,
            "EXO_HOME": str(folders / "exo"),
            "HOME": str(folders),
            "EXO_DEFAULT_MODELS_DIR": str(folders / "models"),
            "EXO_MODELS_DIRS": str(folders / "models"),
            "EXO_DASHBOARD_DIR": str(folders / "dashboard"),
            "HF_HUB_OFFLINE": "1",
            "SPECFAST_MEASUREMENTS": "0",
        }
        if options is not None:
            own |= {"SPECFAST_EXO": "1", "SPECFAST_EXO_OPTIONS": json.dumps(options)}
        job |= {"model": MODEL, "layers": 32, "requests": requests}
        driver = Path(__file__).with_name("exo_v1_driver.py")
        done = subprocess.run(
            [PYTHON, str(driver), json.dumps(job)], check=False, env={**own, **(environment or {})}, capture_output=True, text=True, timeout=300
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

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

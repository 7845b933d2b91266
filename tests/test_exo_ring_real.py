"""Rings of the real exo on loopback: the single node's tokens in fewer laps, whoever is asked, and whoever leaves."""

import contextlib
import http.client
import json
import re

import pytest
from exo_home import make_home
from exo_ring import PYTHON, ring, wait_until

pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="SPECFAST_EXO_PYTHON does not name the interpreter of an environment with exo (docs/exo.md)"
)
MODEL = "llama-3.1-8b"
ENGINE = ("--inference-engine", "speculative")
PAIR = (
    *ENGINE,
    "--speculative-target-model",
    MODEL,
    "--speculative-draft-model",
    "llama-3.2-3b",
    "--speculative-gamma",
    "4",
)
COUPLED = ("--speculative-rule", "coupled")
SAMPLED = {"temperature": 1.0, "seed": 7}
TOKENS = 48


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("exo"))


@pytest.fixture(scope="module")
def plain(home, tmp_path_factory):
    """The single node's plain tokens at temperature 0, and with a seed at 1."""
    root = tmp_path_factory.mktemp("alone")
    with ring(root, home, ["one"], arguments={"": (*PAIR, *COUPLED, "--disable-speculative")}) as nodes:
        for options in ({"temperature": 0}, SAMPLED):
            status, answer = nodes["one"].chat(**options)
            assert status == 200, answer
        greedy, sampled = nodes["one"].emitted()
    assert greedy != sampled
    return {"greedy": greedy, "sampled": sampled}


def clients(node, count, **options):
    import threading

    answers = [None] * count

    def ask(i):
        answers[i] = node.chat(**options)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"]], ids=len)
def test_tokens_are_the_single_nodes_whoever_is_asked(home, plain, tmp_path, names):
    with ring(tmp_path, home, names, arguments={"": PAIR}) as nodes:
        first = nodes[names[-1]]
        for asked in nodes.values():
            for options in ({"temperature": 0}, SAMPLED):
                status, answer = asked.chat(**options)
                assert status == 200, (answer, first.printed()[-3000:])
                assert answer["usage"]["completion_tokens"] == TOKENS
            told = first.emitted()[-2:]
            assert told == [plain["greedy"], plain["sampled"]]
        laps = first.passes()
        assert len(laps) == 2 * len(names)
        assert all(made == TOKENS > 1.2 * passes for made, passes in laps), laps
        print("tokens, laps:", laps)
        together = clients(first, 3, temperature=0)
        assert len({json.dumps(answer["choices"]) for _, answer in together}) == 1
        # A request of its own length, and one too long.
        assert nodes[names[0]].chat(temperature=0, max_tokens=5)[1]["usage"]["completion_tokens"] == 5
        status, answer = nodes[names[0]].chat("word " * 3000)
        assert (status, "context" in answer["detail"]) == (400, True), answer
        assert first.get("/v1/speculation")["under_way"] == 0


@pytest.mark.parametrize("asked", ["a", "b", "c"])
@pytest.mark.parametrize("killed", ["a", "b", "c"])
def test_a_node_that_is_killed_ends_the_request_with_an_error_and_the_next_works(home, plain, tmp_path, killed, asked):
    if asked == killed:
        pytest.skip("who is asked has to live")
    with ring(tmp_path, home, ["a", "b", "c"], arguments={"": PAIR}, tokens=1500) as nodes:
        answer = nodes[asked].stream(temperature=0)
        answer.read(200)
        nodes[killed].kill()
        with pytest.raises((http.client.HTTPException, OSError)):
            answer.read()
        assert "failed and ends here" in nodes[asked].printed()
        status, failed = nodes[asked].chat(temperature=0, max_tokens=TOKENS)
        assert status in (200, 500), failed  # 500 until its peers have noticed
        left = {"a", "b", "c"} - {killed}
        for name in left:
            wait_until(lambda name=name: nodes[name].members() == left, lambda: nodes[asked].printed()[-3000:])
        status, answer = nodes[asked].chat(temperature=0, max_tokens=TOKENS)
        assert status == 200, (answer, nodes[asked].printed()[-3000:])
        last = nodes[max(left)]
        wait_until(lambda: plain["greedy"] in last.emitted(), lambda: str(last.emitted()))


def test_a_ring_with_a_stock_node_decodes_plainly(home, plain, tmp_path):
    arguments = {"b": PAIR, "a": ("--inference-engine", "mlx")}
    with ring(tmp_path, home, ["a", "b"], arguments=arguments, stock=["a"]) as nodes:
        status, answer = nodes["b"].chat(temperature=0)
        assert status == 200, (answer, nodes["b"].printed()[-3000:])
        assert answer["usage"]["completion_tokens"] == TOKENS
        assert nodes["a"].emitted()[0] == plain["greedy"]
        assert nodes["b"].chat(temperature=0)[0] == 200
        warnings = [line for line in nodes["b"].lines if "does not run this specfast" in line]
        assert len(warnings) == 1
        assert "node a" in warnings[0]


def test_settings_of_all_nodes_count(home, plain, tmp_path):
    """The document's two commands: only the second device was given a gamma; two different ones are an error."""
    names = ["a", "b"]
    models = (*ENGINE, "--speculative-target-model", MODEL, "--speculative-draft-model", "llama-3.2-3b")
    arguments = {"b": models, "a": (*models, "--speculative-gamma", "6")}
    with ring(tmp_path / "one", home, names, arguments=arguments) as nodes:
        assert nodes["b"].chat(temperature=0)[0] == 200
        assert nodes["b"].emitted()[0] == plain["greedy"]
        stats = nodes["b"].get("/v1/speculation")
        assert stats["drafted"] >= 5 * (stats["target_passes"] - 2)
    arguments = {"b": (*models, "--speculative-gamma", "3"), "a": (*models, "--speculative-gamma", "6")}
    with ring(tmp_path / "two", home, names, arguments=arguments) as nodes:
        for asked in names:
            status, answer = nodes[asked].chat(temperature=0)
            assert status == 400, answer
            assert "gamma is 3 at node b and 6 at node a" in answer["detail"]


def test_a_client_that_leaves_ends_its_request_everywhere(home, tmp_path):
    with ring(tmp_path, home, ["a", "b"], arguments={"": PAIR}, tokens=1500) as nodes:
        answer = nodes["a"].stream(temperature=1.0)
        answer.read(100)
        assert nodes["b"].get("/v1/speculation")["under_way"] == 1
        with contextlib.suppress(OSError):
            answer.close()
        wait_until(lambda: nodes["b"].get("/v1/speculation")["under_way"] == 0, nodes["b"].printed)
        assert "cancelled" in nodes["b"].printed()


def test_layers_in_exos_own_shards_as_on_an_apple_gpu(home, plain, tmp_path):
    typed = (*PAIR, "--speculative-target-engine", "mlx")
    gpu = "from specfast.exo import layers; layers.on_apple_gpu = lambda: True\n"
    with ring(tmp_path, home, ["a", "b"], arguments={"": typed}, first=gpu) as nodes:
        for options in ({"temperature": 0}, SAMPLED):
            status, answer = nodes["a"].chat(**options)
            assert status == 200, (answer, nodes["b"].printed()[-3000:])
        assert nodes["b"].emitted() == [plain["greedy"], plain["sampled"]]
        assert "here on the mlx host" in nodes["b"].printed()
        laps = nodes["b"].passes()
        print("tokens, laps:", laps)
        assert all(made == TOKENS > 1.2 * passes for made, passes in laps)


def test_layers_that_only_exos_own_shards_have(home, tmp_path):
    """DeepSeek V3, whose text loops: what follows is copied, and checked by exo's layers in MLX."""
    home.add_deepseek(PYTHON)
    model = ("--speculative-target-model", "deepseek-v3", "--speculative-target-engine", "mlx")
    typed = (*ENGINE, *model, "--speculative-drafter", "suffix", "--speculative-gamma", "4")
    body = {"model": "deepseek-v3", "temperature": 0}
    with ring(tmp_path / "own", home, ["one"], arguments={"": ("--inference-engine", "mlx")}, stock=["one"]) as nodes:
        assert nodes["one"].chat(**body)[0] == 200
        (own,) = nodes["one"].emitted()
    with ring(tmp_path / "ring", home, ["a", "b"], arguments={"": typed}) as nodes:
        for asked in nodes.values():
            status, answer = asked.chat(**body)
            assert status == 200, (answer, nodes["b"].printed()[-3000:])
        assert nodes["b"].emitted() == [own, own], nodes["b"].printed()
        assert re.search(r"in a ring, layers 0 to \d+ here on the mlx host", nodes["b"].printed())
        laps = nodes["b"].passes()
        print("tokens, laps:", laps)
        assert all(made == TOKENS > passes for made, passes in laps)
        stats = nodes["b"].get("/v1/speculation")
        assert (stats["host_requests"], stats["models"]["deepseek-v3"]["engine"]) == (0, "mlx")

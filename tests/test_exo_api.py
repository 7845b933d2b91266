"""exo's chat API with speculation: a request's own options, its end when nobody waits, and the counters."""

import asyncio
import importlib
import json
import threading
import time
from types import SimpleNamespace

import pytest
from exo_home import SPECIAL, deep_decoder, drafting
from exo_session import DRAFT, GREEDY, TARGET, Reference, Session, chat, fake_exo, is_home
from exo_session import repository as repository_of
from specfast.errors import ConfigurationError
from specfast.exo import api as additions
from specfast.exo.contract import CLASS_NAME
from specfast.exo.models import ENGINE_CLASSES
from specfast.exo.requests import CALLER, Request
from tiny_directories import byte_level

MESSAGES = [{"role": "user", "content": "def main"}]
PAIR = {"target_model": TARGET, "draft_model": DRAFT}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("exo")
    with pytest.MonkeyPatch.context() as patch, fake_exo(hook=False):
        home = is_home(root, patch)
        decoder, tokenizer = deep_decoder(3), byte_level(*SPECIAL, start=None)
        for model, weights in ((TARGET, decoder), (DRAFT, drafting(decoder, noise=0.05))):
            at = repository_of(model, ENGINE_CLASSES["mlx"])
            home.add(at, weights, tokenizer=tokenizer, max_context=4096)
    return root


@pytest.fixture
def home(checkpoints, monkeypatch):
    monkeypatch.setattr(additions, "POLL_SECONDS", 0.005)
    with fake_exo():
        yield is_home(checkpoints, monkeypatch)


@pytest.fixture
def reference(home):
    """The pair by specfast itself, on the prompt that the API makes of MESSAGES."""
    folders = [home.folder(repository_of(model, ENGINE_CLASSES["mlx"])) for model in (TARGET, DRAFT)]
    engine = Reference(*folders)

    def tokens(**request):
        from exo.inference.tokenizers import HostTokenizer

        text = HostTokenizer(folders[0]).apply_chat_template(MESSAGES, tokenize=False)
        return engine(text, **request)

    return tokens


class Served(Session):
    """A session with the chat API in front."""

    def __init__(self, config=PAIR, **options):
        from exo.api.chatgpt_api import ChatGPTAPI

        super().__init__(config, **options)
        self.api = ChatGPTAPI(self.node, CLASS_NAME, default_model=TARGET)

    async def post(self, *, transport=None, **body):
        request = chat({"messages": MESSAGES, "model": TARGET, **body}, transport=transport)
        return await self.api.handle_post_chat_completions(request)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.7, "seed": 3},
        {"temperature": 1.5, "seed": 3, "top_p": 0.5},
        {"temperature": 1.5, "seed": 3, "top_k": 3},
        {"temperature": 1.5, "seed": 3, "min_p": 0.3},
        {"temperature": 0, "max_tokens": 7},
    ],
)
def test_a_requests_options_count(home, reference, options):
    served = Served()
    answer = asyncio.run(served.post(**options))
    expected = reference(**options)
    assert (answer.status, answer.body["tokens"]) == (200, expected)
    assert len(expected) == options.get("max_tokens", 24)
    assert expected != reference(temperature=1.0, seed=3)


def test_max_completion_tokens_comes_first_and_null_is_nothing(home, reference):
    served = Served()
    body = {"temperature": 0.0, "max_tokens": 9, "max_completion_tokens": 5, "seed": None, "top_p": None}
    assert asyncio.run(served.post(**body)).body["tokens"] == reference(**GREEDY, max_tokens=5)
    body = {"temperature": None, "max_tokens": None}
    assert len(asyncio.run(served.post(**body)).body["tokens"]) == 24


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": value} for value in (-0.1, 0.05, 2.1, "hot", True, float("nan"), [1])),
        *({"seed": value} for value in (-1, 2**64, 1.5, "seven")),
        *({"top_p": value} for value in (0, 1.1, "x")),
        *({"top_k": value} for value in (-1, 2.5)),
        *({"min_p": value} for value in (-0.1, 1.1)),
    ],
)
def test_bad_values_are_answered_with_400(home, options):
    served = Served()
    answer = asyncio.run(served.post(**options))
    assert answer.status == 400
    assert next(iter(options)) in answer.body["detail"]
    assert served.fetched == set()


@pytest.mark.parametrize("value", [0, -3, "x", 2.5, [1], True])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_bad_number_of_tokens_is_answered_with_400(home, name, value):
    answer = asyncio.run(Served().post(**{name: value}))
    assert answer.status == 400
    assert f"{name} is {value!r}" in answer.body["detail"]


def test_a_body_that_is_not_json_is_answered_with_400(home):
    served = Served()
    error = json.JSONDecodeError("Expecting value", "x", 0)
    answer = asyncio.run(served.api.handle_post_chat_completions(chat(error)))
    assert answer.status == 400
    assert "JSON" in answer.body["detail"]


def test_requests_together_keep_their_options_apart(home, reference):
    served = Served()
    options = [{"temperature": 0.7, "seed": 1}, {"temperature": 0.0}, {"temperature": 1.5, "seed": 2, "max_tokens": 9}]

    async def use():
        return await asyncio.gather(*(served.post(**each) for each in options))

    assert [answer.body["tokens"] for answer in asyncio.run(use())] == [reference(**each) for each in options]


def test_the_caller_does_not_leak_into_what_follows(home, reference):
    served = Served({**PAIR, **GREEDY})

    async def use():
        assert CALLER.get() is None
        await served.post(temperature=1.5, seed=3, max_tokens=4)
        assert CALLER.get() is None
        assert (await served.post(temperature=9)).status == 400
        assert CALLER.get() is None
        return (await served.post()).body["tokens"]

    assert asyncio.run(use()) == reference(**GREEDY)


class Client:
    """A transport that closes once a number of tokens has come, or at once."""

    def __init__(self, served, tokens):
        self._served, self._tokens = served, tokens

    def is_closing(self):
        return sum(len(tokens) for _, tokens, _ in self._served.events) >= self._tokens


@pytest.mark.parametrize("tokens", [0, 20])
def test_a_client_that_goes_ends_its_request(home, reference, tokens, capfd):
    served = Served(max_tokens=4000)

    async def use():
        answer = await served.post(temperature=0, transport=Client(served, tokens))
        assert answer.status == 499
        await asyncio.sleep(0.05)
        while served.stats["under_way"]:
            await asyncio.sleep(0.005)
        await served.settled()

    asyncio.run(use())
    assert served.stats["tokens"] < 3000
    assert served.node.outstanding_requests == {}
    assert tokens == 0 or ", cancelled" in capfd.readouterr().err
    assert asyncio.run(Served().post(temperature=0)).body["tokens"] == reference(**GREEDY)


def test_a_connection_that_is_gone_already(home):
    async def use():
        served = Served()
        request = chat({"messages": MESSAGES})
        request.transport = None
        assert (await served.api.handle_post_chat_completions(request)).status == 499
        return served

    assert asyncio.run(use()).api.token_queues == {}


def test_tokens_that_come_after_the_client_went_leave_nothing_behind(home, monkeypatch):
    served, step, waiting = Served(), Request.step, threading.Event()

    def slow(request):
        tokens = step(request)
        if served.events:
            waiting.set()
            while not request.caller.gone:
                time.sleep(0.001)
        return tokens

    monkeypatch.setattr(Request, "step", slow)

    async def use():
        answer = await served.post(temperature=0, transport=SimpleNamespace(is_closing=waiting.is_set))
        assert answer.status == 499
        while served.node.outstanding_requests:
            await asyncio.sleep(0.001)
        await served.settled()

    asyncio.run(use())
    assert served.stats["under_way"] == 0
    assert not served.api.token_queues


def test_an_error_while_decoding_is_the_answer(home, monkeypatch, capfd):
    served = Served(GREEDY)
    step, steps = served.engine.step, []

    async def fail(request_id):
        steps.append(request_id)
        if len(steps) == 3:
            served.engine.end(request_id)
            raise ConnectionError("the model went away")
        return await step(request_id)

    monkeypatch.setattr(served.engine, "step", fail)
    answer = asyncio.run(served.post())
    assert (answer.status, answer.body) == (500, {"detail": "exo failed (ConnectionError: the model went away)"})
    assert "the model went away" in capfd.readouterr().err
    assert served.node.outstanding_requests == {}


def test_an_empty_context_is_an_error_of_the_request(home):
    answer = asyncio.run(Served().post(messages=[{"role": "user", "content": "x = 1\n" * 3000}]))
    assert answer.status == 400
    assert "4096" in answer.body["detail"]


@pytest.mark.parametrize("body", [[1, 2], None, {}, {"messages": []}, {"messages": "hi"}, {"messages": [1]}, {"messages": [{}], "model": 5}])  # fmt: skip
def test_a_body_that_is_no_chat_request_is_answered_with_400(body):
    with pytest.raises(ConfigurationError):
        additions._options_of(body)


def test_another_engines_requests_are_as_ever(home):
    from exo.inference.inference_engine import get_inference_engine

    served = Served(max_tokens=5)
    served.node.inference_engine = get_inference_engine("mlx", served.downloader)
    served.api.inference_engine_classname = ENGINE_CLASSES["mlx"]
    answer = asyncio.run(served.post(temperature=99, seed="x"))
    assert (answer.status, len(answer.body["tokens"])) == (200, 5)


def get_speculation(served):
    handler = served.api.app.router.get["/v1/speculation"]
    return asyncio.run(handler(SimpleNamespace()))


def test_the_counters_are_served(home):
    served = Served()
    before = get_speculation(served).body
    assert (before["engine"], before["tokens"], before["acceptance_rate"]) == (CLASS_NAME, 0, 0.0)
    asyncio.run(served.post(temperature=0))
    answer = get_speculation(served)
    json.dumps(answer.body)
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.body["tokens"] >= 24
    assert answer.body["requests"] == 1
    assert answer.body["models"][TARGET]["draft"] == DRAFT
    assert answer.body == {"engine": CLASS_NAME, **served.stats}
    assert "/healthcheck" in served.api.app.router.get


def test_another_engine_has_no_counters(home):
    from exo.inference.inference_engine import get_inference_engine

    served = Served()
    served.node.inference_engine = get_inference_engine("dummy", None)
    assert get_speculation(served).body == {
        "engine": "DummyInferenceEngine",
        "detail": "start exo with --inference-engine speculative",
    }


@pytest.mark.parametrize(
    "messages",
    [[{"role": "user"}], [{"content": "x"}], [{}], [{"role": "user", "content": "x"}, {"text": "y"}]],
    ids=str,
)
def test_messages_without_role_or_content_are_answered_with_400(home, messages):
    answer = asyncio.run(Served().post(messages=messages))
    assert answer.status == 400
    assert "it needs a role and a content" in answer.body["detail"]


def test_what_exo_stumbles_over_is_answered_with_the_reason(home, monkeypatch):
    served = Served(GREEDY)

    def fail(*_arguments, **_options):
        raise TypeError("a template without tools")

    monkeypatch.setattr(importlib.import_module("exo.api.chatgpt_api"), "get_repo", fail)
    answer = asyncio.run(served.post())
    assert (answer.status, answer.body["detail"]) == (500, "exo failed (TypeError: a template without tools)")

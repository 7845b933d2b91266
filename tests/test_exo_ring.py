"""Rings of nodes in one process: plain tokens in fewer laps, settings that travel, strangers, and nodes that leave."""

import asyncio
import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from exo_home import SPECIAL, deep_decoder, drafting
from exo_session import DRAFT, GREEDY, TARGET, chat, fake_exo, is_home, repository
from specfast import ConfigurationError, RingError, _core
from specfast.checkpoint import weight_bytes
from specfast.exo import acquaintances, contract, held, layers, ring, wire
from specfast.exo.models import ENGINE_CLASSES
from specfast.exo.requests import CALLER, Caller
from tiny_directories import byte_level

MLX = ENGINE_CLASSES["mlx"]
TEXT = "def main(path):"
MODELS = {"target_model": TARGET, "draft_model": DRAFT}
SAMPLED = {"temperature": 1.0, "seed": 11}
TOKENS = 32


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("exo")
    with pytest.MonkeyPatch.context() as patch, fake_exo(hook=False):
        home = is_home(root, patch)
        decoder, tokenizer = deep_decoder(6), byte_level(*SPECIAL, start=None)
        for model, weights in ((TARGET, decoder), (DRAFT, drafting(decoder, noise=0.3))):
            home.add(repository(model, MLX), weights, tokenizer=tokenizer, max_context=1024)
    return root


@pytest.fixture(autouse=True)
def home(checkpoints, monkeypatch):
    with fake_exo():
        importlib.import_module("exo.models").model_cards[TARGET]["layers"] = 6
        importlib.import_module("exo.networking.grpc.grpc_peer_handle")
        monkeypatch.setattr(acquaintances, "GREETING_SECONDS", 0.2)
        yield is_home(checkpoints, monkeypatch)


class Nodes:
    """Nodes that see each other; the last name has the first layers. An option set of None is exo's own mlx engine."""

    def __init__(self, /, **options):
        inference = importlib.import_module("exo.inference.inference_engine")
        handle = importlib.import_module("exo.networking.grpc.grpc_peer_handle").GRPCPeerHandle
        make = importlib.import_module("exo.orchestration.node").Node
        self.nodes, self.peers, self.events = {}, [], {}
        for name, config in options.items():
            downloader = importlib.import_module("exo.download.new_shard_download").new_shard_downloader()
            engine = "mlx" if config is None else "speculative"
            made = inference.get_inference_engine(engine, downloader, *([config] if config is not None else []))
            self.nodes[name] = make(name, None, made, None, downloader, max_generate_tokens=TOKENS)
            self.events[name] = []
            self.nodes[name].on_token.register("test").on_next(
                lambda request, tokens, finished, name=name: self.events[name].append((request, tokens, finished))
            )
        for name, node in self.nodes.items():
            node.topology = set(self.nodes)
            node.peers = [handle(other, to, "", None) for other, to in self.nodes.items() if other != name]
            self.peers += node.peers

    def __getitem__(self, name):
        return self.nodes[name]

    @property
    def first(self):
        return self.nodes[max(self.nodes)]

    @staticmethod
    def shard():
        return importlib.import_module("exo.models").build_base_shard(TARGET, contract.CLASS_NAME)

    async def ask(self, name, text=TEXT, request_id="one", **options):
        """The tokens of an answer, as they are told at the node that was asked."""
        caller = Caller(options)
        CALLER.set(caller)
        await self.nodes[name].process_prompt(self.shard(), text, request_id=request_id)
        for _ in range(3000):
            told = [event for event in self.events[name] if event[0] == request_id]
            if told and told[-1][2]:
                break
            await asyncio.sleep(0.005)
        else:
            raise AssertionError("no end")
        await asyncio.sleep(0.02)
        if caller.error:
            raise caller.error
        return [token for _, tokens, _ in told for token in tokens]

    def stats(self, name=None):
        return self.nodes[name or max(self.nodes)].inference_engine.get_speculation_stats()

    def leave(self, name):
        """A node is gone, as if killed: whoever calls it fails."""
        for peer in self.peers:
            if peer.id() == name:
                peer.address = None

    def notice(self, name):
        """The others see that a node is gone, as exo does after some seconds."""
        left = {other: node for other, node in self.nodes.items() if other != name}
        for node in left.values():
            node.topology = set(left)
            node.peers = [peer for peer in node.peers if peer.id() != name]
        return asyncio.gather(*(node.select_best_inference_engine() for node in left.values()))


def alone(**options):
    """The tokens of a single node without drafts."""
    nodes = Nodes(one={"target_model": TARGET, "disabled": True, "rule": "coupled"})
    return asyncio.run(nodes.ask("one", **options))


def every(names, **config):
    return {name: {**MODELS, "gamma": 4, **config} for name in names}


@pytest.mark.parametrize("names", ["ab", "abc", "abcdef"])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_the_single_nodes_in_fewer_laps(names, options):
    expected = alone(**options)
    nodes = Nodes(**every(names))

    async def use():
        return [await nodes.ask(names[at], request_id=f"request {at}", **options) for at in (-1, 0, 1)]

    assert asyncio.run(use()) == [expected] * 3
    assert len(expected) == TOKENS
    stats = nodes.stats()
    assert stats["tokens"] >= 3 * TOKENS
    assert stats["tokens"] > 1.2 * stats["target_passes"]
    assert 0 < stats["acceptance_rate"] < 1
    for name in names[:-1]:  # each holds its own layers, and nothing of requests that have ended
        held_there = nodes[name].inference_engine.ring.held
        assert [len(each.layers) for each in held_there._layers.values()] == [6 // len(names)]
        assert len(held_there) == 0
        assert nodes[name].outstanding_requests == {}


def in_mlx(monkeypatch, *loads):
    """Has MLX run the layers in loads with True, one after another; the others run natively. More loads are an error."""
    pytest.importorskip("mlx_lm")
    gpu = iter(loads)
    monkeypatch.setattr(layers, "on_apple_gpu", lambda: next(gpu))


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "loads", [(True,) * 3, (True, False, False), (False, True, False), (False, False, True)], ids=str
)
def test_layers_in_mlx_are_like_native_ones(monkeypatch, capfd, loads, options):
    expected = alone(**options)
    in_mlx(monkeypatch, *loads)
    nodes = Nodes(**every("abc", target_engine="mlx"))
    assert asyncio.run(nodes.ask("c", **options)) == expected
    stats = nodes.stats()
    assert stats["tokens"] > 1.2 * stats["target_passes"]
    assert (stats["models"][TARGET]["engine"], stats["models"][TARGET]["draft_engine"]) == (
        "mlx" if loads[0] else "native", "native",
    )  # fmt: skip
    kinds = [type(each) for name in "ba" for each in nodes[name].inference_engine.ring.held._layers.values()]
    assert kinds == [layers.MlxLayers if in_ring else layers.NativeLayers for in_ring in loads[1:]]
    assert ("on the mlx host" in capfd.readouterr().err) == loads[0]


def test_layers_in_mlx_whose_masks_are_for_first_rows_run_them_one_by_one(monkeypatch):
    """As exo's DeepSeek has them."""
    expected = alone(**GREEDY)
    in_mlx(monkeypatch, True, True)
    base, several = importlib.import_module("mlx_lm.models.base"), []
    first_rows = lambda h, cache=None: base.create_causal_mask(h.shape[1]) if h.shape[1] > 1 else None  # noqa: E731
    monkeypatch.setattr(base, "create_attention_mask", first_rows)
    run = layers.MlxLayers._run
    monkeypatch.setattr(
        layers.MlxLayers, "_run", lambda self, *args: (several.append(self._at_once), run(self, *args))[1]
    )
    monkeypatch.setattr(ring, "CHUNK", 5)
    nodes = Nodes(**every("ab", target_engine="mlx"))
    assert asyncio.run(nodes.ask("b", **GREEDY)) == expected
    assert not several[-1]


def test_layers_in_mlx_that_exo_cannot_load(monkeypatch, capfd):
    in_mlx(monkeypatch, True)
    module = importlib.import_module("exo.inference.mlx.sharded_utils")
    monkeypatch.setattr(module, "load_model_shard", lambda path, shard: None)
    nodes = Nodes(**every("ab", target_engine="mlx"))
    asyncio.run(nodes.ask("b", **GREEDY))
    assert "decoded plainly by exo's mlx engine" in (printed := capfd.readouterr().err)
    assert "loads its MLX layers otherwise than known" in printed


@pytest.mark.parametrize("chunk", [2, 7])
def test_long_prompts_go_around_in_chunks(monkeypatch, chunk):
    expected = alone(text=TEXT * 4, **GREEDY)
    monkeypatch.setattr(ring, "CHUNK", chunk)
    nodes = Nodes(**every("abc"))
    assert asyncio.run(nodes.ask("c", TEXT * 4, **GREEDY)) == expected


@pytest.mark.parametrize(
    "config", [{"disabled": True}, {"gamma": "auto"}, {"draft_model": None, "drafter": "suffix"}], ids=str
)
def test_other_ways_to_draft(config):
    nodes = Nodes(**every("ab", **config))
    assert asyncio.run(nodes.ask("b", **SAMPLED)) == alone(**SAMPLED)
    assert ("disabled" in config) == (nodes.stats()["drafted"] == 0)


def test_requests_side_by_side():
    texts = [TEXT, "x = 1", "  a  b", "return"]
    expected = [alone(text=text, **GREEDY) for text in texts]
    nodes = Nodes(**every("abc"))

    async def use():
        return await asyncio.gather(*(nodes.ask("abc"[i % 3], text, f"r{i}", **GREEDY) for i, text in enumerate(texts)))

    assert asyncio.run(use()) == expected


def test_what_is_typed_at_one_node_counts_for_all(capfd):
    nodes = Nodes(b=MODELS, a={**MODELS, "gamma": 6, "lenience": 1.5})
    asyncio.run(nodes.ask("b", **GREEDY))
    stats = nodes.stats()
    assert stats["drafted"] >= 5 * (stats["target_passes"] - 2)
    assert "coupled rule" in capfd.readouterr().err


@pytest.mark.parametrize("asked", ["a", "b"])
def test_two_different_values_are_an_error_that_names_both_nodes(asked):
    nodes = Nodes(b={**MODELS, "gamma": 3}, a={**MODELS, "gamma": 6})
    with pytest.raises(ConfigurationError, match="gamma is 3 at node b and 6 at node a"):
        asyncio.run(nodes.ask(asked, **GREEDY))


def test_the_request_options_travel_to_the_first_node():
    nodes = Nodes(**every("ab"))
    assert asyncio.run(nodes.ask("a", max_tokens=5, **SAMPLED)) == alone(**SAMPLED)[:5]


def test_a_node_without_specfast_means_plain_decoding_and_one_warning(capfd):
    nodes = Nodes(b={**MODELS, **GREEDY}, a=None)
    tokens = asyncio.run(nodes.ask("b", request_id="one")), asyncio.run(nodes.ask("b", request_id="two"))
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == TOKENS
    printed = capfd.readouterr().err
    assert printed.count("node a of the ring does not run this specfast") == 1
    assert nodes.stats()["host_requests"] == 2


def test_a_protocol_of_another_version_is_a_stranger(monkeypatch, capfd):
    nodes = Nodes(b={**MODELS, **GREEDY}, a={**MODELS, **GREEDY})
    nodes["b"].inference_engine.ring.known._met["a"] = wire.Greeting("a", {}, {}, protocol=99)
    monkeypatch.setattr(nodes["a"].inference_engine.ring.known, "greet", lambda **_: asyncio.sleep(0))
    asyncio.run(nodes.ask("b"))
    assert "node a of the ring" in capfd.readouterr().err


@pytest.mark.parametrize(("gone", "after"), [("a", 0), ("b", 0), ("c", 0), ("a", 3), ("b", 3)])
def test_a_node_that_leaves_ends_the_request_with_an_error_and_the_next_works(gone, after):
    """It leaves when it has just computed its first lap, or its fourth; the first node when it has read the prompt."""
    expected = alone(**GREEDY)
    asked = "a" if gone != "a" else "b"
    nodes = Nodes(**every("abc"))

    async def use():
        assert await nodes.ask(asked, request_id="before", **GREEDY) == expected
        calls = []
        for peer in nodes.peers:
            if peer.id() == gone:
                peer.before_answer = lambda: nodes.leave(gone) if len(calls) == after else calls.append(0)
        with pytest.raises(RingError, match=f"node {gone}|first node"):
            await nodes.ask(asked, request_id="during", **GREEDY)
        await nodes.notice(gone)
        assert all(
            len(nodes[name].inference_engine.ring.held._layers) == len(nodes[name].inference_engine.ring.held) == 0
            for name in nodes.nodes
            if name != gone
        )
        assert nodes[asked].outstanding_requests == {}
        assert await nodes.ask(asked, request_id="after", **GREEDY) == expected

    asyncio.run(use())


def test_a_lap_that_was_lost_and_a_node_that_was_started_anew_are_errors():
    nodes = Nodes(**every("abc"))

    async def use():
        await nodes.ask("c", **GREEDY)
        engine = nodes["b"].inference_engine
        engine.ring.held._passing["key"] = held.Passing(*_layers(nodes))
        stops = tuple(wire.Stop(name, 2 * i, 2 * i + 1) for i, name in enumerate("cba"))
        law = wire.law_fields(_core.Law(temperature=0.0))
        lap = wire.Lap("key", TARGET, 6, stops, 9, (), law, 0, "token", "f32", None, 64)
        rows = np.zeros((1, 3, 32), np.float32)
        for key, message in (("key", "a lap was lost"), ("other", "started anew")):
            answer = await engine.ring.take(rows, wire.Lap(**{**vars(lap), "key": key}))
            with pytest.raises(RingError, match=f"node b: .*{message}"):
                wire.read_verdict(answer)
        answer = await engine.ring.take(rows, wire.Lap(**{**vars(lap), "at": 2}))
        with pytest.raises(RingError, match="for node a came to node b"):
            wire.read_verdict(answer)

    def _layers(nodes):
        (there,) = nodes["b"].inference_engine.ring.held._layers.values()
        return there, there.new_cache(1024)

    asyncio.run(use())


@pytest.mark.parametrize("node", ["a", "b"])
def test_memory_is_checked_before_anything_is_loaded(monkeypatch, node):
    module = "held" if node == "a" else "serving"
    nodes = Nodes(**every("ab"))
    monkeypatch.setattr(held, "free_bytes", lambda: 1000.0)
    if module == "serving":
        with pytest.raises(RingError, match=r"layers 0 to 2 of llama-3.1-8b.*draft llama-3.2-3b.*add a node"):
            asyncio.run(nodes.ask("b", **GREEDY))
        return
    monkeypatch.setattr("specfast.exo.serving.require_memory", lambda needed: None)
    with pytest.raises(RingError, match=r"node a: layers 3 to 5 of llama-3.1-8b.*add a node"):
        asyncio.run(nodes.ask("b", **GREEDY))


def test_memory_for_a_draft_is_what_its_weights_take(monkeypatch, home):
    nodes = Nodes(**every("ab"))
    needed = []
    monkeypatch.setattr("specfast.exo.serving.require_memory", lambda parts: needed.append(dict(parts)))
    asyncio.run(nodes.ask("b", **GREEDY))
    folder = home.folder(repository(DRAFT, MLX))
    assert needed[1] == {f"the draft {folder.name}": weight_bytes(folder)}


def test_a_client_that_leaves_at_another_node_ends_the_request():
    nodes = Nodes(**every("ab"))

    async def use():
        caller = Caller(GREEDY)
        CALLER.set(caller)
        nodes["a"].on_token.register("leave").on_next(lambda *_: setattr(caller, "gone", True))
        for node in nodes.nodes.values():
            node.max_generate_tokens = 900
        await nodes["a"].process_prompt(nodes.shard(), TEXT, request_id="one")
        for _ in range(1000):
            await asyncio.sleep(0.01)
            if nodes.events["b"] and not len(nodes["b"].inference_engine._requests):
                break
        assert nodes.stats()["under_way"] == 0
        told = sum(len(tokens) for _, tokens, _ in nodes.events["b"])
        assert 0 < told < 900

    asyncio.run(use())


@pytest.mark.parametrize("laps", [0, 3])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_api_answers_with_the_error(streamed, laps):
    """A stream that has not begun is answered as well; one that has is broken off."""
    nodes = Nodes(**every("ab"))
    module = importlib.import_module("exo.api.chatgpt_api")
    aborted, made = [], []

    async def use():
        api = module.ChatGPTAPI(nodes["b"], contract.CLASS_NAME, default_model=TARGET)
        nodes.peers[1].before_answer = lambda: nodes.leave("a") if len(made) == laps else made.append(0)
        transport = SimpleNamespace(is_closing=lambda: False, abort=lambda: aborted.append(True))
        body = {"messages": [{"role": "user", "content": TEXT}], "temperature": 0, "stream": streamed}
        return await api.handle_post_chat_completions(chat(body, transport=transport))

    answer = asyncio.run(use())
    assert answer.status == 500
    assert "node a left the ring" in answer.body["detail"]
    assert bool(aborted) == (streamed and laps > 0)


def test_clients_that_leave_while_their_prompts_are_read_leave_nothing_behind(monkeypatch):
    nodes = Nodes(**every("ab"))
    monkeypatch.setattr(ring, "CHUNK", 1)

    async def use():
        engine = nodes["b"].inference_engine
        for i in range(10):  # more than are let in at once
            caller = Caller(GREEDY)
            CALLER.set(caller)
            await nodes["a"].process_prompt(nodes.shard(), TEXT * 6, request_id=str(i))
            while not engine.owns(str(i)):
                await asyncio.sleep(0.001)
            caller.gone = True
            for _ in range(500):
                await asyncio.sleep(0.01)
                if not engine.owns(str(i)):
                    break
        assert nodes.stats()["under_way"] == 0
        return await asyncio.wait_for(nodes.ask("a", **GREEDY), 20)

    assert asyncio.run(use()) == alone(**GREEDY)


def test_a_connection_that_exo_closes_under_a_lap_ends_the_request():
    """gRPC cancels calls on a channel that is closed, as exo does where a node hangs."""
    nodes = Nodes(**every("ab"))

    def close():
        raise asyncio.CancelledError

    async def use():
        nodes.peers[1].before_answer = close
        with pytest.raises(RingError, match=r"node a left the ring.*exo closed the connection"):
            await nodes.ask("b", request_id="one", **GREEDY)
        assert nodes.stats()["under_way"] == 0
        nodes.peers[1].before_answer = lambda: None
        return await nodes.ask("b", request_id="two", **GREEDY)

    assert asyncio.run(use()) == alone(**GREEDY)


def test_a_node_that_fell_silent_has_to_greet_before_laps_go_there(monkeypatch):
    nodes = Nodes(**every("ab"))

    async def use():
        assert len(await nodes.ask("b", request_id="one", **GREEDY)) == TOKENS
        there, nodes.peers[1].address = nodes.peers[1].address, None
        for _ in range(2):
            with pytest.raises(RingError, match=r"node a (left the ring|does not answer; send the request again)"):
                await nodes.ask("b", request_id="two", **GREEDY)
        assert not nodes["b"].inference_engine.ring.known.knows("a")
        nodes.peers[1].address = there
        return await nodes.ask("b", request_id="three", **GREEDY)

    assert asyncio.run(use()) == alone(**GREEDY)


def test_a_node_started_anew_without_specfast_is_a_stranger_from_the_next_request_on(monkeypatch, capfd):
    nodes = Nodes(a={**MODELS, **GREEDY}, b={**MODELS, **GREEDY})

    async def use():
        await nodes.ask("b", request_id="one")
        stock = Nodes(a=None, b={**MODELS, **GREEDY})["a"]
        nodes.peers[1].address = stock
        stock.process_tensor = lambda *_, **__: asyncio.sleep(0)  # exo prints what went wrong, and answers nothing
        with pytest.raises(RingError, match="node a answers otherwise than specfast"):
            await nodes.ask("b", request_id="two")
        del stock.process_tensor
        stock.peers[0].address = nodes["b"]
        return await nodes.ask("b", request_id="three")

    assert len(asyncio.run(use())) == TOKENS
    assert "node a of the ring does not run this specfast" in capfd.readouterr().err


def test_models_can_be_changed_at_any_node():
    nodes = Nodes(**every("ab", draft_model="none"))

    async def use():
        await nodes.ask("b", request_id="one", **GREEDY)
        assert nodes.stats()["draft_model"] in (None, "none")
        nodes["a"].inference_engine.set_models(TARGET, DRAFT)
        await asyncio.sleep(0.05)
        await nodes.ask("b", request_id="two", **GREEDY)
        assert nodes.stats()["draft_model"] == DRAFT
        nodes["b"].inference_engine.set_models(TARGET, None)
        await nodes.ask("a", request_id="three", **GREEDY)
        assert nodes.stats()["draft_model"] is None

    asyncio.run(use())


def test_what_exo_asks_of_other_nodes_ahead_of_a_request_is_fetched_and_not_loaded(capfd):
    nodes = Nodes(**every("ab", lenience=1.5))

    async def use():
        await nodes.ask("b", request_id="one", **GREEDY)
        node = nodes["a"]
        await node.inference_engine.ensure_shard(node.get_current_shard(nodes.shard()))
        return node.inference_engine._models.host, node.shard_downloader.calls

    host, fetched = asyncio.run(use())
    assert host is None
    assert (TARGET, contract.CLASS_NAME) in fetched
    assert "does not speculate" not in capfd.readouterr().err
    assert nodes.stats()["lossless"] is True


def test_options_of_two_nodes_that_contradict_each_other_are_an_error_that_names_both():
    nodes = Nodes(b=MODELS, a={"target_model": TARGET, "early_exit": 2})
    with pytest.raises(
        ConfigurationError, match=r"two ways to draft.*node b was given draft_model.*node a was given early_exit"
    ):
        asyncio.run(nodes.ask("b", **GREEDY))


def test_what_travels_is_json_and_comes_back_the_same():
    law = wire.law_fields(_core.Law(temperature=0.7, top_k=5, top_p=0.9, vocab_limit=7))
    lap = wire.Lap(
        "k", "m", 4, (wire.Stop("b", 0, 1), wire.Stop("a", 2, 3)), 3, (1, 2), law, 2**63, "coupled", "int8", "mlx", 99
    )
    state = json.loads(json.dumps(lap.as_state()))
    assert wire.Lap.from_state(state) == lap
    assert wire.law_fields(_core.Law(*wire.Lap.from_state(state).law)) == law
    assert wire.Lap.from_state(None) is wire.Lap.from_state({"other": 1}) is None
    greeting = wire.Greeting("a", {"gamma": 3}, {})
    assert wire.read_status(greeting.as_status()) == greeting
    assert wire.read_status(wire.Ending("k").as_status()) == wire.Ending("k")
    for status in (
        "",
        "[]",
        "{",
        '{"type": "node_status"}',
        '{"type": "specfast"}',
        '{"type": "specfast", "greeting": 1}',
    ):
        assert wire.read_status(status) is None
    assert not any(wire.is_answer(answer) for answer in (None, np.zeros(3, np.uint8), np.ones(2)))
    for silent in (True, False):
        answer = wire.write_error(wire.NodeError("c", "it left", silent=silent), "b")
        assert wire.is_answer(answer)
        with pytest.raises(wire.NodeError, match="node b: it left") as caught:
            wire.read_verdict(answer)
        assert (caught.value.node, caught.value.silent) == ("c", silent)
    assert wire.read_verdict(wire.write_verdict(None)) is None


def test_without_a_ring_state_never_reaches_exos_own_engines(monkeypatch):
    """A prompt that came with options to a node whose ring has a stranger: exo's own engine is given none."""
    nodes = Nodes(c={**MODELS, **GREEDY}, b={**MODELS, **GREEDY}, a=None)
    states = []

    async def use():
        await nodes.ask("b", request_id="one")
        host = nodes["c"].inference_engine._models.host
        original = host.infer_tensor

        async def infer_tensor(request_id, shard, data, state=None):
            states.append(state)
            return await original(request_id, shard, data, state)

        monkeypatch.setattr(host, "infer_tensor", infer_tensor)
        await nodes.ask("b", request_id="two")

    asyncio.run(use())
    assert states
    assert not any(states)

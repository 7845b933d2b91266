"""The stand-in for exo in this process: freshly imported, with specfast's additions, and gone again afterwards."""

import argparse
import asyncio
import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import _specfast_exo_hook
import specfast
from exo_home import ExoHome
from specfast.exo import contract, options
from specfast.exo.engine import SpeculativeEngine
from specfast.exo.requests import CALLER, Caller
from specfast.exo.ring import Ring
from specfast.tokenizer import Tokenizer

FAKES = Path(__file__).parent / "exo_fakes"
GREEDY = {"temperature": 0.0}
TARGET, DRAFT, SMALL = "llama-3.1-8b", "llama-3.2-3b", "llama-3.2-1b"
OTHER, OTHER_DRAFT = "qwen-2.5-7b", "qwen-2.5-1.5b"


def repository(model, engine=contract.CLASS_NAME):
    from exo.models import get_repo

    return get_repo(model, engine)


def _forget():
    for name in [name for name in sys.modules if name == "exo" or name.startswith("exo.")]:
        del sys.modules[name]


@contextmanager
def fake_exo(*, hook=True):
    """Within it `import exo` gives the stand-in, extended unless told otherwise."""
    finders, parse_args = list(sys.meta_path), argparse.ArgumentParser.parse_args
    _forget()
    sys.path.insert(0, str(FAKES))
    sys.meta_path[:] = [finder for finder in finders if finder is not _specfast_exo_hook.ExoFinder]
    if hook:
        _specfast_exo_hook.install()
    try:
        yield
    finally:
        sys.meta_path[:] = finders
        sys.path.remove(str(FAKES))
        _forget()
        argparse.ArgumentParser.parse_args = parse_args
        SpeculativeEngine.emits_many = Ring.can_send = False
        options._command_line = options.CommandLine()


def is_home(root, monkeypatch):
    """Makes a folder the one where exo keeps its downloads."""
    home = ExoHome(root / "home", root / "tmp")
    home.home.mkdir(parents=True, exist_ok=True)
    for name, value in home.environment().items():
        monkeypatch.setenv(name, value)
    return home


class Session:
    """An engine on a node, both as a command line with these options makes them; without options, as one made them before.

    Attributes:
        events: (request id, tokens, finished) in the order told.
    """

    def __init__(self, config=None, *, max_tokens=24):
        get = importlib.import_module("exo.inference.inference_engine").get_inference_engine
        node = importlib.import_module("exo.orchestration.node")
        self.downloader = importlib.import_module("exo.download.new_shard_download").new_shard_downloader()
        if config is not None:
            options._command_line = options.CommandLine(config, max_tokens=max_tokens)
        self.engine = get("speculative", self.downloader)
        self.node = node.Node("one", None, self.engine, None, self.downloader, max_generate_tokens=max_tokens)
        self.events, self._ended = [], {}
        self.node.on_token.register("session").on_next(self._take)

    def _take(self, request_id, tokens, finished):
        self.events.append((request_id, tokens, finished))
        if finished and request_id in self._ended:
            self._ended[request_id].set()

    async def ask(self, text, model=TARGET, request_id="one", **request):
        """The tokens of an answer."""
        self._ended[request_id] = asyncio.Event()
        CALLER.set(Caller(request))
        await self.node.process_prompt(self.shard(model), text, request_id=request_id)
        await asyncio.wait_for(self._ended[request_id].wait(), 30)
        await self.settled()
        return self.tokens(request_id)

    async def ask_all(self, texts, **request):
        """The tokens of answers under way together."""
        named = enumerate(texts)
        return await asyncio.gather(*(self.ask(text, request_id=f"request {i}", **request) for i, text in named))

    async def settled(self):
        """Lets what is left to do for a request be done."""
        for _ in range(10):
            await asyncio.sleep(0)

    def tokens(self, request_id="one"):
        return [token for who, tokens, _ in self.events if who == request_id for token in tokens]

    @staticmethod
    def shard(model):
        return importlib.import_module("exo.models").build_base_shard(model, contract.CLASS_NAME)

    @property
    def stats(self):
        return self.engine.get_speculation_stats()

    @property
    def fetched(self):
        """Models asked of the downloader."""
        return {model for model, _ in self.downloader.calls}


class Reference:
    """The same checkpoints by specfast itself."""

    def __init__(self, directory, draft=None, **options):
        self.engine = specfast.load(directory, draft, notify=lambda message: None, **options)
        self.tokenizer = Tokenizer(Path(directory))

    def __call__(self, text, **request):
        """Token ids of an answer to a text that is taken as it is."""
        return self.engine.generate(self.tokenizer.encode(text), **{"max_tokens": 24, **request}).token_ids


def chat(body, *, transport=None):
    """A chat request as the API gets it."""

    async def json():
        if isinstance(body, Exception):
            raise body
        return body

    return SimpleNamespace(json=json, transport=transport or SimpleNamespace(is_closing=lambda: False))

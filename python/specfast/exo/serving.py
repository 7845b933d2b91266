"""The models exo asked for: run natively with the draft that goes with each, or by exo's own engine where that cannot be."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import LoadedModel, load_model, weight_bytes
from ..compatibility import Status
from ..config import NO_DRAFT, ResolvedConfig, SpeculativeConfig, resolve_config
from ..engine import Engine
from ..errors import UnsupportedModelError
from ..families import parameters
from ..models import choose_draft
from ..stats import SpeculationStats
from ..targets import MakeTarget
from .contract import CLASS_NAME
from .held import layers_of, require_memory
from .hosts import MODULES, Host, host_of, typed_engine
from .layers import LayersHost
from .mlx_engine import MlxEngine
from .models import ENGINE_CLASSES, ExoModels
from .options import without_engines
from .requests import Request, why_plain

LOW_ACCEPTANCE, ENOUGH_DRAFTS = 0.3, 64


def say(message: str) -> None:
    """A line for people, apart from what exo prints; a documented warning stays as it is."""
    prefix = "" if message.startswith("Warning:") else "specfast: "
    print(prefix + message, file=sys.stderr, flush=True)


@dataclass
class ServedModel:
    """A model exo asked for: run natively, or by exo's own engine where that cannot be.

    Attributes:
        shard: what exo calls it.
        tokenizer: exo's own, so that prompts have the tokens they have with other engines.
        engine: the native engine; None where exo's runs it.
        host: exo's own engine; None where the native one runs it.
        fallback: why exo's own does.
        compatibility: of its draft.
        hinted: whether the hint at low acceptance was given.
        resolved: the configuration it was loaded for.
        ring: whether it was loaded for a ring that speculates.
        target, draft: where they run, on a host of specfast's.
    """

    shard: Any
    tokenizer: Any
    engine: Engine | None = None
    host: Any = None
    fallback: str | None = None
    compatibility: Status = "unknown"
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    hinted: bool = False
    resolved: ResolvedConfig | None = None
    ring: bool = False
    target: str = "native"
    draft: str = "native"

    def serves(self, shard: Any, resolved: ResolvedConfig, *, ring: bool) -> bool:
        """Whether it is what a shard needs: whole models go on when options change, parts follow their ring's."""
        if is_whole(shard):
            return bool(self.shard == shard)
        return bool(self.shard == shard) and ring == self.ring and (not ring or self.resolved == resolved)

    @property
    def why_plain(self) -> str | None:
        """Why it is decoded plainly, if it is."""
        return self.fallback or (why_plain(self.engine) if self.engine else None)

    def describe(self) -> dict[str, Any]:
        """Its draft, whether that fits, and the counters."""
        pair = self.engine.pair if self.engine else None
        return {
            "engine": self.target if pair else "exo",
            "draft": pair.draft_name if pair else None,
            "draft_engine": self.draft if pair and pair.draft else None,
            "compatibility": self.compatibility,
            "fallback": self.why_plain,
            **self.stats.as_dict(),
        }


class ServedModels:
    """Loads models when they are asked for, and keeps one besides those in use.

    Args:
        downloader: exo's ShardDownloader.
        host_engine: builds exo's own engine by name.
        compute: runs a function in the thread that computes.

    Attributes:
        host: exo's own engine, once it was needed.
    """

    def __init__(
        self, downloader: Any, host_engine: Callable[[str], Any], compute: Callable[..., Awaitable[Any]]
    ) -> None:
        self._downloader, self._host_engine, self._compute = downloader, host_engine, compute
        self.host: Any = None
        self._served: dict[str, ServedModel] = {}  # the one used last is the last
        self._paths: dict[str, Path] = {}
        self._past = SpeculationStats()
        self._said: set[str] = set()
        self._loading = asyncio.Lock()

    def get(self, model: str | None) -> ServedModel | None:
        """A model that is loaded."""
        return self._served.get(model) if model else None

    async def serve(
        self, shard: Any, resolved: ResolvedConfig, in_use: Collection[str], make_target: MakeTarget | None = None
    ) -> ServedModel:
        """The model of a shard, loaded now if it is not yet; others that nobody uses make room.

        Args:
            shard: exo's.
            resolved: the configuration.
            in_use: models with requests under way.
            make_target: of requests on a ring whose first layers these are; a part of a model without one is exo's own
                engine's.

        Raises:
            SpecfastError: it cannot be had.
        """
        async with self._loading:
            served = self._served.get(shard.model_id)
            if served is None or not served.serves(shard, resolved, ring=make_target is not None):
                served = await self._load(shard, resolved, make_target)
                served.resolved, served.ring = resolved, make_target is not None
                self._drop(shard.model_id)
                for name in [name for name in self._served if name not in in_use][:-1]:
                    self._drop(name)
            self._served.pop(shard.model_id, None)
            self._served[shard.model_id] = served
            return served

    def clear(self) -> None:
        """Lets all go; requests under way keep theirs."""
        for name in list(self._served):
            self._drop(name)

    def _drop(self, name: str) -> None:
        if served := self._served.pop(name, None):
            self._past.add(served.stats)

    async def _load(self, shard: Any, resolved: ResolvedConfig, make_target: MakeTarget | None) -> ServedModel:
        engine = resolved.config.target_engine
        if not is_whole(shard) and make_target is None:
            part = f"layers {shard.start_layer} to {shard.end_layer} of {shard.n_layers} are this node's"
            return await self._load_host(shard, engine, f"{part}, in a ring that does not speculate")
        path = Path(await self._downloader.ensure_shard(shard, CLASS_NAME))
        self._paths[shard.model_id] = path
        config = _config_of(shard.model_id, resolved)
        locate = ExoModels(self._downloader, _draft_engine(resolved), asyncio.get_running_loop(), self._paths)
        native, target, draft_host = self._engine(config, resolved, locate, shard, make_target)
        try:
            if make_target is not None:
                await self._compute(_require_memory, config.config, path, layers_of(shard), shard.n_layers)
            pair = await self._compute(lambda: native.pair)
        except UnsupportedModelError as error:
            choice = await self._compute(choose_draft, config.config, path, self.say_once, locate.metadata)
            return await self._load_host(shard, engine, str(error), choice.status)
        copying = "no draft, plain decoding" if native.drafter == "none" else f"no draft, {native.drafter} drafter"
        draft = f"draft {pair.draft_name} ({pair.compatibility})" if pair.draft_name else copying
        exact = config.config.lossless or native.drafter == "none"
        lossless = "lossless" if exact else "not lossless: lenience above 1"
        where = "" if is_whole(shard) else f" in a ring, layers {shard.start_layer} to {shard.end_layer} here"
        where += f" on the {target.name} host" if target.name != "native" else ""
        if pair.draft and draft_host.name != target.name:
            draft += " on the " + ("native decoder" if draft_host.name == "native" else f"{draft_host.name} host")
        say(f"{shard.model_id}{where}: {draft}, {native.precision} activations, {lossless}")
        tokenizer = await importlib.import_module("exo.inference.tokenizers").resolve_tokenizer(path)
        return ServedModel(
            shard, tokenizer, native, compatibility=pair.compatibility, target=target.name, draft=draft_host.name
        )

    def _engine(
        self,
        config: ResolvedConfig,
        resolved: ResolvedConfig,
        locate: ExoModels,
        shard: Any,
        make_target: MakeTarget | None,
    ) -> tuple[Engine, Host | LayersHost, Host]:
        """The engine of a model, and where its target and its draft are to run: in rings drafts run natively."""
        if make_target is not None:
            if typed_engine(resolved, "target") == "tinygrad" or typed_engine(resolved, "draft") in MODULES:
                self.say_once(
                    "in a ring layers run natively or in MLX, and drafts natively: other engines have no effect there"
                )
            layers = LayersHost(shard.model_id, shard.n_layers, typed_engine(resolved, "target"))
            engine = Engine(
                config, notify=self.say_once, resolve=locate, layers=layers_of(shard), make_target=make_target,
                load_target=layers.load, load_draft=_load_draft,
            )  # fmt: skip
            return engine, layers, Host("native", self.say_once)
        target, draft = (Host(host_of(resolved, role), self.say_once) for role in ("target", "draft"))
        if target.name == "mlx":
            return MlxEngine(config, draft, notify=self.say_once, resolve=locate), target, draft
        engine = Engine(config, notify=self.say_once, resolve=locate, load_target=target.load, load_draft=draft.load)
        return engine, target, draft

    async def _load_host(
        self, shard: Any, engine: str | None, reason: str, compatibility: Status = "unknown"
    ) -> ServedModel:
        name = engine if engine in ENGINE_CLASSES else "mlx"
        self.say_once(
            f"{shard.model_id} is decoded plainly by exo's {name} engine, which takes of a request's options its temperature "
            f"only, and on one machine: {reason}"
        )
        try:
            self.host = self.host or self._host_engine(name)
            await self.host.ensure_shard(shard)
        except ImportError as error:
            raise UnsupportedModelError(f"{reason}; and exo's {name} engine is not there either ({error})") from error
        return ServedModel(shard, self.host.tokenizer, host=self.host, fallback=reason, compatibility=compatibility)

    def count(self, request: Request) -> None:
        """Logs a request that ended, and adds its counters to its model's."""
        say(request.summary())
        served = self._served.get(request.model)
        if served is None or served.engine is not request.engine:
            self._past.add(request.stats)
            return
        served.stats.add(request.stats)
        stats = served.stats
        if stats.drafted >= ENOUGH_DRAFTS and stats.acceptance_rate < LOW_ACCEPTANCE and not served.hinted:
            served.hinted = True
            say(
                f"low acceptance rate with {request.model} ({stats.acceptance_rate:.2f} after {stats.drafted} drafted tokens): "
                "use auto-config (--speculative-auto-config), try a closer draft model size, or reduce gamma "
                "(--speculative-gamma 3)"
            )

    def total(self) -> SpeculationStats:
        """The counters of all models, those let go included."""
        total = SpeculationStats()
        for stats in (self._past, *(served.stats for served in self._served.values())):
            total.add(stats)
        return total

    def describe(self) -> Mapping[str, Any]:
        """Each loaded model by id."""
        return {name: served.describe() for name, served in self._served.items()}

    def say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            say(message)


def is_whole(shard: Any) -> bool:
    """Whether all of a model's layers are on this machine."""
    return bool(shard.is_first_layer() and shard.is_last_layer())


def _require_memory(config: SpeculativeConfig, path: Path, layers: range, total: int) -> None:
    """Before layers of a target are loaded, and the draft that was named for it: its size is known from its name only."""
    named = not config.disabled and config.draft_model not in (None, NO_DRAFT)
    draft = 0.6e9 * (parameters(config.draft_model or "") or 0.0) if named else 0.0  # 4 bit weights with scales
    target = f"layers {layers.start} to {layers.stop - 1} of {config.target_model}"
    require_memory([(target, weight_bytes(path, layers, total)), (f"the draft {config.draft_model}", draft)])


def _load_draft(directory: Path, **options: Any) -> LoadedModel:
    require_memory([(f"the draft {directory.name}", weight_bytes(directory))])
    return load_model(directory, **options)


def _draft_engine(resolved: ResolvedConfig) -> str | None:
    engine = resolved.config.draft_engine or resolved.config.target_engine
    return engine if engine in ENGINE_CLASSES else None


def _config_of(model: str, resolved: ResolvedConfig) -> ResolvedConfig:
    """The configuration for a model: a draft or a layer typed for one target is not used with another."""
    native = without_engines(resolved)
    target = native.config.target_model
    typed: dict[str, Any] = {**native.typed, "target_model": model}
    if target is not None and model != target:
        if native.config.draft_model != NO_DRAFT:
            typed.pop("draft_model", None)
        if native.config.early_exit != "auto":
            typed.pop("early_exit", None)
    return resolve_config(typed, host=native.host)

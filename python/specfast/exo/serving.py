"""The models exo asked for: run natively with the draft that goes with each, or by exo's own engine where that cannot be."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..compatibility import Status
from ..config import NO_DRAFT, ResolvedConfig, resolve_config
from ..engine import Engine
from ..errors import UnsupportedModelError
from ..models import choose_draft
from ..stats import SpeculationStats
from .contract import CLASS_NAME
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
    """

    shard: Any
    tokenizer: Any
    engine: Engine | None = None
    host: Any = None
    fallback: str | None = None
    compatibility: Status = "unknown"
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    hinted: bool = False

    @property
    def why_plain(self) -> str | None:
        """Why it is decoded plainly, if it is."""
        return self.fallback or (why_plain(self.engine) if self.engine else None)

    def describe(self) -> dict[str, Any]:
        """Its draft, whether that fits, and the counters."""
        pair = self.engine.pair if self.engine else None
        return {
            "engine": "native" if pair else "exo",
            "draft": pair.draft_name if pair else None,
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

    async def serve(self, shard: Any, resolved: ResolvedConfig, in_use: Collection[str]) -> ServedModel:
        """The model of a shard, loaded now if it is not yet; others that nobody uses make room.

        Args:
            shard: exo's.
            resolved: the configuration.
            in_use: models with requests under way.

        Raises:
            SpecfastError: it cannot be had.
        """
        async with self._loading:
            served = self._served.get(shard.model_id)
            if served is None or served.shard != shard:
                served = await self._load(shard, resolved)
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

    async def _load(self, shard: Any, resolved: ResolvedConfig) -> ServedModel:
        engine = resolved.config.target_engine
        if not (shard.is_first_layer() and shard.is_last_layer()):
            part = f"layers {shard.start_layer} to {shard.end_layer} of {shard.n_layers} are this node's"
            reason = f"{part}, and speculation over several machines is not in this version"
            return await self._load_host(shard, engine, reason)
        path = Path(await self._downloader.ensure_shard(shard, CLASS_NAME))
        self._paths[shard.model_id] = path
        config = _config_of(shard.model_id, resolved)
        locate = ExoModels(self._downloader, _draft_engine(resolved), asyncio.get_running_loop(), self._paths)
        native = Engine(config, notify=self._say_once, resolve=locate)
        try:
            pair = await self._compute(lambda: native.pair)
        except UnsupportedModelError as error:
            choice = await self._compute(choose_draft, config.config, path, self._say_once, locate.metadata)
            return await self._load_host(shard, engine, str(error), choice.status)
        copying = "no draft, plain decoding" if native.drafter == "none" else f"no draft, {native.drafter} drafter"
        draft = f"draft {pair.draft_name} ({pair.compatibility})" if pair.draft_name else copying
        exact = config.config.lossless or native.drafter == "none"
        lossless = "lossless" if exact else "not lossless: lenience above 1"
        say(f"{shard.model_id}: {draft}, {pair.target.precision} activations, {lossless}")
        tokenizer = await importlib.import_module("exo.inference.tokenizers").resolve_tokenizer(path)
        return ServedModel(shard, tokenizer, native, compatibility=pair.compatibility)

    async def _load_host(
        self, shard: Any, engine: str | None, reason: str, compatibility: Status = "unknown"
    ) -> ServedModel:
        name = engine if engine in ENGINE_CLASSES else "mlx"
        self._say_once(
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

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            say(message)


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

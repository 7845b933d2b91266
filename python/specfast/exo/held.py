"""The layers of models that this node runs for rings, and the caches of the requests that pass through them."""

from __future__ import annotations

import asyncio
import importlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..checkpoint import load_model, missing_files, weight_bytes
from ..errors import RingError
from ..models import free_bytes
from .contract import CLASS_NAME
from .wire import Lap

MOST_CACHED = 8


def require_memory(needed: Sequence[tuple[str, float]]) -> None:
    """Compares what is about to be loaded with the memory that can still be had.

    Args:
        needed: names and bytes.

    Raises:
        RingError: it does not fit; names what and how much.
    """
    total, free = sum(size for _, size in needed), free_bytes()
    if total > free:
        parts = " and ".join(f"{name} with {size / 1e9:.2f} GB" for name, size in needed if size)
        raise RingError(
            f"{parts} do not fit into the {free / 1e9:.2f} GB of memory that are free here; add a node, so that this one gets "
            "fewer layers, or take a smaller model or draft"
        )


def layers_of(shard: Any) -> range:
    """The layers of exo's shard."""
    return range(shard.start_layer, shard.end_layer + 1)


@dataclass
class Passing:
    """A request that passes through this node's layers."""

    model: _core.Model
    cache: _core.Cache

    def take(self, lap: Lap, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | _core.Verdict | None:
        """Runs the rows (M, hidden) float32 of a lap: what the next stop takes, or at the last one what is decided.

        Raises:
            RingError: an earlier lap was lost.
            SpecfastError: what the native pass raises.
        """
        self._follow(lap.position)
        if not lap.is_last:
            return self.model.forward_range(self.cache, rows)
        if lap.drafted is None:
            proposal = _core.Proposal()
            self.model.verify_range(self.cache, rows, proposal, _core.Law(temperature=0.0), 0, 0)
            return None
        proposal = _core.Proposal()
        proposal.set_tokens(np.asarray(lap.drafted, dtype=np.int32))
        return self.model.verify_range(self.cache, rows, proposal, _core.Law(*lap.law), lap.seed, 0, lap.rule)

    def _follow(self, position: int) -> None:
        """Keeps what the first node has kept, and drops the rest."""
        kept = position - self.cache.length
        if not 0 <= kept <= self.cache.provisional:
            raise RingError(
                f"a lap begins at position {position}, and this node has {self.cache.length} to "
                f"{self.cache.length + self.cache.provisional}: a lap was lost; send the request again"
            )
        self.cache.commit(kept)


class HeldLayers:
    """Loads layers when a lap asks for them; keeps those asked for last, and the caches of the requests heard of last.

    Args:
        downloader: exo's ShardDownloader.
        compute: runs a function in the thread that computes.
    """

    def __init__(self, downloader: Any, compute: Callable[..., Awaitable[Any]]) -> None:
        self._downloader, self._compute = downloader, compute
        self._models: OrderedDict[tuple[str, range, str], _core.Model] = OrderedDict()
        self._passing: OrderedDict[str, Passing] = OrderedDict()
        self._loading = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._passing)

    async def take(self, lap: Lap, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | _core.Verdict | None:
        """Runs a lap's rows, as Passing.take."""
        passing = self._passing.get(lap.key)
        if passing is None:
            if lap.position > 0:
                raise RingError("a request in the middle is not known here: this node was started anew; send it again")
            model = await self._model(lap)
            passing = self._passing[lap.key] = Passing(model, _core.Cache(model, min(lap.capacity, model.max_context)))
            while len(self._passing) > MOST_CACHED:
                self._passing.popitem(last=False)
        self._passing.move_to_end(lap.key)
        found: npt.NDArray[np.float32] | _core.Verdict | None = await self._compute(passing.take, lap, rows)
        return found

    def end(self, key: str) -> None:
        """Lets a request's caches go."""
        self._passing.pop(key, None)

    def rest(self) -> None:
        """Lets the layers go where nothing passes through them; the next lap loads what it needs."""
        if not self._passing:
            self._models.clear()

    async def _model(self, lap: Lap) -> _core.Model:
        stop = lap.stop
        layers = range(stop.first, stop.last + 1)
        name = lap.model, layers, lap.precision
        async with self._loading:
            if name not in self._models:
                path = await self._fetch(lap.model, layers, lap.layers)
                self._models.clear()  # those of requests under way stay with these
                self._models[name] = await self._compute(_load, path, layers, lap)
            return self._models[name]

    async def _fetch(self, model: str, layers: range, total: int) -> Path:
        """The directory with the weights of layers. exo fetches the files of these layers alone, but where the embedding is the head
        too the last ones need its file, which comes with the first layer's.

        Raises:
            RingError: files that exo did not fetch.
        """
        make = importlib.import_module("exo.inference.shard").Shard
        path = Path(await self._downloader.ensure_shard(make(model, layers.start, layers.stop - 1, total), CLASS_NAME))
        if missing_files(path, layers, total):
            path = Path(await self._downloader.ensure_shard(make(model, 0, 0, total), CLASS_NAME))
        if missing := missing_files(path, layers, total):
            raise RingError(
                f"layers {layers.start} to {layers.stop - 1} of {model} need {', '.join(missing[:3])}, which exo did not fetch "
                f"into {path}; put it there, or run the model on one node once, which fetches all files"
            )
        return path


def _load(path: Path, layers: range, lap: Lap) -> _core.Model:
    named = f"layers {layers.start} to {layers.stop - 1} of {lap.model}"
    require_memory([(named, weight_bytes(path, layers))])
    return load_model(path, layers=layers, precision=lap.precision).model

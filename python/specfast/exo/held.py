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
from ..checkpoint import missing_files, weight_bytes
from ..errors import RingError
from ..models import free_bytes
from .contract import CLASS_NAME
from .layers import Layers, LayersHost, Positions, as_layers
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

    layers: Layers
    cache: Positions

    def take(self, lap: Lap, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | _core.Verdict | None:
        """Runs the rows (M, hidden) float32 of a lap: what the next stop takes, or at the last one what is decided.

        Raises:
            RingError: an earlier lap was lost.
            SpecfastError: what the pass raises.
        """
        self._follow(lap.position)
        if not lap.is_last:
            return self.layers.forward(self.cache, rows)
        if lap.drafted is None:
            self.layers.read(self.cache, rows)
            return None
        return self.layers.verify(self.cache, rows, lap.drafted, _core.Law(*lap.law), lap.seed, lap.rule)

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
        self._layers: OrderedDict[tuple[str, range, str | None, str | None], Layers] = OrderedDict()
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
            layers = await self._layers_of(lap)
            passing = self._passing[lap.key] = Passing(layers, await self._compute(layers.new_cache, lap.capacity))
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
            self._layers.clear()

    async def _layers_of(self, lap: Lap) -> Layers:
        stop = lap.stop
        layers = range(stop.first, stop.last + 1)
        name = lap.model, layers, lap.precision, lap.engine
        async with self._loading:
            if name not in self._layers:
                path = await self._fetch(lap.model, layers, lap.layers)
                self._layers.clear()  # those of requests under way stay with these
                self._layers[name] = await self._compute(_load, path, layers, lap)
            return self._layers[name]

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


def _load(path: Path, layers: range, lap: Lap) -> Layers:
    named = f"layers {layers.start} to {layers.stop - 1} of {lap.model}"
    require_memory([(named, weight_bytes(path, layers, lap.layers))])
    host = LayersHost(lap.model, lap.layers, lap.engine)
    return as_layers(host.load(path, layers=layers, precision=lap.precision).model, layers)

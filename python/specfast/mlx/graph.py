"""The primitives behind an mlx-lm model's call: its forward pass as part of MLX's graph, and the caches it works with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from .. import _core
from ..errors import ShapeError
from . import cache as pages

_Stock: Any = mlx_lm_cache.KVCache
_PAGE = 256  # positions


class KVCache(_Stock):  # type: ignore[misc]
    """A layer's cache whose keys and values are an MLX array in the order the kernels read. Made by an accelerated model.

    It is mlx-lm's cache in every respect: `offset` is how many positions count, `trim` and a smaller `offset` drop the
    rest, and `keys`, `values`, `state`, copies and saved files have the same contents: (1, kv_heads, offset, head_dim) in
    bfloat16, or float32 at precision "f32". Appending extends the array in place where nobody else appended to it.
    """

    _graph: Any
    _held: int  # positions kv has rows of
    kv: mx.array
    offset: int

    @property
    def keys(self) -> mx.array | None:
        """A copy of the keys, rotated: (1, kv_heads, offset, head_dim); None when there are none."""
        return self._rows(0)

    @keys.setter
    def keys(self, keys: mx.array | None) -> None:
        self.become_stock()
        self.keys = keys

    @property
    def values(self) -> mx.array | None:
        """A copy of the values: (1, kv_heads, offset, head_dim); None when there are none."""
        return self._rows(1)

    @values.setter
    def values(self, values: mx.array | None) -> None:
        self.become_stock()
        self.values = values

    @property
    def nbytes(self) -> int:
        """Memory of this layer's keys and values."""
        return int(self.kv.nbytes)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Appends as mlx-lm's layers do; the cache is a stock one from then on."""
        self.become_stock()
        return self.update_and_fetch(keys, values)

    def become_stock(self) -> None:
        """Turns this into mlx-lm's own cache with the same contents."""
        keys, values = self.keys, self.values
        self.__class__ = _Stock
        del self._graph, self._held, self.kv
        self.keys, self.values = keys, values

    def __reduce__(self) -> Any:
        """Copies and pickles are stock caches."""
        return _stock_cache, (self.keys, self.values, self.offset)

    def _rows(self, which: int) -> mx.array | None:
        if self.kv.size == 0:
            return None
        return self._graph.read_rows(self.kv, self.offset)[which][None]


def _stock_cache(keys: mx.array | None, values: mx.array | None, offset: int) -> Any:
    cache = _Stock()
    cache.keys, cache.values, cache.offset = keys, values, offset
    return cache


class GraphForward:
    """A model's forward pass as primitives."""

    def __init__(self, graph: Any, native: _core.Model) -> None:
        self._graph, self._native = graph, native

    def takes(self, caches: Sequence[Any] | None) -> bool:
        """Whether these caches can be worked with: one of mlx-lm's KVCache for each layer, all of the same length."""
        if caches is None:
            return True
        if len(caches) != self._native.layers or {type(c) for c in caches} - {_Stock, pages.KVCache, KVCache}:
            return False
        shape, offset = (1, self._native.kv_heads, self._native.head_dim), pages.checked_offset(caches[0])
        for cache in caches:
            if cache.offset != offset:
                return False
            if type(cache) is _Stock and offset:
                rows = (cache.keys, cache.values)
                if any(r is None or (*r.shape[:2], r.shape[3]) != shape or r.shape[2] < offset for r in rows):
                    return False
        return True

    def __call__(self, inputs: mx.array, caches: Sequence[Any] | None) -> mx.array:
        """The logits (1, M, vocab) of inputs (1, M), not computed yet; caches that `takes` allows then hold its rows.

        Raises:
            ShapeError: the caches' offset is beyond what they hold.
        """
        M = inputs.shape[1]
        if caches is None:
            nothing = [mx.zeros((0,), mx.uint32)] * self._native.layers
            return self._graph.forward(inputs[0], nothing, mx.array(0), _pages(M, 0))[0][None]
        for cache in caches:
            self._adopt(cache)
        offset = caches[0].offset
        pages = _pages(offset + M, self._graph.pages(caches[0].kv))
        logits, kv = self._graph.forward(inputs[0], [cache.kv for cache in caches], mx.array(offset), pages)
        for cache, appended in zip(caches, kv, strict=True):
            cache.kv = appended
            cache.offset = cache._held = offset + M
        return logits[None]

    def _adopt(self, cache: Any) -> None:
        if type(cache) is KVCache:
            if cache.offset > cache._held:
                raise ShapeError(
                    f"the caches' offset is {cache.offset}, but they hold {cache._held} positions; only lower it"
                )
            if cache._graph is self._graph:
                return
            cache.become_stock()
        elif type(cache) is pages.KVCache:
            cache.become_stock()
        kv, offset = mx.zeros((0,), mx.uint32), cache.offset
        if offset:
            keys, values = (rows[0, :, :offset] for rows in (cache.keys, cache.values))
            kv = self._graph.write_rows(kv, keys, values, mx.array(0), _pages(offset, 0))
        vars(cache).pop("keys", None)
        vars(cache).pop("values", None)
        cache.__class__ = KVCache
        cache._graph, cache._held, cache.kv = self._graph, offset, kv


def _pages(positions: int, there: int) -> int:
    """Pages for so many positions: those that are there, or half as many more, so that copying them stays cheap."""
    needed = -(-positions // _PAGE)
    return there if needed <= there else max(needed, there + there // 2)

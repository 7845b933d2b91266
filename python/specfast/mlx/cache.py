"""mlx-lm's KV cache with specfast's pages behind it: one native cache for all layers, one `KVCache` each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_lm_cache

from .. import _core
from ..errors import ShapeError

_Stock: Any = mlx_lm_cache.KVCache


@dataclass(frozen=True, eq=False)
class Store:
    """The native cache of one sequence, for all layers of one model."""

    model: _core.Model
    cache: _core.Cache


class KVCache(_Stock):  # type: ignore[misc]
    """A layer's cache whose keys and values lie in specfast's pages. Made by an accelerated model, not by hand.

    The model turns the stock caches it is called with into these, in place, and takes over what they hold; layers that run
    in MLX turn them back. In between they are mlx-lm's caches in every respect: `offset` is how many positions count,
    `trim` and a smaller `offset` drop the rest, and `keys`, `values`, `state`, `nbytes`, copies and saved files have the
    same contents, as copies of (1, kv_heads, offset, head_dim) in bfloat16, or float32 at precision "f32".
    """

    _store: Store
    _layer: int
    offset: int

    @property
    def keys(self) -> mx.array | None:
        """A copy of the keys, rotated: (1, kv_heads, offset, head_dim); None when there are none."""
        return self._rows(self._store.cache.keys)

    @keys.setter
    def keys(self, keys: mx.array | None) -> None:
        self.become_stock()
        self.keys = keys

    @property
    def values(self) -> mx.array | None:
        """A copy of the values: (1, kv_heads, offset, head_dim); None when there are none."""
        return self._rows(self._store.cache.values)

    @values.setter
    def values(self, values: mx.array | None) -> None:
        self.become_stock()
        self.values = values

    @property
    def nbytes(self) -> int:
        """Memory of this layer's pages."""
        return self._store.cache.nbytes // self._store.model.layers

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Appends as mlx-lm's layers do; the cache is a stock one from then on."""
        self.become_stock()
        return self.update_and_fetch(keys, values)

    def __reduce__(self) -> Any:
        """Copies and pickles are stock caches."""
        return _stock_cache, (self.keys, self.values, self.offset)

    def _rows(self, read: Any) -> mx.array | None:
        if self._store.cache.length == 0:
            return None
        rows = mx.array(read(self._layer)[None, :, : self.offset])
        return rows if rows.dtype == mx.float32 else rows.view(mx.bfloat16)

    def become_stock(self) -> None:
        keys, values = self.keys, self.values
        self.__class__ = _Stock
        del self._store, self._layer
        self.keys, self.values = keys, values


def _stock_cache(keys: mx.array | None, values: mx.array | None, offset: int) -> Any:
    cache = _Stock()
    cache.keys, cache.values, cache.offset = keys, values, offset
    return cache


def adopt(model: _core.Model, caches: Sequence[Any]) -> Store | str:
    """The store behind the caches of one sequence, holding what they hold and nothing else; or why there cannot be one.

    Stock caches, and those of another model or store, become caches of a new store.

    Raises:
        ShapeError: the caches' offset is beyond what they hold.
    """
    if len(caches) != model.layers:
        return f"{len(caches)} caches for {model.layers} layers"
    kinds = {type(cache) for cache in caches}
    if not kinds <= {KVCache, _Stock}:
        return f"a cache of type {', '.join(sorted(kind.__name__ for kind in kinds))}; supported: KVCache"
    offset = caches[0].offset
    if any(cache.offset != offset for cache in caches):
        return "caches whose layers have different offsets"
    store: Store | None = getattr(caches[0], "_store", None)
    if store is None or store.model is not model or not all(_is_layer(c, store, i) for i, c in enumerate(caches)):
        return _take_over(model, caches, offset)
    if offset > store.cache.length:
        raise ShapeError(f"the caches' offset is {offset}, but they hold {store.cache.length} positions; only lower it")
    if offset < store.cache.length:
        store.cache.truncate(offset)
    return store


def _is_layer(cache: Any, store: Store, layer: int) -> bool:
    return type(cache) is KVCache and cache._store is store and cache._layer == layer


def _take_over(model: _core.Model, caches: Sequence[Any], offset: int) -> Store | str:
    store = Store(model, _core.Cache(model))
    if offset:
        shape = (1, model.kv_heads, model.head_dim)
        keys, values = [cache.keys for cache in caches], [cache.values for cache in caches]
        for rows in (*keys, *values):
            if rows is None or (rows.shape[0], rows.shape[1], rows.shape[3]) != shape or rows.shape[2] < offset:
                return f"a cache of shape {None if rows is None else tuple(rows.shape)}; supported: (1, {shape[1]}, rows, {shape[2]})"
        store.cache.assign(*([_floats(rows[0, :, :offset]) for rows in each] for each in (keys, values)))
    for layer, cache in enumerate(caches):
        vars(cache).pop("keys", None)
        vars(cache).pop("values", None)
        cache.__class__ = KVCache
        cache._store, cache._layer = store, layer
    return store


def _floats(rows: mx.array) -> Any:
    return np.ascontiguousarray(np.asarray(rows.astype(mx.float32)))

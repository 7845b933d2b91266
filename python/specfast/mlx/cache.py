"""mlx-lm's KV caches with specfast's pages behind them: one native cache for all layers, one Python object for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_lm_cache

from .. import _core
from ..errors import ConfigurationError, ShapeError

_Stock: Any = mlx_lm_cache.KVCache
_StockRotating: Any = mlx_lm_cache.RotatingKVCache
_StockQuantized: Any = mlx_lm_cache.QuantizedKVCache
UNDO = 64  # positions that a cache with a window can drop again after they have pushed others out
KEEP = 4  # first positions that mlx-lm keeps under a max_kv_size
_Window = tuple[int, int]  # positions up to a row's own, 0 for all, and first positions besides
_Codes = tuple[int, int]  # bits and group size of MLX's affine codes


@dataclass(frozen=True, eq=False)
class Store:
    """The native cache of one sequence, for all layers of one model."""

    model: _core.Model
    cache: _core.Cache
    windows: list[_Window]
    codes: _Codes | None


class _InPages:
    """What mlx-lm's caches are while specfast's pages hold their keys and values.

    In between calls they are mlx-lm's caches in every respect: `offset` is how many positions count, `trim` and a smaller
    `offset` drop the rest, and `keys`, `values`, `state`, `nbytes`, copies and saved files have the same contents, as
    copies in bfloat16, or float32 at precision "f32". Whatever writes into one makes it a stock cache again.
    """

    _store: Store
    _layer: int
    offset: int
    _stock: ClassVar[Any]

    @property
    def keys(self) -> Any:
        """A copy of the keys, rotated: (1, kv_heads, rows, head_dim); None when there are none."""
        return self._rows(keys=True) if self._store.cache.length else None

    @keys.setter
    def keys(self, keys: Any) -> None:
        self.become_stock()
        self.keys = keys

    @property
    def values(self) -> Any:
        """A copy of the values: (1, kv_heads, rows, head_dim); None when there are none."""
        return self._rows(keys=False) if self._store.cache.length else None

    @values.setter
    def values(self, values: Any) -> None:
        self.become_stock()
        self.values = values

    @property
    def nbytes(self) -> int:
        """Memory of this layer's pages, where all layers have equal windows."""
        return self._store.cache.nbytes // self._store.model.layers

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Appends as mlx-lm's layers do; the cache is a stock one from then on."""
        self.become_stock()
        return self.update_and_fetch(keys, values)

    def __reduce__(self) -> Any:
        """Copies and pickles are stock caches."""
        return _stock_cache, (self._stock, self._contents())

    def _contents(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name not in ("_store", "_layer")}
        return own | {"keys": self.keys, "values": self.values}

    def _rows(self, *, keys: bool) -> Any:
        read = self._store.cache.keys if keys else self._store.cache.values
        rows = mx.array(read(self._layer, self.offset)[None])
        return rows if rows.dtype == mx.float32 else rows.view(mx.bfloat16)

    def become_stock(self) -> None:
        contents = self._contents()
        self.__class__ = self._stock
        vars(self).clear()
        vars(self).update(contents)


class KVCache(_InPages, _Stock):  # type: ignore[misc]
    """A layer's cache of all positions in specfast's pages. Made by an accelerated model, not by hand."""

    _stock = _Stock


class RotatingKVCache(_InPages, _StockRotating):  # type: ignore[misc]
    """A layer's cache of the first `keep` and the last `max_size - keep` positions in specfast's pages, in the order of
    the text. Made by an accelerated model, not by hand.

    `is_trimmable` is mlx-lm's: False once positions have left the cache. `trim` and a smaller `offset` drop positions
    exactly all the same, the last call's and `UNDO` more.
    """

    _stock = _StockRotating
    keep: int
    max_size: int

    @property
    def _idx(self) -> int:
        """Where mlx-lm writes next: behind the last row."""
        return min(self.offset, self.max_size)

    def trim(self, n: int) -> int:
        """Drops the last n positions, or all. Returns how many.

        Raises:
            ShapeError: what the shorter text attends to has left the cache, or n is below 0.
        """
        if n < 0:
            raise ShapeError(f"{n} positions cannot be dropped; at least 0 can")
        n = min(self.offset, n)
        least = self._store.cache.least_length
        if 0 < self.offset - n < least:
            raise ShapeError(
                f"{n} of {self.offset} positions cannot be dropped; at most {self.offset - least} can, or all"
            )
        self.offset -= n
        return n

    def _contents(self) -> dict[str, Any]:
        return super()._contents() | {"_idx": self._idx}


class QuantizedKVCache(_InPages, _StockQuantized):  # type: ignore[misc]
    """A layer's cache of MLX's affine codes in specfast's pages. Made by an accelerated model, not by hand.

    `keys` and `values` are mlx-lm's triples: packed codes (1, kv_heads, rows, head_dim * bits / 32) uint32, scales and biases
    (1, kv_heads, rows, head_dim / group_size).
    """

    _stock = _StockQuantized
    group_size: int
    bits: int

    def _rows(self, *, keys: bool) -> Any:
        codes, scales, biases = self._store.cache.codes(self._layer, keys, self.offset)
        rows = codes if self.bits == 8 else codes[..., ::2] + codes[..., 1::2] * np.uint8(16)
        dtype = mx.float32 if self._store.model.precision == "f32" else mx.bfloat16
        packed = mx.array(np.ascontiguousarray(rows).view(np.uint32)[None])
        return packed, *(mx.array(part[None]).astype(dtype) for part in (scales, biases))


_KINDS = (KVCache, RotatingKVCache, QuantizedKVCache)


def _stock_cache(kind: Any, contents: dict[str, Any]) -> Any:
    cache = kind.__new__(kind)
    vars(cache).update(contents)
    return cache


def make_cache(
    model: _core.Model, max_kv_size: int | None = None, capacity: int = 0, codes: tuple[int, int] | None = None
) -> _core.Cache:
    """The native cache of a new sequence; with a `max_kv_size`, of that many positions: the first 4, and the last ones.

    Layers with a sliding window of their own keep that, as in mlx-lm.

    Args:
        capacity: most positions of the text; 0 for no limit.
        codes: bits and group size of MLX's affine codes that keys and values are kept in; without windows only.

    Raises:
        ConfigurationError: a max_kv_size that leaves nothing besides the first 4.
    """
    if max_kv_size is None:
        return _core.Cache(model, capacity, kv_codes=codes)
    if max_kv_size <= KEEP:
        raise ConfigurationError(f"max_kv_size is {max_kv_size}, but must be at least {KEEP + 1}")
    windows = [(own, 0) if own else (max_kv_size - KEEP, KEEP) for own in model.windows]
    return _new_cache(model, windows, codes, capacity)


def checked_offset(cache: Any) -> int:
    """A cache's offset.

    Raises:
        ShapeError: somebody set it to what is no length.
    """
    offset = cache.offset
    if not isinstance(offset, int) or offset < 0:
        raise ShapeError(f"the caches' offset is {offset!r:.100}, but must be a whole number, at least 0")
    return offset


def adopt(model: _core.Model, caches: Sequence[Any]) -> Store | str:
    """The store behind the caches of one sequence, holding what they hold and nothing else; or why there cannot be one.

    Stock caches, and those of another model or store, become caches of a new store.

    Raises:
        ShapeError: the caches' offset is no whole number, beyond what they hold, or so small that what it needs has left a window.
    """
    if len(caches) != model.layers:
        return f"{len(caches)} caches for {model.layers} layers"
    windows: list[_Window] = []
    for cache, own in zip(caches, model.windows, strict=True):
        window = _window(cache, own)
        if isinstance(window, str):
            return window
        windows.append(window)
    codes = _codes(model, caches)
    if isinstance(codes, str):
        return codes
    offset = checked_offset(caches[0])
    if any(cache.offset != offset for cache in caches):
        return "caches whose layers have different offsets"
    store: Store | None = getattr(caches[0], "_store", None)
    if (
        store is None
        or store.model is not model
        or (store.windows, store.codes) != (windows, codes)
        or not all(_is_layer(cache, store, layer) for layer, cache in enumerate(caches))
    ):
        # one more than can be undone, so that the rest can be read
        cache = _new_cache(model, windows, codes, 0, UNDO + 1)
        return _take_over(Store(model, cache, windows, codes), caches, offset)
    if offset > store.cache.length:
        raise ShapeError(f"the caches' offset is {offset}, but they hold {store.cache.length} positions; only lower it")
    if offset < store.cache.length:
        store.cache.truncate(offset)
    return store


def _window(cache: Any, own: int) -> _Window | str:
    """What a row of a layer with the window `own` attends to in a cache, or why it cannot."""
    kind = type(cache)
    if kind in (KVCache, _Stock, QuantizedKVCache, _StockQuantized):
        return f"a {kind.__name__} for a layer with a sliding window of {own}" if own else (0, 0)
    if kind not in (RotatingKVCache, _StockRotating):
        return f"a cache of type {kind.__name__}; supported: KVCache, RotatingKVCache, QuantizedKVCache"
    if not 0 <= cache.keep < cache.max_size:
        return f"a RotatingKVCache that keeps {cache.keep} of {cache.max_size} positions"
    if own and cache.max_size > own:
        return f"a RotatingKVCache of {cache.max_size} positions for a layer with a sliding window of {own}"
    return cache.max_size - cache.keep, cache.keep


def _codes(model: _core.Model, caches: Sequence[Any]) -> _Codes | str | None:
    """The codes that all of the caches hold, None for no codes, or why they cannot be held."""
    formats = {(c.bits, c.group_size) if isinstance(c, _StockQuantized) else None for c in caches}
    if len(formats) > 1:
        return "quantised caches beside others"
    codes = formats.pop()
    if codes and (codes[0] not in (4, 8) or codes[1] not in (32, 64, 128) or model.head_dim % codes[1]):
        return (
            f"a QuantizedKVCache of {codes[0]} bits in groups of {codes[1]}; supported: 4 or 8 bits in groups of 32, 64 or "
            f"128 that divide the head_dim of {model.head_dim}"
        )
    return codes


def _new_cache(
    model: _core.Model, windows: Sequence[_Window], codes: _Codes | None, capacity: int, undo: int = 0
) -> _core.Cache:
    sizes, sinks = [size for size, _ in windows], [sinks for _, sinks in windows]
    return _core.Cache(model, capacity, sizes, sinks, undo, codes)


def _is_layer(cache: Any, store: Store, layer: int) -> bool:
    return isinstance(cache, _InPages) and cache._store is store and cache._layer == layer


def _take_over(store: Store, caches: Sequence[Any], offset: int) -> Store | str:
    if offset:
        keys: list[Any] = []
        values: list[Any] = []
        for cache, window in zip(caches, store.windows, strict=True):
            for rows, to in ((cache.keys, keys), (cache.values, values)):
                held = (
                    _codes_of(store.model, cache, rows) if store.codes else _rows_of(store.model, cache, rows, window)
                )
                if isinstance(held, str):
                    return held
                to.append(held)
        if store.codes:
            store.cache.assign_codes(keys, values)
        else:
            store.cache.assign(keys, values, offset)
    for layer, cache in enumerate(caches):
        for name in ("keys", "values", "_idx"):
            vars(cache).pop(name, None)
        cache.__class__ = next(kind for kind in _KINDS if isinstance(cache, kind._stock))
        cache._store, cache._layer = store, layer
    return store


def _rows_of(model: _core.Model, cache: Any, rows: mx.array | None, window: _Window) -> Any:
    """What a cache holds, (kv_heads, rows, head_dim) float32 in the order of the text; or why that cannot be used."""
    least = min(cache.offset, sum(window)) if window[0] else cache.offset
    if rows is not None:
        heads, dim = (rows.shape[0], rows.shape[1]), rows.shape[3]
        if type(cache) is _StockRotating:  # which writes over the oldest
            rows = cache._temporal_order(rows)
        if heads == (1, model.kv_heads) and dim == model.head_dim and rows.shape[2] >= least:
            return np.ascontiguousarray(np.asarray(rows[0, :, : cache.offset].astype(mx.float32)))
    shape = None if rows is None else tuple(rows.shape)
    return f"a cache of shape {shape}; supported: (1, {model.kv_heads}, rows, {model.head_dim})"


def _codes_of(model: _core.Model, cache: Any, rows: Any) -> Any:
    """What a quantised cache holds: codes (kv_heads, rows, head_dim) uint8 and their scales and biases, or why not."""
    if rows is None:
        return f"a quantised cache without rows at offset {cache.offset}"
    width, groups = model.head_dim * cache.bits // 32, model.head_dim // cache.group_size
    for part, columns in zip(rows, (width, groups, groups), strict=True):
        if (*part.shape[:2], part.shape[3]) != (1, model.kv_heads, columns) or part.shape[2] < cache.offset:
            return f"a quantised cache of shape {tuple(part.shape)}; supported: (1, {model.kv_heads}, rows, {columns})"
    packed, *rest = (part[0, :, : cache.offset] for part in rows)
    codes = np.ascontiguousarray(np.asarray(packed)).view(np.uint8)
    if cache.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], model.head_dim)
    return codes, *(np.ascontiguousarray(np.asarray(part.astype(mx.float32))) for part in rest)

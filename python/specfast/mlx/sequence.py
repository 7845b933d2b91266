"""One text in an mlx-lm model's caches, whatever their types: rows are run, then kept or undone exactly."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn
from mlx_lm.models import cache as mlx_lm_cache

from ..errors import ConfigurationError, ShapeError

UNBOUNDED = 1 << 28  # rows; mlx-lm's caches have no end either
_CACHES = mlx_lm_cache.__name__


class Quantising(NamedTuple):
    """When mlx-lm's caches become quantised ones, by its option names: from offset `start` on; never if bits is None."""

    bits: int | None = None
    group_size: int = 64
    start: int = 5000


NEVER = Quantising()


class CacheSequence:
    """A model and its caches as a transaction: `begin`, any number of `run`, then `keep` the first of the rows run.

    Caches that lose nothing when they grow are cut back. What others held is kept from `begin` on (MLX's arrays are
    immutable: by reference) and put back; the rows to keep are then not in the caches, and `length` says so: they have to
    be run again.

    Args:
        model: an mlx-lm model; its own call is used.
        caches: one for each layer, as mlx-lm makes them; changed in place, also entry by entry where they become quantised.
        quantising: when to quantise them.
    """

    def __init__(self, model: nn.Module, caches: list[Any], quantising: Quantising = NEVER) -> None:
        self._model, self.caches, self._quantising = model, caches, quantising
        self.length = 0  # rows of this text that the caches hold
        self.rows_since_begin = 0
        self._undo: list[Callable[[], None]] = []
        self._left: int | None = None  # the caches' offset after our last change

    @property
    def longest(self) -> int:
        """Rows that one pass may have without changing what they compute.

        Once a rotating cache has wrapped, a pass of several rows masks others than as many passes would: in every mlx-lm
        where first tokens are kept (`max_kv_size`), in older ones always. And a cache is quantised between passes. Beyond
        these points rows go one by one, as in plain decoding.
        """
        return max(1, min((self._exact_rows(cache) for cache in self.caches), default=UNBOUNDED))

    @property
    def moved(self) -> bool:
        """Whether somebody else has changed the caches' offset since our last change."""
        return self._left is not None and self._left != self._offset

    @property
    def _offset(self) -> int | None:
        offset = getattr(self.caches[0], "offset", None) if self.caches else None
        return offset if isinstance(offset, int) else None

    def begin(self, *, undoable: bool = True) -> None:
        """Rows run so far stay; those from here on can be undone, if asked for.

        Raises:
            ShapeError: the caches serve another text by now.
        """
        if self.moved:
            raise ShapeError(
                f"the caches' offset is {self._offset}, but this text left it at {self._left}; give every request caches "
                "of its own, or end one before the next"
            )
        self.quantise()
        self._undo = [_undo_of(cache) for cache in self.caches] if undoable else []
        self.rows_since_begin = 0

    def run(self, tokens: mx.array) -> mx.array:
        """Appends tokens (M,), at least one; returns their logits (M, V), which are not evaluated."""
        rows = int(tokens.shape[0])
        logits = self._model(tokens[None], cache=self.caches)[0]
        self.length += rows
        self.rows_since_begin += rows
        self._left = self._offset
        return logits

    def keep(self, count: int) -> None:
        """Keeps the first `count` of the rows run since `begin`; may be called again with fewer. `length` says how many of
        them the caches hold then: all, or none."""
        undone = self.rows_since_begin - count
        if undone and all(_cuts_back(cache) for cache in self.caches):
            for cache in self.caches:
                cache.trim(undone)
            self.length -= undone
            self._left = self._offset
        elif undone:
            self.undo()
        self.rows_since_begin = min(self.rows_since_begin, count)

    def undo(self) -> None:
        """Undoes all rows run since `begin`, also those of a pass that failed half way; nothing where that was not asked for."""
        if not self._undo:
            return
        for undo in self._undo:
            undo()
        self.length -= self.rows_since_begin
        self.rows_since_begin = 0
        self._left = self._offset

    def read(
        self, tokens: Sequence[int], step: int, on_step: Callable[[int], None] | None = None, *, exact: bool = False
    ) -> None:
        """Appends tokens for good, `step` at a time, and drops their logits; if exact, never more than `longest`."""
        at = 0
        while at < len(tokens):
            rows = min(step, len(tokens) - at, self.longest if exact else UNBOUNDED)
            self.begin()
            try:
                self.run(mx.array(tokens[at : at + rows], mx.uint32))
                mx.eval(self.state)
            except BaseException:
                self.undo()
                raise
            at += rows
            if on_step:
                on_step(at)

    @property
    def state(self) -> list[mx.array]:
        """The arrays of all caches, to be evaluated with a pass."""
        arrays: list[mx.array] = []
        for cache in self.caches:
            _collect(vars(cache), arrays)
        return arrays

    def quantise(self) -> None:
        """Quantises the caches that have come so far, as mlx-lm does between passes."""
        bits, group_size, start = self._quantising
        if bits is None:
            return
        for at, cache in enumerate(self.caches):
            if hasattr(cache, "to_quantized") and cache.offset >= max(1, start):
                try:
                    self.caches[at] = cache.to_quantized(group_size=group_size, bits=bits)
                except NotImplementedError:
                    raise ConfigurationError(
                        f"kv_bits is {bits}, but mlx-lm cannot quantise a {type(cache).__name__}; leave kv_bits out"
                    ) from None
                except ValueError as error:
                    raise ConfigurationError(
                        f"kv_bits is {bits} in groups of {group_size}, which MLX refuses ({error}); give a smaller "
                        "kv_group_size, or leave kv_bits out"
                    ) from None

    def _exact_rows(self, cache: Any) -> int:
        rows = UNBOUNDED
        if _is_stock(cache, "RotatingKVCache") and not rotates_exactly(cache.keep):
            rows = cache.max_size - cache.offset
        if self._quantising.bits is not None and hasattr(cache, "to_quantized"):
            unquantised = max(1, self._quantising.start) - cache.offset
            rows = min(rows, unquantised if unquantised > 0 else UNBOUNDED)
        return rows


@functools.cache
def rotates_exactly(keep: int) -> bool:
    """Whether rows of a rotating cache that has wrapped see the same positions in one pass as one by one."""

    def seen(sizes: Sequence[int]) -> list[set[int]]:
        """The positions that every row sees, of caches whose keys are their positions."""
        cache, found = mlx_lm_cache.RotatingKVCache(max_size=keep + 4, keep=keep), []
        for size in sizes:
            rows = mx.arange(cache.offset, cache.offset + size).astype(mx.float32).reshape(1, 1, size, 1)
            mask = cache.make_mask(size, window_size=None, return_array=True)
            keys = cache.update_and_fetch(rows, rows)[0].reshape(-1).tolist()
            shown = [[True] * len(keys)] * size if mask is None else mask.reshape(size, -1).tolist()
            found += [{int(key) for key, is_shown in zip(keys, row, strict=True) if is_shown} for row in shown]
        return found

    rows = 2 * (keep + 4)
    try:
        return seen([1] * rows + [3, 1, 2]) == seen([1] * (rows + 6))
    except (AttributeError, TypeError, ValueError):  # a version whose masks are made elsewhere
        return False


def _is_stock(cache: Any, name: str) -> bool:
    return type(cache).__module__ == _CACHES and type(cache).__name__ == name


def _is_ours(cache: Any) -> bool:
    """Whether it holds pages of specfast's, which any of the last rows leave exactly."""
    return type(cache).__module__.startswith("specfast.")


def _cuts_back(cache: Any) -> bool:
    """Whether `trim` gives exactly what there was before the last rows."""
    if _is_stock(cache, "CacheList"):
        return all(_cuts_back(part) for part in cache.caches)
    if _is_ours(cache):  # also once it has wrapped, when mlx-lm would say no
        return True
    kinds = ("KVCache", "QuantizedKVCache", "RotatingKVCache")
    return any(_is_stock(cache, kind) for kind in kinds) and bool(cache.is_trimmable())


def _undo_of(cache: Any) -> Callable[[], None]:
    """Puts a cache back to what it is now, once."""
    grows = _is_stock(cache, "KVCache") or _is_stock(cache, "QuantizedKVCache")
    if grows or _is_ours(cache):
        offset = cache.offset

        def cut() -> None:
            cache.trim(cache.offset - offset)

        return cut
    kind, held = type(cache), _held(vars(cache))

    def put_back() -> None:
        cache.__class__ = kind
        vars(cache).clear()
        vars(cache).update(_held(held))

    return put_back


def _held(value: Any) -> Any:
    """The same value, safe from assignments to its parts: arrays by reference, containers and nested caches as copies."""
    if isinstance(value, mx.array):
        return copy.copy(value)  # another handle on the same array: slices assigned through the first are not seen
    if isinstance(value, dict):
        return {key: _held(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_held(item) for item in value)
    if type(value).__module__.startswith("mlx_lm."):  # a cache in a cache
        made = copy.copy(value)
        vars(made).update(_held(vars(value)))
        return made
    return value


def _collect(value: Any, arrays: list[mx.array]) -> None:
    if isinstance(value, mx.array):
        arrays.append(value)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, arrays)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, arrays)
    elif type(value).__module__.startswith("mlx_lm."):
        _collect(vars(value), arrays)

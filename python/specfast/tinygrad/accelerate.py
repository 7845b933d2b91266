"""Puts specfast's fused forward pass behind the call of a tinygrad model, and takes it away again."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from tinygrad import Tensor, TinyJit, dtypes

from .. import _core
from ..checkpoint import check_precision
from ..errors import ConfigurationError, ShapeError, SpecfastError, UnsupportedModelError
from . import private
from .metal import MetalPath
from .weights import NativeWeights, Seams, native_weights, on_metal, read_seams


@dataclass(frozen=True)
class Report:
    """What runs when a model is called.

    Attributes:
        path: "graph" (native programs in tinygrad's graph: on the CPU one for the whole forward pass), "public" (the same beside the
            graph, through tinygrad's public API) or "stock" (tinygrad's own layers).
        reason: why the path is not "graph"; "" if it is.
        precision: of the activations on the native path.
        isa: the instruction set of its kernels; "metal" on a GPU.
        weight_bytes: bytes of weights a pass reads.
        weights: how many parameters are held how: "file blocks" and "in place" (where tinygrad has them), "realised" (the
            same, once tinygrad had computed them) or "copied".
        native_calls: passes that ran natively, replayed ones included; on METAL those that were put into a graph.
        problem: why the last pass gave NaN; "" if it did not.
    """

    path: Literal["graph", "public", "stock"]
    reason: str = ""
    precision: str | None = None
    isa: str | None = None
    weight_bytes: int = 0
    weights: Mapping[str, int] = field(default_factory=dict)
    native_calls: int = 0
    problem: str = ""


class _Sequence:
    """One sequence's native cache, as graphs call it.

    `last` are the logits of its last pass, which the next one reads in the graph (and nowhere else): so passes run in the order
    in which they were called, whichever is realised first, and none twice.
    """

    def __init__(self, native: _core.Model) -> None:
        self.cache, self.vocab = _core.Cache(native), native.vocab
        self.forward = _core.GraphForward(native, self.cache)
        self.last = Tensor(np.zeros(1, np.int64), device="CPU").clone().realize()

    def call(self, rows: int, M: int, start: int) -> Tensor:
        """What the native function is told (5,) int64; see GraphForward."""
        return Tensor(np.array([self.forward.number, self.vocab, rows, M, start], dtype=np.int64), device="CPU")


class _Path:
    """A native model over a model's tensors, for as long as these are the model's."""

    def __init__(self, weights: NativeWeights, seams: Seams) -> None:
        self.native, self.held, self.kind = weights.model, weights.held, seams.kind
        self.graphs = not private.graph_problem()
        self.sequence = _Sequence(self.native)
        self._of_caches: dict[int, tuple[Any, _Sequence]] = {}
        self._watched = [(weight, private.identity(weight.tensor)) for weight in seams.weights]
        self._calls_before = 0

    @property
    def sequences(self) -> list[_Sequence]:
        return [self.sequence, *(sequence for _, sequence in self._of_caches.values())]

    def native_calls(self) -> int:
        return self._calls_before + sum(sequence.forward.calls for sequence in self.sequences)

    def sequence_of(self, caches: Any) -> _Sequence:
        """The sequence whose keys and values a list of a host's own cache tensors stands for."""
        if caches is None or not isinstance(caches, list | tuple) or caches[0] is None:
            return self.sequence
        key = id(caches[0])
        if key not in self._of_caches or self._of_caches[key][0]() is not caches[0]:
            for old, (reference, sequence) in list(self._of_caches.items()):
                if reference() is None:
                    self._calls_before += sequence.forward.calls
                    del self._of_caches[old]
            self._of_caches[key] = (weakref.ref(caches[0]), _Sequence(self.native))
        return self._of_caches[key][1]

    def logits(self, tokens: Tensor, start_pos: Any, *, last: bool, sequence: _Sequence | None = None) -> Tensor:
        """Logits (M, vocab) float32 of tokens (1, M), or (1, vocab) of the last; the rest of the cache is dropped first."""
        sequence = sequence or self.sequence
        self._require_unchanged()
        if len(tokens.shape) != 2 or tokens.shape[0] != 1:
            raise ShapeError(
                f"tokens have the shape {tuple(tokens.shape)}, but (1, M) is needed: one sequence; run others one by one, or "
                "call specfast.tinygrad.restore"
            )
        if not self.graphs:
            return self._beside(sequence, tokens, start_pos, last=last)
        M = tokens.shape[1]
        fixed, given = isinstance(M, int), isinstance(start_pos, int)
        variables = [value for value, is_number in ((start_pos, given), (M, fixed)) if not is_number]
        for value in variables:
            if not private.is_bound(value):
                raise ShapeError(f"{value} is not a bound variable; bind start_pos and the number of tokens themselves")
        room = M if fixed else int(M.vmax)
        flat = (tokens if fixed else tokens.pad_to((1, room))).reshape(room).cast(dtypes.int32).contiguous()
        out = Tensor.empty(1 if last else room, self.native.vocab, dtype=dtypes.float32, device="CPU")
        call = sequence.call(1 if last else 0, M if fixed else -1, start_pos if given else -1)
        program = private.Program("specfast_forward", _core.GraphForward.function, outs=(0,))
        logits = program([out, sequence.last, flat, call], variables)[0]
        if not private.in_function():
            sequence.last = logits
        return logits if last or fixed else logits.shrink(((0, M), None))

    def _beside(self, sequence: _Sequence, tokens: Tensor, start_pos: Any, *, last: bool) -> Tensor:
        M = tokens.shape[1]
        padded = tokens if isinstance(M, int) else tokens.pad_to((1, int(M.vmax)))
        ids = padded.cast(dtypes.int32).numpy().reshape(-1)[: private.value_of(M)].astype(np.int32)
        cache, start = sequence.cache, private.value_of(start_pos)
        if start > cache.length:
            raise ShapeError(
                f"start position {start} is beyond the {cache.length} positions in the cache; run the tokens before it first"
            )
        cache.truncate(start)
        self._calls_before += 1
        logits = self.native.forward(cache, ids, 1 if last else len(ids))
        cache.commit(len(ids))
        return Tensor(logits)

    def _require_unchanged(self) -> None:
        for weight, was in self._watched:
            if private.identity(weight.tensor) is not was:
                raise ConfigurationError(
                    f"{weight.own_name} has been replaced since the model was accelerated; call specfast.tinygrad.accelerate again"
                )


@dataclass
class _Accelerator:
    """What is kept beside an accelerated model, apart from its own attributes, where tinygrad looks for parameters."""

    path: _Path | MetalPath | None
    reason: str = ""
    jits: tuple[Any, ...] = ()


_accelerators: weakref.WeakKeyDictionary[Any, _Accelerator] = weakref.WeakKeyDictionary()


def accelerate(model: Any, precision: str | None = None) -> Any:
    """Makes a tinygrad model's forward pass one native call on the CPU, on the weights where tinygrad holds them.

    On METAL it becomes the launches of specfast's Metal kernels, each a node of the graph; see MetalPath for what differs.

    The call is a node of tinygrad's graph: lazy, captured and replayed by TinyJit, with the start position, and where it
    is symbolic the number of tokens, as variables; `model(tokens, start_pos, ...)`, `model.generate` and exo's calls work as
    before. A row's logits have the same bits whatever the number of rows. Keys and values lie in a native cache per sequence
    (see `cached_keys_values`); a start position below its length drops the rest: that is the rollback. A pass that cannot be
    (a start position beyond the cache, a full context) gives NaN, and `report` tells why.

    A model that is not supported is left alone: `report` says why. A weight that is replaced later raises.

    Args:
        model: tinygrad.llm's Transformer, or one with the layers of exo's first generation, whose logits are then those
            with its final norm; float32, float16, bfloat16, or a GGUF file's Q4_0, Q4_1, Q8_0, Q4_K, Q5_K and Q6_K.
        precision: of the activations: "int8", "bf16" or "f32" (exact); None chooses by the weights.

    Returns:
        The model itself.

    Raises:
        ConfigurationError: an unknown precision.
    """
    check_precision(precision)
    restore(model)
    try:
        seams = read_seams(model)
        path = MetalPath(seams, precision) if on_metal(seams) else _Path(native_weights(model, seams, precision), seams)
    except SpecfastError as error:
        _accelerators[model] = _Accelerator(None, str(error))
        return model
    accelerator = _accelerators[model] = _Accelerator(path, private.graph_problem())
    stock: Any = type(model)
    model.__class__ = _accelerated(stock, _LlmModel if seams.kind == "llm" else _ExoModel)
    if seams.kind == "llm":
        accelerator.jits = model.prefill_jit, model.rollout_jit
        model.prefill_jit, model.rollout_jit = TinyJit(model.forward), TinyJit(model.forward)
        model._cached_tokens = []
    return model


def restore(model: Any) -> Any:
    """Undoes `accelerate`: the model's own layers run again and read their text anew. Returns the model."""
    accelerator = _accelerators.pop(model, None)
    accelerated: type = type(model)
    if issubclass(accelerated, _Accelerated):
        model.__class__ = accelerated.__bases__[1]
        if accelerator and accelerator.jits:
            model.prefill_jit, model.rollout_jit = accelerator.jits
            model._cached_tokens = []
    return model


def report(model: Any) -> Report:
    """Whether and how a model is accelerated, and if not, why."""
    accelerator = _accelerators.get(model)
    if accelerator is None:
        return Report("stock", "specfast.tinygrad.accelerate has not been called")
    path = accelerator.path
    if path is None:
        return Report("stock", accelerator.reason)
    if isinstance(path, MetalPath):
        return Report("graph", "", path.activations, "metal", path.weight_bytes, dict(path.held), path.native_calls())
    return Report(
        "graph" if path.graphs else "public",
        accelerator.reason,
        path.native.precision,
        path.native.isa,
        path.native.weight_bytes,
        dict(path.held),
        path.native_calls(),
        next((sequence.forward.problem for sequence in path.sequences if sequence.forward.problem), ""),
    )


def native_model_of(model: Any) -> _core.Model | None:
    """The native model behind an accelerated one; None where tinygrad's layers run."""
    accelerator = _accelerators.get(model)
    path = accelerator.path if accelerator else None
    return path.native if isinstance(path, _Path) else None


def logits(model: Any, tokens: Tensor, start_pos: Any) -> Tensor:
    """Logits (1, M, vocab) float32 of all rows of an accelerated model: what checking drafted tokens needs, lazily.

    Args:
        model: accelerated.
        tokens: (1, M), M fixed or one bound variable (up to whose maximum rows are computed).
        start_pos: of the first token: an int or a bound variable.

    Raises:
        UnsupportedModelError: a model that is not accelerated.
    """
    path = _path(model)
    return path.logits(tokens, start_pos, last=False).unsqueeze(0)


def cached_keys_values(model: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Copies of a layer's keys, rotated, and values: (kv_heads, positions, head_dim) as tinygrad's tensors, bfloat16 or at
    precision f32 float32. The native cache has the only others.

    Raises:
        UnsupportedModelError: a model that is not accelerated.
    """
    path = _path(model)
    if isinstance(path, MetalPath):
        return path.cached(layer)
    cache = path.sequence.cache

    def tensor(rows: Any) -> Tensor:
        made = Tensor(rows, device="CPU")
        return made if rows.dtype == np.float32 else made.bitcast(dtypes.bfloat16)

    return tensor(cache.keys(layer)), tensor(cache.values(layer))


def _path(model: Any) -> _Path | MetalPath:
    accelerator = _accelerators.get(model)
    if accelerator is None or accelerator.path is None:
        raise UnsupportedModelError(f"the model is not accelerated: {report(model).reason}")
    return accelerator.path


class _Accelerated:
    """What comes before a model's own class while it is accelerated."""


class _LlmModel(_Accelerated):
    """tinygrad.llm's Transformer: its loop and its sampling, in the graph, on native logits."""

    def forward(self, tokens: Tensor, start_pos: Any, temperature: Tensor) -> Tensor:
        path = _path(self)
        scores = path.logits(tokens, start_pos, last=True) / temperature.maximum(1e-12)
        gumbel = -((-Tensor.rand(*scores.shape, device=scores.device).maximum(1e-12).log()).log())
        return (scores + gumbel).argmax(-1, keepdim=True)

    def __call__(self, tokens: Tensor, start_pos: Any, temperature: Tensor) -> Any:
        if _path(self).graphs:
            return super().__call__(tokens, start_pos, temperature)  # type: ignore[misc]
        return self.forward(
            tokens.contiguous(), start_pos, temperature
        )  # no jit can capture what runs beside its graph


class _ExoModel(_Accelerated):
    """exo's first-generation Transformer: logits (1, M, vocab) for token ids (1, M); a list of caches is a sequence."""

    def __call__(self, x: Tensor, start_pos: Any, cache: Any = None) -> Tensor:
        path = _path(self)
        assert isinstance(path, _Path)
        return path.logits(x, start_pos, last=False, sequence=path.sequence_of(cache)).unsqueeze(0)


@functools.cache
def _accelerated(stock: Any, ours: type) -> type:
    body = {"__doc__": stock.__doc__, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (ours, stock), body)

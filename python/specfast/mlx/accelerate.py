"""Puts specfast's fused forward pass behind the call of an mlx-lm model, and takes it away again."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

from .. import _core
from ..checkpoint import check_precision
from ..errors import ConfigurationError, KernelTrialError, SpecfastError
from . import metal, primitives, trial
from .cache import adopt
from .graph import GraphForward
from .graph import KVCache as GraphKVCache
from .weights import Watch, config_of, native_model

_Name = Literal["native", "primitives", "metal"]


@dataclass(frozen=True)
class Report:
    """What runs when a model is called.

    Attributes:
        path: "native" (one call into specfast's kernels for the whole forward pass), "primitives" (the same kernels as
            primitives of MLX's graph, a few per layer), "metal" (Metal kernels in MLX's graph) or "stock" (mlx-lm's own
            layers).
        reason: why the path is "stock"; "" if it is not.
        precision: of the activations on specfast's paths.
        isa: the instruction set of its kernels; "metal" on a GPU.
        weight_bytes: bytes of weights a pass reads, in MLX's own memory.
        graph_calls: calls that became primitives.
        native_calls: calls that ran as one native call.
        metal_calls: calls that became Metal kernels.
        stock_calls: calls that ran mlx-lm's layers, by reason.
    """

    path: Literal["native", "primitives", "metal", "stock"]
    reason: str = ""
    precision: str | None = None
    isa: str | None = None
    weight_bytes: int = 0
    graph_calls: int = 0
    native_calls: int = 0
    metal_calls: int = 0
    stock_calls: Mapping[str, int] = field(default_factory=dict)


def accelerate(model: nn.Module, precision: str | None = None, path: str | None = None) -> nn.Module:
    """Gives an mlx-lm model a forward pass on specfast's kernels on the CPU, on the weights where MLX holds them.

    `model(inputs, cache=cache)` works as before: logits (1, M, vocab) of all rows for inputs (1, M), always as float32,
    computed when the call returns; a row's logits have the same bits whatever M is. The KV caches it is called with
    become `specfast.mlx.KVCache`, `RotatingKVCache` and `QuantizedKVCache`, in place. A call this path cannot take (several
    sequences, input embeddings, inside a function transformation) runs mlx-lm's layers, and `report` counts it with the
    reason. So does every call once a weight or a module has been replaced; accelerate the model again
    to use the new one. Values written into an array in place are not noticed.

    That is the path of every installation. Where `specfast._mlx` was built for the mlx in use, the forward pass is
    primitives of MLX's graph instead, with the same bits: lazy, on the stream of the call, inside `mx.compile`. The caches
    then become `specfast.mlx.graph.KVCache`; tokens outside the vocabulary give NaN, as no value is looked at before it is
    computed. Calls with other caches take the native path.

    Where MLX's default device is an Apple GPU, the forward pass is specfast's Metal kernels in MLX's graph, through
    `mx.fast.metal_kernel`, in the weights' own type and on mlx-lm's caches; a row's logits have the same bits whatever M is.
    More than 27 rows run mlx-lm's layers. Before that, once for a model, the kernels run a few rows, which reads all weights
    (`specfast.mlx.trial`); where they fail, a RuntimeWarning says how.

    A model that is not supported, or whose Metal kernels failed, is left alone: `report` says why.

    Args:
        model: from `mlx_lm.load`: Llama, Mistral, Qwen2, Qwen2.5 or Qwen3 (dense); MLX affine 4 or
            8 bit at groups of 32, 64 or 128, bf16, f16 or f32.
        precision: of the activations: "int8", "bf16" or "f32" (exact); None chooses by the weights.
        path: "primitives" or "native"; None takes primitives where there are any.

    Returns:
        The model itself.

    Raises:
        ConfigurationError: not a model, an unknown precision or path, or primitives that this installation does not have.
    """
    require_model("model", model)
    check_precision(precision)
    if path not in (None, "native", "primitives"):
        raise ConfigurationError(f"unknown path {path!r}; known: native, primitives")
    if path == "primitives" and primitives.why_not():
        raise ConfigurationError(primitives.why_not())
    on_metal = metal.available() and path is None
    if on_metal and _is_tried(model):
        return model
    restore(model)
    stock: Any = type(model)
    watch, signature = Watch(model), inspect.signature(stock.__call__)
    try:
        made: _FusedPath | _MetalPath
        if on_metal:
            forward = metal.MetalForward(model, config_of(model))
            trial.run(forward, model)
            made = _MetalPath(forward, signature)
        else:
            native = native_model(model, precision)
            whole = path == "native" or any(native.windows)  # the primitives attend to all positions
            graph = None if whole else primitives.graph_of(model, native)
            made = _FusedPath(native, GraphForward(graph, native) if graph else None, signature)
    except KernelTrialError as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        object.__setattr__(model, "_specfast", _Accelerator(None, str(error), watch))
    except SpecfastError as error:
        object.__setattr__(model, "_specfast", _Accelerator(None, str(error)))
    else:
        object.__setattr__(model, "_specfast", _Accelerator(made, watch=watch))  # not in the dict of parameters
        model.__class__ = _accelerated(stock)
    return model


def _is_tried(model: nn.Module) -> bool:
    """Whether the Metal kernels were tried on the weights that the model has, whatever came out."""
    held = vars(model).get("_specfast")
    return bool(held and not isinstance(held.path, _FusedPath) and held.watch and held.watch.unchanged(model))


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`: the model is as it was, to the bit, and keeps nothing of specfast's. Returns the model.

    Raises:
        ConfigurationError: not a model.
    """
    require_model("model", model)
    if isinstance(model, _Accelerated):
        model.__class__ = type(model).__bases__[1]
    if "_specfast" in vars(model):
        object.__delattr__(model, "_specfast")
    return model


def report(model: nn.Module) -> Report:
    """Whether and how a model is accelerated, and if not, why.

    Raises:
        ConfigurationError: not a model.
    """
    require_model("model", model)
    accelerator = vars(model).get("_specfast")
    return accelerator.report() if accelerator else Report("stock", "specfast.mlx.accelerate has not been called")


def require_model(name: str, model: Any) -> None:
    """Checks that it is an mlx-lm model.

    Raises:
        ConfigurationError: it is something else.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{name} is {model!r:.100}, but must be a model, as mlx_lm.load gives")


def native_model_of(model: nn.Module) -> _core.Model | None:
    """The native model behind an accelerated one; None where mlx-lm's layers would run."""
    accelerator = vars(model).get("_specfast")
    path = accelerator.path if accelerator else None
    return path.native if isinstance(path, _FusedPath) and accelerator.watch.unchanged(model) else None


class _Accelerated:
    """What comes before a model's own class while it is accelerated."""

    _specfast: _Accelerator

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles have the model's own class."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        _, (kind, *given), *state = reduced
        return _made, (kind.__bases__[1], *given), *state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        logits = self._specfast.forward(self, args, kwargs)
        return super().__call__(*args, **kwargs) if logits is None else logits  # type: ignore[misc]


def _made(kind: Any, *given: Any) -> Any:
    return kind.__new__(kind, *given)


@functools.cache
def _accelerated(stock: Any) -> type:
    body = {"__doc__": stock.__doc__, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (_Accelerated, stock), body)


@dataclass(frozen=True)
class _FusedPath:
    """A native model over a model's arrays, and its primitives if there are any."""

    native: _core.Model
    graph: GraphForward | None
    signature: inspect.Signature

    def run(self, inputs: mx.array, caches: Any) -> tuple[_Name, mx.array] | str:
        """The path taken and the logits (1, M, vocab), or why mlx-lm's layers must run."""
        if self.graph and mx.default_device() == mx.cpu and self.graph.takes(caches):
            return "primitives", self.graph(inputs, caches)
        return self._natively(inputs, caches)

    def _natively(self, inputs: mx.array, caches: Any) -> tuple[_Name, mx.array] | str:
        try:
            mx.eval(inputs)
        except ValueError:  # a placeholder has no values
            return "inside a function transformation"
        tokens = np.asarray(inputs)[0].astype(np.int32)
        if caches is None:
            return "native", self._logits(_core.Cache(self.native), tokens)
        for cache in caches:
            if type(cache) is GraphKVCache:
                cache.become_stock()
        store = adopt(self.native, caches)
        if isinstance(store, str):
            return store
        logits = self._logits(store.cache, tokens)
        store.cache.commit(len(tokens))
        for cache in caches:
            cache.offset += len(tokens)
        return "native", logits

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of this path."""
        native = self.native
        shared = {"precision": native.precision, "isa": native.isa, "weight_bytes": native.weight_bytes}
        return {"path": "primitives" if self.graph else "native", **shared}

    def _logits(self, cache: _core.Cache, tokens: npt.NDArray[np.int32]) -> mx.array:
        logits = mx.zeros((1, len(tokens), self.native.vocab), mx.float32)
        mx.eval(logits)  # now it has memory, which is ours alone until it is returned
        self.native.forward_into(cache, tokens, np.asarray(logits)[0])
        return logits


@dataclass(frozen=True)
class _MetalPath:
    """A model's weights as the Metal kernels take them."""

    forward: metal.MetalForward
    signature: inspect.Signature

    def run(self, inputs: mx.array, caches: Any) -> tuple[_Name, mx.array] | str:
        """The path taken and the logits (1, M, vocab), or why mlx-lm's layers must run."""
        caches = self.forward.new_caches() if caches is None else caches
        reason = self.forward.why_not(inputs, caches)
        return reason or ("metal", self.forward(inputs, caches))

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of this path."""
        forward = self.forward
        return {"path": "metal", "precision": forward.activations, "isa": "metal", "weight_bytes": forward.weight_bytes}


def _rows_and_caches(
    signature: inspect.Signature, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[mx.array, Any] | str:
    """The inputs (1, M) and the caches or None of a call, or why neither of specfast's paths takes it."""
    given = {k: v for k, v in signature.bind(model, *args, **kwargs).arguments.items() if v is not None}
    extra = set(given) - {"self", "inputs", "cache"}
    if extra:
        return f"called with {', '.join(sorted(extra))}"
    inputs = given["inputs"]
    if inputs.ndim != 2 or inputs.shape[0] != 1 or inputs.shape[1] < 1:
        return f"inputs of shape {tuple(inputs.shape)}; supported: (1, M)"
    return inputs, given.get("cache")


class _Accelerator:
    """What an accelerated model carries: its path or the reason why there is none, and counters.

    `watch` is of the weights that the path, or the failure of its trial, is about.
    """

    def __init__(self, path: _FusedPath | _MetalPath | None, reason: str = "", watch: Watch | None = None) -> None:
        self.path, self._reason, self.watch = path, reason, watch
        self._calls: Counter[_Name] = Counter()
        self._stock_calls: Counter[str] = Counter()

    def __reduce__(self) -> Any:
        """A copy of a model has arrays of its own."""
        return _Accelerator, (None, "this is a copy of an accelerated model; call specfast.mlx.accelerate on it")

    def report(self) -> Report:
        counted = Report(
            "stock",
            self._reason,
            graph_calls=self._calls["primitives"],
            native_calls=self._calls["native"],
            metal_calls=self._calls["metal"],
            stock_calls=dict(self._stock_calls),
        )
        return replace(counted, **self.path.facts) if self.path else counted

    def forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array | None:
        """The logits, or None where mlx-lm's layers must run."""
        if self.watch and not self.watch.unchanged(model):
            self.path = self.watch = None  # lets go of the old weights
            self._reason = "a weight or module has been replaced; call specfast.mlx.accelerate again"
        done = self._run(self.path, model, args, kwargs) if self.path else self._reason
        if isinstance(done, str):
            self._stock_calls[done] += 1
            return None
        name, logits = done
        self._calls[name] += 1
        return logits

    @staticmethod
    def _run(
        path: _FusedPath | _MetalPath, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_Name, mx.array] | str:
        given = _rows_and_caches(path.signature, model, args, kwargs)
        return given if isinstance(given, str) else path.run(*given)

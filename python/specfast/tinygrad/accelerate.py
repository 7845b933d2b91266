"""Puts specfast's fused forward pass behind the call of a tinygrad model, and takes it away again."""

from __future__ import annotations

import functools
import operator
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, TinyJit, dtypes

from .. import _core
from ..checkpoint import check_precision
from ..config import require_whole
from ..errors import (
    ConfigurationError,
    KernelTrialError,
    NumericalError,
    ShapeError,
    SpecfastError,
    UnsupportedModelError,
)
from . import private, trial
from .metal import MetalPath
from .weights import NativeWeights, native_weights, on_metal, read_seams, weights_of


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
        notice: what of its file a model leaves out; "" if nothing.
    """

    path: Literal["graph", "public", "stock"]
    reason: str = ""
    precision: str | None = None
    isa: str | None = None
    weight_bytes: int = 0
    weights: Mapping[str, int] = field(default_factory=dict)
    native_calls: int = 0
    problem: str = ""
    notice: str = ""


class _Sequence:
    """One sequence's native cache, as graphs call it.

    `last` are the logits of its last pass, which the next one reads in the graph (and nowhere else): so passes run in the order
    in which they were called, whichever is realised first, and none twice.
    """

    def __init__(self, native: _core.Model) -> None:
        self.cache, self.vocab = _core.Cache(native), native.vocab
        self.forward = _core.GraphForward(native, self.cache)
        self.last = Tensor(np.zeros(1, np.int64), device="CPU").clone().realize()

    def settle(self) -> None:
        """Computes the passes that were asked for and are not yet."""
        self.last.realize()
        private.synchronize()


class _Watch:
    """Tells whether a model's parameters are those that were read; where the native model has copies, also their memory."""

    def __init__(self, model: Any, kind: str, vectors: Mapping[str, npt.NDArray[np.uint8]]) -> None:
        self._kind, self._was = kind, self._identities(model, kind)
        self._vectors = {name: (memory, memory.copy()) for name, memory in vectors.items()}

    @staticmethod
    def _identities(model: Any, kind: str) -> dict[str, Any]:
        return {weight.own_name: private.identity(weight.tensor) for weight in weights_of(model, kind)}

    def require_unchanged(self, model: Any) -> None:
        """Raises ConfigurationError where one was replaced, or a copied one changed in place."""
        now, was = self._identities(model, self._kind), self._was
        changed = [name for name in {**was, **now} if now.get(name) is not was.get(name)]
        if self._vectors:
            private.synchronize()
            changed += [name for name, (memory, old) in self._vectors.items() if not np.array_equal(memory, old)]
        if changed:
            raise ConfigurationError(
                f"{changed[0]} has been replaced or changed since the model was accelerated; call "
                "specfast.tinygrad.accelerate again"
            )


class _Path:
    """A native model over a model's tensors, for as long as these are the model's."""

    def __init__(self, weights: NativeWeights, kind: str) -> None:
        self.native, self.held, self.kind = weights.model, weights.held, kind
        self.max_context, self.vocab, self.layers = self.native.max_context, self.native.vocab, self.native.layers
        self.graphs = not private.graph_problem()
        self.sequence = _Sequence(self.native)
        self._of_caches: dict[int, tuple[Any, _Sequence]] = {}
        self._calls_before = 0

    @property
    def sequences(self) -> list[_Sequence]:
        return [self.sequence, *(sequence for _, sequence in self._of_caches.values())]

    def native_calls(self) -> int:
        return self._calls_before + sum(sequence.forward.calls for sequence in self.sequences)

    def problem(self) -> str:
        """Of the last pass of all sequences."""
        return max((sequence.forward for sequence in self.sequences), key=lambda each: each.last_call).problem

    def settle(self) -> None:
        """Computes the passes that were asked for and are not yet."""
        if self.graphs:
            self.sequence.settle()

    def sequence_of(self, caches: Any) -> _Sequence:
        """The sequence whose keys and values a list of a host's own cache tensors stands for."""
        if caches is None or not isinstance(caches, list | tuple):
            return self.sequence
        if not caches:
            raise ShapeError(
                "cache is an empty list; give a tensor for each layer, or None for the model's one sequence"
            )
        if caches[0] is None:
            return self.sequence
        key = id(caches[0])
        if key not in self._of_caches or self._of_caches[key][0]() is not caches[0]:
            for old, (reference, sequence) in list(self._of_caches.items()):
                if reference() is None:
                    self._calls_before += sequence.forward.calls
                    del self._of_caches[old]
            self._of_caches[key] = (weakref.ref(caches[0]), _Sequence(self.native))
        return self._of_caches[key][1]

    def logits(self, tokens: Tensor, start_pos: Any, *, last: bool, caches: Any = None) -> Tensor:
        """Logits (M, vocab) float32 of tokens (1, M), or (1, vocab) of the last; the rest of the cache is dropped first."""
        sequence = self.sequence_of(caches)
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
        out = Tensor.empty(1 if last else room, self.vocab, dtype=dtypes.float32, device="CPU")
        forward, ordered = sequence.forward, not private.in_function()
        number = forward.built + 1 if ordered else 0
        call = [forward.number, self.vocab, 1 if last else 0, M if fixed else -1, start_pos if given else -1, number]
        program = private.Program("specfast_forward", _core.GraphForward.function, outs=(0,))
        told = Tensor(np.array(call, dtype=np.int64), device="CPU")
        logits = program([out, sequence.last, flat, told], variables)[0]
        if ordered:
            sequence.last, forward.built = logits, number
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
        if not np.isfinite(logits).all():
            raise NumericalError("the logits are not finite; the weights hold NaN, or values too large for them")
        return Tensor(logits)


@dataclass
class _Accelerator:
    """What is kept beside an accelerated model, apart from its own attributes, where tinygrad looks for parameters.

    `calls` is how many passes there had been when model.generate last gave a token: after others its cache is another's.
    """

    path: _Path | MetalPath | None
    watch: _Watch | None = None
    reason: str = ""
    calls: int = 0


_accelerators: weakref.WeakKeyDictionary[Any, _Accelerator] = weakref.WeakKeyDictionary()
_notices: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def require_model(name: str, model: Any) -> None:
    """Checks that it can be a tinygrad model.

    Raises:
        ConfigurationError: it is a number, text or the like.
    """
    try:
        hash(weakref.ref(model))
    except TypeError:
        raise ConfigurationError(
            f"{name} is {model!r:.100}, but must be a tinygrad model, such as specfast.tinygrad.load_gguf gives"
        ) from None


def note(model: Any, notice: str) -> None:
    """Has a model's reports say what of its file it leaves out."""
    _notices[model] = notice


def accelerate(model: Any, precision: str | None = None) -> Any:
    """Makes a tinygrad model's forward pass one native call on the CPU, on the weights where tinygrad holds them.

    On METAL it becomes the launches of specfast's Metal kernels, each a node of the graph; see MetalPath for what differs.

    The call is a node of tinygrad's graph: lazy, captured and replayed by TinyJit, with the start position, and where it
    is symbolic the number of tokens, as variables; `model(tokens, start_pos, ...)`, `model.generate` and exo's calls work as
    before. A row's logits have the same bits whatever the number of rows. Keys and values lie in a native cache per sequence
    (see `cached_keys_values`); a start position below its length drops the rest: that is the rollback. A pass that cannot be
    (a start position beyond the cache, a full context) gives NaN, and `report` tells why.

    A model that is not supported is left alone: `report` says why. A weight that is replaced later raises in the next call
    from Python; a captured graph goes on with those it was captured with. Matrices are followed when they are changed in
    place; norms and biases, of which there are copies, raise.

    Args:
        model: tinygrad.llm's Transformer, or one with the layers of exo's first generation, whose logits are then those
            with its final norm; float32, float16, bfloat16, or a GGUF file's Q4_0, Q4_1, Q8_0, Q4_K, Q5_K and Q6_K.
        precision: of the activations: "int8", "bf16" or "f32" (exact); None chooses by the weights.

    Returns:
        The model itself.

    Raises:
        ConfigurationError: an unknown precision, or what is no model.
    """
    require_model("model", model)
    check_precision(precision)
    restore(model)
    vectors: Mapping[str, npt.NDArray[np.uint8]] = {}
    try:
        seams = read_seams(model)
        path: _Path | MetalPath
        if on_metal(seams):
            path = MetalPath(seams, precision)
            trial.run(path, model)
        else:
            weights = native_weights(model, seams, precision)
            path, vectors = _Path(weights, seams.kind), weights.vectors
    except SpecfastError as error:
        if isinstance(error, KernelTrialError):
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        _accelerators[model] = _Accelerator(None, reason=str(error))
        return model
    _accelerators[model] = _Accelerator(path, _Watch(model, seams.kind, vectors), private.graph_problem())
    stock: Any = type(model)
    model.__class__ = _accelerated(stock, _LlmModel if seams.kind == "llm" else _ExoModel)
    _forget(model)
    return model


def restore(model: Any) -> Any:
    """Undoes `accelerate`: the model's own layers run again, are captured and read their text anew. Weights that tinygrad had
    only as a computation, and that were realised, stay realised. Returns the model."""
    require_model("model", model)
    _accelerators.pop(model, None)
    accelerated: type = type(model)
    if issubclass(accelerated, _Accelerated):
        model.__class__ = accelerated.__bases__[1]
        _forget(model)
    return model


def _forget(model: Any) -> None:
    """Lets go of the graphs and of the text that tinygrad.llm's Transformer keeps."""
    if hasattr(model, "prefill_jit"):
        model.prefill_jit, model.rollout_jit = TinyJit(model.forward), TinyJit(model.forward)
        model._cached_tokens = []


def report(model: Any) -> Report:
    """Whether and how a model is accelerated, and if not, why."""
    require_model("model", model)
    accelerator, notice = _accelerators.get(model), _notices.get(model, "")
    if accelerator is None:
        return Report("stock", "specfast.tinygrad.accelerate has not been called", notice=notice)
    path = accelerator.path
    if path is None:
        return Report("stock", accelerator.reason, notice=notice)
    private.synchronize()
    if isinstance(path, MetalPath):
        held, calls = dict(path.held), path.native_calls()
        return Report("graph", "", path.activations, "metal", path.weight_bytes, held, calls, notice=notice)
    return Report(
        "graph" if path.graphs else "public",
        accelerator.reason,
        path.native.precision,
        path.native.isa,
        path.native.weight_bytes,
        dict(path.held),
        path.native_calls(),
        path.problem(),
        notice,
    )


def native_model_of(model: Any) -> _core.Model | None:
    """The native model behind an accelerated one; None where tinygrad's layers run.

    Raises:
        ConfigurationError: a weight was replaced since.
    """
    if report(model).path == "stock":
        return None
    path = _path(model)
    return path.native if isinstance(path, _Path) else None


def logits(model: Any, tokens: Tensor, start_pos: Any) -> Tensor:
    """Logits (1, M, vocab) float32 of all rows of an accelerated model: what checking drafted tokens needs, lazily.

    Args:
        model: accelerated.
        tokens: (1, M), M fixed or one bound variable (up to whose maximum rows are computed).
        start_pos: of the first token: an int or a bound variable.

    Raises:
        UnsupportedModelError: a model that is not accelerated.
        ConfigurationError: a weight was replaced since it was.
        ShapeError: no tokens, several sequences, or a start position outside the context.
    """
    return _logits(model, tokens, start_pos, last=False).unsqueeze(0)


def _logits(model: Any, tokens: Any, start_pos: Any, *, last: bool, caches: Any = None) -> Tensor:
    path = _path(model)
    if not isinstance(tokens, Tensor) or not dtypes.is_int(tokens.dtype):
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ShapeError(f"tokens are {kind}, but a Tensor (1, M) of whole numbers is needed")
    if len(tokens.shape) != 2 or tokens.shape[0] != 1:
        raise ShapeError(
            f"tokens have the shape {tuple(tokens.shape)}, but (1, M) is needed: one sequence; run others one by one, or "
            "call specfast.tinygrad.restore"
        )
    if isinstance(tokens.shape[1], int) and tokens.shape[1] == 0:
        raise ShapeError("tokens have the shape (1, 0), but a pass needs at least 1")
    if not private.is_symbolic(start_pos):
        start_pos = _position(start_pos, path.max_context)
    given = {"caches": caches} if isinstance(path, _Path) else {}
    return path.logits(tokens, start_pos, last=last, **given)


def _position(start_pos: Any, context: int) -> int:
    try:
        number = operator.index(start_pos)
    except TypeError:
        raise ShapeError(f"start_pos is {start_pos!r:.100}, but must be a whole number or a bound variable") from None
    if not 0 <= number < context:
        raise ShapeError(f"start_pos is {number}, but must be 0 to {context - 1}")
    return number


def cached_keys_values(model: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Copies of a layer's keys, rotated, and values: (kv_heads, positions, head_dim) as tinygrad's tensors, bfloat16 or at
    precision f32 float32. The native cache has the only others.

    Raises:
        UnsupportedModelError: a model that is not accelerated.
        ConfigurationError: a layer that the model does not have, or a weight that was replaced.
    """
    path = _path(model)
    require_whole("layer", layer, 0, path.layers - 1)
    if isinstance(path, MetalPath):
        return path.cached(layer)
    path.settle()
    cache = path.sequence.cache

    def tensor(rows: Any) -> Tensor:
        made = Tensor(rows, device="CPU")
        return made if rows.dtype == np.float32 else made.bitcast(dtypes.bfloat16)

    return tensor(cache.keys(layer)), tensor(cache.values(layer))


def _path(model: Any) -> _Path | MetalPath:
    """What runs an accelerated model, once its weights are known to be those that were read."""
    require_model("model", model)
    accelerator = _accelerators.get(model)
    if accelerator is None or accelerator.path is None or accelerator.watch is None:
        raise UnsupportedModelError(f"the model is not accelerated: {report(model).reason}")
    accelerator.watch.require_unchanged(model)
    return accelerator.path


class _Accelerated:
    """What comes before a model's own class while it is accelerated."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigurationError(
            "an accelerated model cannot be copied or pickled; call specfast.tinygrad.restore first, and accelerate the copy"
        )


class _LlmModel(_Accelerated):
    """tinygrad.llm's Transformer: its loop and its sampling, in the graph, on native logits."""

    def forward(self, tokens: Tensor, start_pos: Any, temperature: Tensor) -> Tensor:
        scores = _logits(self, tokens, start_pos, last=True) / temperature.maximum(1e-12)
        gumbel = -((-Tensor.rand(*scores.shape, device=scores.device).maximum(1e-12).log()).log())
        return (scores + gumbel).argmax(-1, keepdim=True)

    def __call__(self, tokens: Tensor, start_pos: Any, temperature: Tensor) -> Any:
        path = _path(self)
        if not path.graphs:  # no jit can capture what runs beside its graph
            return self.forward(tokens.contiguous(), start_pos, temperature)
        before = path.native_calls()
        found = super().__call__(tokens, start_pos, temperature)  # type: ignore[misc]
        private.synchronize()
        if isinstance(path, _Path) and path.problem() and path.native_calls() != before:
            raise NumericalError(f"no token follows: {path.problem()}")
        return found

    def generate(self, tokens: list[int], *options: Any, **named: Any) -> Iterator[int]:
        path, accelerator = _path(self), _accelerators[self]
        path.settle()
        if path.native_calls() != accelerator.calls:
            self._cached_tokens: list[int] = []  # what the cache holds now is another text
        for token in super().generate(tokens, *options, **named):  # type: ignore[misc]
            if not 0 <= token < path.vocab:
                raise NumericalError("no token follows: the logits are not finite")
            calls = accelerator.calls = path.native_calls()
            yield token
            if _accelerators.get(self) is not accelerator or path.native_calls() != calls:
                raise ConfigurationError(
                    "the model was called, accelerated or restored while model.generate was under way, and there is one cache: end "
                    "one text before the next begins; specfast.tinygrad.generate has a cache for each"
                )


class _ExoModel(_Accelerated):
    """exo's first-generation Transformer: logits (1, M, vocab) for token ids (1, M); a list of caches is a sequence."""

    def __call__(self, x: Tensor, start_pos: Any, cache: Any = None) -> Tensor:
        return _logits(self, x, start_pos, last=False, caches=cache).unsqueeze(0)


@functools.cache
def _accelerated(stock: Any, ours: type) -> type:
    body = {"__doc__": stock.__doc__, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (ours, stock), body)

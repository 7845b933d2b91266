"""Ranges of a model's layers that a ring's nodes run: in specfast's own decoder, or in MLX as exo's own shards have them.

MLX has them where it has a GPU, or where the native decoder does not know the architecture. What travels between ranges is
(M, hidden) float32 either way, so that one ring may have both.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .. import _core
from ..architecture import ConfigReader, eos_ids, read_config, read_json
from ..checkpoint import LoadedModel, load_model
from ..errors import ContextFullError, KernelTrialError, ModelFormatError, SpecfastError, UnsupportedModelError
from ..targets import judge
from .contract import differences
from .hosts import host_named, on_apple_gpu

SHARDS = "exo.inference.mlx.sharded_utils"
TRIAL_LIMIT = 0.1
"""Of the largest value: far more than rounding differs, far less than a wrong mask does."""
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class Positions(Protocol):
    """What a range keeps of a request: `length` positions for good, and `provisional` ones of the last rows."""

    @property
    def length(self) -> int: ...
    @property
    def provisional(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    def commit(self, kept: int) -> None: ...
    def rollback(self) -> None: ...


class Layers(Protocol):
    """A range of layers.

    Attributes:
        layers: which.
        model: whose; a `_core.Model`, or MlxLayers themselves, for its vocab and max_context.
    """

    layers: range
    model: Any

    def new_cache(self, capacity: int) -> Any:
        """Positions of a new request, at most so many."""

    def forward(self, cache: Any, rows: npt.NDArray[np.int32] | npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Appends rows provisionally: token ids (M,) int32 for the first range, else (M, hidden) float32 of the one before.

        Returns:
            (M, hidden) float32 for the range that follows.
        """

    def read(self, cache: Any, rows: npt.NDArray[np.float32]) -> None:
        """forward by the last range, whose rows nobody needs."""

    def verify(
        self, cache: Any, rows: npt.NDArray[np.float32], drafted: Sequence[int], law: _core.Law, seed: int, rule: str
    ) -> _core.Verdict:
        """forward by the last range, and what its logits say of the drafted tokens, whose rows come last."""


class NativeLayers:
    """A range in specfast's own decoder: the bits of the whole model."""

    def __init__(self, model: _core.Model, layers: range) -> None:
        self.model, self.layers = model, layers

    def new_cache(self, capacity: int) -> _core.Cache:
        return _core.Cache(self.model, min(capacity, self.model.max_context))

    def forward(
        self, cache: _core.Cache, rows: npt.NDArray[np.int32] | npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        return self.model.forward_range(cache, rows)

    def read(self, cache: _core.Cache, rows: npt.NDArray[np.float32]) -> None:
        self.verify(cache, rows, (), _core.Law(temperature=0.0), 0, "token")

    def verify(
        self,
        cache: _core.Cache,
        rows: npt.NDArray[np.float32],
        drafted: Sequence[int],
        law: _core.Law,
        seed: int,
        rule: str,
    ) -> _core.Verdict:
        proposal = _core.Proposal()
        proposal.set_tokens(np.asarray(drafted, dtype=np.int32))
        return self.model.verify_range(cache, rows, proposal, law, seed, 0, rule)


class MlxPositions:
    """Positions in MLX's caches of a range: the newest ones can be dropped."""

    def __init__(self, caches: Sequence[Any], capacity: int) -> None:
        self.caches, self.capacity = caches, capacity
        self.length = self.provisional = 0

    def commit(self, kept: int) -> None:
        for cache in self.caches:
            cache.trim(self.provisional - kept)
        self.length, self.provisional = self.length + kept, 0

    def rollback(self) -> None:
        self.commit(0)


class MlxLayers:
    """A range as one of exo's own MLX shards. Everything in the thread that loaded it.

    The bits of a row are MLX's, which may depend on how many rows are beside it. Some of exo's models mask rows as if they were
    the text's first ones; where a trial finds that, rows that follow others run one by one. On an Apple GPU few rows run on
    specfast's Metal kernels, where these have the layers and pass their own trial.

    Args:
        module: exo's shard of the model.
        layers: of the range.
        facts: the model's config.json.

    Raises:
        ModelFormatError: sizes that cannot be.
        UnsupportedModelError: caches that cannot drop positions.
    """

    def __init__(self, module: Any, layers: range, facts: ConfigReader) -> None:
        self.layers, self.model, self._module = layers, self, module
        self.vocab, self._hidden = (facts.integer(name, 1, 1 << 24) for name in ("vocab_size", "hidden_size"))
        self.max_context = facts.integer("max_position_embeddings", 1, 1 << 30, 8192)
        requests = importlib.import_module("specfast.mlx.requests")
        dtype = requests.dtype_name(module)
        self.precision = _PRECISIONS.get(dtype, dtype)
        self._mx = importlib.import_module("mlx.core")
        self._dtype = getattr(self._mx, dtype)
        self._kernels: Any = None
        self._at_once = True
        self._at_once = self._several_are_like_one_by_one()

    @classmethod
    def load(cls, directory: Path, name: str, layers: range, total: int) -> MlxLayers:
        """Loads a range of a model's `total` layers, by exo's own loader.

        Raises:
            UnsupportedModelError: exo has no shards of it, or this exo loads them otherwise.
            ModelFormatError: files that cannot be loaded.
        """
        try:
            shards = importlib.import_module(SHARDS)
        except ImportError as error:
            raise UnsupportedModelError(
                f"{name} needs exo's MLX layers, which cannot be imported here ({error})"
            ) from None
        if wrong := differences(shards):
            raise UnsupportedModelError(f"this exo loads its MLX layers otherwise than known: {'; '.join(wrong)}")
        shard = importlib.import_module("exo.inference.shard").Shard(name, layers.start, layers.stop - 1, total)
        facts = read_json(directory / "config.json")
        facts = {**facts, **(facts.get("text_config") or {})}
        try:
            module = shards.load_model_shard(directory, shard)
        except (ValueError, KeyError, TypeError, FileNotFoundError, RuntimeError) as error:
            text = str(error).strip() or type(error).__name__
            kind = UnsupportedModelError if "not supported" in text else ModelFormatError
            raise kind(
                f"{directory}: exo cannot load layers {layers.start} to {layers.stop - 1} in MLX ({text})"
            ) from None
        made = cls(module, layers, ConfigReader(directory / "config.json", facts))
        made._take_kernels(directory)
        return made

    def _take_kernels(self, directory: Path) -> None:
        metal = importlib.import_module("specfast.mlx.metal")
        if not metal.available() or not _is_known(directory):
            return
        try:
            kernels = metal.MetalForward(self._module, read_config(directory), self.layers)
            importlib.import_module("specfast.mlx.trial").run(kernels, self._module)
        except KernelTrialError as error:
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        except SpecfastError:  # layers for which there are no kernels
            return
        else:
            self._kernels = kernels

    def new_cache(self, capacity: int) -> MlxPositions:
        caches = importlib.import_module("mlx_lm.models.cache")
        own = caches.make_prompt_cache(self._module)[self.layers.start : self.layers.stop]
        if kinds := {type(cache).__name__ for cache in own if type(cache) is not caches.KVCache}:
            raise UnsupportedModelError(
                f"layers {self.layers.start} to {self.layers.stop - 1} have caches of type {', '.join(sorted(kinds))}, and a ring needs "
                "ones that can drop their newest positions (KVCache)"
            )
        return MlxPositions(own, min(capacity, self.max_context))

    def forward(
        self, cache: MlxPositions, rows: npt.NDArray[np.int32] | npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        hidden = self._run(cache, rows)
        return np.asarray(hidden.astype(self._mx.float32))

    def read(self, cache: MlxPositions, rows: npt.NDArray[np.float32]) -> None:
        self._run(cache, rows)

    def verify(
        self,
        cache: MlxPositions,
        rows: npt.NDArray[np.float32],
        drafted: Sequence[int],
        law: _core.Law,
        seed: int,
        rule: str,
    ) -> _core.Verdict:
        tokens = np.asarray(drafted, dtype=np.int32)
        first = cache.length + len(rows) - len(tokens)  # position of the first token that is decided
        logits = np.asarray(self._run(cache, rows)[-len(tokens) - 1 :].astype(self._mx.float32))
        return judge(logits, tokens, None, first, 0, law, seed, rule)

    def _run(self, cache: MlxPositions, rows: npt.NDArray[Any]) -> Any:
        """What the module gives for rows, (M, hidden or vocab), evaluated; the rows are provisional."""
        mx = self._mx
        if cache.length + len(rows) > cache.capacity:
            raise ContextFullError(
                f"{len(rows)} rows after {cache.length} do not fit into a cache of {cache.capacity} positions; shorten the prompt"
            )
        cache.rollback()
        x = mx.array(rows) if rows.dtype == np.int32 else mx.array(rows).astype(self._dtype)
        # Layers of other nodes hand rows on and touch no cache, but exo's masks look at the first one's.
        every = [cache.caches[0]] * len(self._module.layers)
        every[self.layers.start : self.layers.stop] = cache.caches
        step = len(rows) if self._at_once or cache.length == 0 else 1
        try:
            if self._kernels and not self._kernels.why_not(x[None], cache.caches):
                out = self._kernels(x[None], cache.caches)[0]
            else:
                parts = [self._module(x[None, at : at + step], cache=every)[0] for at in range(0, len(rows), step)]
                out = parts[0] if len(parts) == 1 else mx.concatenate(parts)
            mx.eval(out, [(each.keys, each.values) for each in cache.caches])
        except BaseException:
            for each in cache.caches:
                each.trim(each.offset - cache.length)
            raise
        cache.provisional = len(rows)
        return out

    def _several_are_like_one_by_one(self) -> bool:
        """Whether two rows after two others come out as they do one after the other."""
        mx = self._mx
        rows: npt.NDArray[Any] = np.arange(4, dtype=np.int32) % self.vocab
        if self.layers.start > 0:
            rows = np.asarray(mx.random.normal((4, self._hidden), key=mx.random.key(0)))
        found = []
        for sizes in ((2, 2), (2, 1, 1)):
            cache, out, at = self.new_cache(4), [], 0
            for size in sizes:
                try:
                    out.append(np.asarray(self._run(cache, rows[at : at + size]).astype(mx.float32)))
                except (ValueError, RuntimeError):  # MLX cannot bring mask and keys together
                    return False
                cache.commit(size)
                at += size
            found.append(np.concatenate(out)[2:])
        several, singly = found
        return float(np.abs(several - singly).max()) <= TRIAL_LIMIT * float(np.abs(singly).max())


class _Facts(NamedTuple):
    """What an engine asks of a model's configuration."""

    vocab: int
    eos_ids: tuple[int, ...]


class LayersHost:
    """Loads ranges, natively or in MLX.

    Args:
        name: of the model in exo.
        total: its layers.
        engine: the target engine that was typed, anywhere in the ring; None is the best here.

    Attributes:
        name: where the range loaded last runs: "native" or "mlx".
    """

    def __init__(self, model: str, total: int, engine: str | None) -> None:
        self.name = "native"
        self._model, self._total, self._engine = model, total, engine

    def load(self, directory: Path, *, layers: range, precision: str | None = None, **options: Any) -> LoadedModel:
        """Loads a range, in the thread that will compute.

        Args:
            precision, options: as `checkpoint.load_model` takes them; MLX has the weights' own precision.

        Raises:
            SpecfastError: it cannot be loaded here.
        """
        if host_named(self._engine) == "mlx" and (on_apple_gpu() or not _is_known(directory)):
            self.name = "mlx"
            found: Any = MlxLayers.load(directory, self._model, layers, self._total)
            facts: Any = _Facts(found.vocab, eos_ids(directory, read_json(directory / "config.json"), found.vocab))
            return LoadedModel(found, facts, directory, found.precision, ())
        self.name = "native"
        return load_model(directory, layers=layers, precision=precision, **options)


def as_layers(model: Any, layers: range) -> Layers:
    """A model that LayersHost loaded, as a range."""
    return model if isinstance(model, MlxLayers) else NativeLayers(model, layers)


def _is_known(directory: Path) -> bool:
    """Whether the native decoder has the architecture."""
    try:
        read_config(directory)
    except UnsupportedModelError:
        return False
    return True

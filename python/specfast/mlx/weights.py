"""An mlx-lm model's weights as a native model: checked, and used where MLX holds them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from .. import _core
from ..architecture import SUPPORTED_MODELS, ModelConfig, Quantisation, parse_config
from ..checkpoint import build_model
from ..errors import UnsupportedModelError
from ..safetensors_file import TensorView

_MODELS = ("mlx_lm.models.llama", "mlx_lm.models.qwen2", "mlx_lm.models.qwen3")
_MODULES = ("Linear", "QuantizedLinear", "Embedding", "QuantizedEmbedding", "RMSNorm", "RoPE", "Llama3RoPE")
_DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}
_UNBOUNDED = 1 << 28  # positions: mlx-lm's caches have no end either


def native_model(model: nn.Module, precision: str | None) -> _core.Model:
    """A native model over the memory of an mlx-lm model's arrays.

    The memory is kept for as long as the native model lives, whatever becomes of the arrays. Only norms and biases are
    copied (as float32).

    Raises:
        UnsupportedModelError, ModelFormatError, ShapeError: an architecture, a module or a format that the native decoder
            does not have.
    """
    if mx.default_device() != mx.cpu:
        raise UnsupportedModelError("MLX's default device is a GPU; this path needs mx.set_default_device(mx.cpu)")
    config = config_of(model)
    return build_model(_source(model), config, _tensors(model), precision=precision, max_context=_UNBOUNDED)


def config_of(model: nn.Module) -> ModelConfig:
    """The configuration of a model all of whose modules are known.

    Raises:
        UnsupportedModelError, ModelFormatError: an architecture or a module that specfast's kernels do not have.
    """
    source = _source(model)
    if type(model).__module__ not in _MODELS:
        raise UnsupportedModelError(f"{source} is not supported; supported: {SUPPORTED_MODELS}")
    quantised = {}
    for path, module in model.named_modules():
        _check_module(source, path, module)
        if hasattr(module, "group_size"):
            quantised[path] = (module.bits, module.group_size)
    # mlx-lm gives a window to the layers whose layer_types say so, and to no others of a Mistral config with a window
    config = parse_config(source, {**vars(model.args), "sliding_window": None, "layer_types": None})
    windows = tuple(model.model.sliding_window if _slides(layer) else 0 for layer in model.layers)
    return replace(config, windows=windows, quantisation=Quantisation(0, 0, quantised))


def _source(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__name__}"


def _check_module(source: str, path: str, module: nn.Module) -> None:
    kind = type(module)
    own = kind.__module__ == source.rpartition(".")[0]
    if not own and (kind.__name__ not in _MODULES or kind.__module__.partition(".")[0] not in ("mlx", "mlx_lm")):
        raise UnsupportedModelError(f"{path} is a {kind.__name__}; supported: {', '.join(_MODULES)}")
    if getattr(module, "mode", "affine") != "affine":
        raise UnsupportedModelError(f"{path} is quantised in mode {module.mode!r}; supported: 'affine'")
    if getattr(module, "traditional", False):
        raise UnsupportedModelError(f"{path} rotates neighbouring pairs (rope_traditional), which is not supported")
    if getattr(module, "pipeline_size", 1) > 1:
        raise UnsupportedModelError(f"{path or source} is one part of a pipeline of {module.pipeline_size} machines")


def _slides(layer: nn.Module) -> bool:
    return bool(getattr(layer, "use_sliding", False))


def _tensors(model: nn.Module) -> dict[str, TensorView]:
    """Every parameter as bytes. The views share its memory and keep MLX from reusing it."""
    parameters = dict(tree_flatten(model.parameters()))
    views = {name: array.view(mx.uint8) for name, array in parameters.items()}
    mx.eval(list(views.values()))
    return {
        name: TensorView(_DTYPES.get(array.dtype, str(array.dtype)), tuple(array.shape), _bytes(views[name]))
        for name, array in parameters.items()
    }


def _bytes(view: mx.array) -> Any:
    return np.asarray(view).reshape(-1)


class Watch:
    """Notices that a module or an array of a model has been replaced: a new weight, a LoRA layer, a quantised one.

    Values written into an array in place are not noticed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._top = [(key, value) for key, value in model.items() if _is_watched(value)]  # no reference to the model
        self._below: list[tuple[Any, Any, Any]] = []
        for _, module in model.named_modules():
            if module is not model:
                self._add(module, module.items())

    def _add(self, container: Any, items: Any) -> None:
        for key, value in items:
            if _is_watched(value):
                self._below.append((container, key, value))
            if isinstance(value, list):
                self._add(value, enumerate(value))

    def unchanged(self, model: nn.Module) -> bool:
        """Whether everything is as it was when the watch began."""
        try:
            return all(model[key] is value for key, value in self._top) and all(
                container[key] is value for container, key, value in self._below
            )
        except LookupError:
            return False


def _is_watched(value: Any) -> bool:
    return isinstance(value, mx.array | nn.Module | list)

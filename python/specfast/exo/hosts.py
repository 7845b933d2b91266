"""Where target and draft run: in specfast's own decoder, or on the weights that its MLX or TinyGrad host holds."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from .. import _core
from ..architecture import read_config
from ..checkpoint import LoadedModel, load_model
from ..config import ResolvedConfig
from ..errors import SpecfastError, UnsupportedModelError

Role = Literal["target", "draft"]
MODULES = {"mlx": ("mlx", "mlx_lm"), "tinygrad": ("tinygrad",)}


def host_of(resolved: ResolvedConfig, role: Role) -> str:
    """Where the target or the draft is to run; an engine typed for the target alone is the draft's too. Early exit is the native
    decoder's where no engine was typed."""
    if role == "draft" and typed_engine(resolved, role) is None:
        role = "target"
    engine = typed_engine(resolved, role)
    return "native" if engine is None and resolved.config.early_exit is not None else host_named(engine)


def host_named(engine: str | None) -> str:
    """Where a model is to run on this machine: "mlx" or "tinygrad" where that engine was typed and is installed; "mlx" on an
    Apple GPU where nothing was typed; else "native"."""
    if engine is None and on_apple_gpu():
        engine = "mlx"
    modules = MODULES.get(engine or "")
    return str(engine) if modules and all(importlib.util.find_spec(name) for name in modules) else "native"


@functools.cache
def on_apple_gpu() -> bool:
    """Whether MLX is here with an Apple GPU as its device."""
    if sys.platform != "darwin" or not importlib.util.find_spec("mlx"):
        return False
    mx: Any = importlib.import_module("mlx.core")
    return bool(mx.metal.is_available() and mx.default_device() == mx.gpu)


def typed_engine(resolved: ResolvedConfig, role: Role) -> str | None:
    """The engine that was typed for the target or the draft."""
    name = f"{role}_engine"
    engine: str | None = getattr(resolved.config, name)
    return engine if resolved.sources[name] == "typed" else None


class Host:
    """Loads a model onto a host, or into specfast's own decoder where the host cannot have it, which is said.

    Either way a model's pass is a native call, so that targets and drafts of all hosts go together.

    Args:
        name: "mlx", "tinygrad" or "native".
        say: tells people something.

    Attributes:
        name: where the model loaded last runs.
    """

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self.name, self._say = name, say
        self._model: Any = None  # whose weights the native model reads

    def load(self, directory: Path, **options: Any) -> LoadedModel:
        """Loads a directory, in the thread that will compute.

        Args:
            options: of `checkpoint.load_model`, which a host leaves at their defaults.

        Raises:
            SpecfastError: what `load_model` raises.
        """
        if self.name == "native":
            return load_model(directory, **options)
        config = read_config(directory)  # what the native decoder does not know is refused as ever
        try:
            self._model, native = _LOADERS[self.name](directory)
        except (SpecfastError, ImportError) as error:
            self._say(f"{directory.name} runs in specfast's own decoder, not on its {self.name} host: {error}")
            self.name = "native"
            return load_model(directory, **options)
        return LoadedModel(native, config, directory, native.precision, ())


def _on_tinygrad(directory: Path) -> tuple[Any, _core.Model]:
    host, inner = importlib.import_module("specfast.tinygrad"), importlib.import_module("specfast.tinygrad.accelerate")
    checkpoints = importlib.import_module("specfast.tinygrad.safetensors")
    model = host.accelerate(checkpoints.load_safetensors(directory))
    return model, _native(inner.native_model_of(model), host.report(model).reason)


def _on_mlx(directory: Path) -> tuple[Any, _core.Model]:
    host, inner = importlib.import_module("specfast.mlx"), importlib.import_module("specfast.mlx.accelerate")
    model = importlib.import_module("specfast.exo.mlx_engine").MlxModel.load(directory).module
    on_gpu = "MLX has it on a GPU, and this pair is decoded on the CPU"
    return model, _native(inner.native_model_of(model), host.report(model).reason or on_gpu)


def _native(found: _core.Model | None, reason: str) -> _core.Model:
    if found is None:
        raise UnsupportedModelError(reason)
    return found


_LOADERS = {"mlx": _on_mlx, "tinygrad": _on_tinygrad}

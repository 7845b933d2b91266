"""Which path accelerated models take: graph primitives (`specfast._mlx`) where they were built for this mlx, else one call."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from .. import _core


@functools.cache
def _load() -> tuple[Any, str]:
    """The module `specfast._mlx`, or None and why there is none."""
    if importlib.util.find_spec("specfast._mlx") is None:
        return None, "specfast._mlx was not built (SPECFAST_MLX=1 pip install specfast builds it)"
    try:
        found = importlib.import_module("specfast._mlx")
        found.accepts(mx.zeros((0,)))
    except ImportError as error:  # its own check of the version, or a symbol that this mlx does not have
        return None, f"specfast._mlx does not fit mlx {mx.__version__}: {error}"
    except TypeError:
        return (
            None,
            f"specfast._mlx does not fit mlx {mx.__version__}: they were built with nanobinds of different ABIs",
        )
    return found, ""


def module() -> Any:
    """`specfast._mlx`, or None."""
    return _load()[0]


def why_not() -> str:
    """Why models do not run as primitives in MLX's graph; "" where they do."""
    return _load()[1]


def version() -> str | None:
    """The version of mlx the primitives were built for; None where they are not used."""
    return getattr(module(), "MLX_VERSION", None)


def graph_of(model: nn.Module, native: _core.Model) -> Any:
    """The primitives of a model whose weights a native model reads in place: a `specfast._mlx.Graph`, or None."""
    if module() is None:
        return None
    arrays = dict(tree_flatten(model.parameters()))

    def of(*names: str) -> list[mx.array]:
        found = (f"{name}.{part}" for name in names for part in ("weight", "scales", "biases", "bias"))
        return [arrays[name] for name in found if name in arrays]

    layers = []
    for index in range(native.layers):
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = (f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"))
        layers.append(
            [
                of(f"{prefix}.input_layernorm", *qkv),
                of(f"{attention}.o_proj"),
                of(f"{prefix}.post_attention_layernorm", f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                of(f"{mlp}.down_proj"),
            ]
        )
    embed = of("model.embed_tokens")
    return module().Graph(native.graph_handle(), embed, layers, of("model.norm") + (of("lm_head") or embed))

"""Llama checkpoints in Hugging Face's layout, with the weights in tinygrad's memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tinygrad import Device, Tensor
from tinygrad.nn.state import safe_load

from ..architecture import ModelConfig, read_config
from ..checkpoint import open_weights
from ..errors import ModelFormatError, UnsupportedModelError
from ..safetensors_file import TensorView
from .weights import EXO_NAMES

_CPU = ("CPU", "CLANG", "LLVM")


class Llama:
    """A Llama's parameters under the names of exo's first-generation Transformer; `accelerate` gives it its call.

    Attributes:
        layers, tok_embeddings, norm, output: the parameters; the rows of Q and K as RoPE's neighbours.
        inv_freq: RoPE's frequencies, the checkpoint's scaling applied.
        max_context: by config.json.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.inv_freq, self.max_context = config.rope_inv_freq, config.max_context
        self.tok_embeddings = _linear(weights["model.embed_tokens.weight"])
        self.norm = _linear(weights["model.norm.weight"])
        self.output = _linear(weights.get("lm_head.weight", self.tok_embeddings.weight))
        self.layers = [_layer(config, weights, f"model.layers.{index}.") for index in range(config.layers)]


def load_safetensors(directory: Path) -> Llama:
    """A Llama checkpoint for `accelerate`: every tensor is checked before tinygrad reads it.

    Raises:
        ModelFormatError: a checkpoint that is damaged or lacks a tensor.
        UnsupportedModelError: another architecture, quantised weights, or a tinygrad whose device is not the CPU.
    """
    if Device.DEFAULT not in _CPU:
        raise UnsupportedModelError(f"tinygrad's device is {Device.DEFAULT}; supported: its CPU (DEV=CPU)")
    config = read_config(directory)
    if config.model_type != "llama" or config.quantisation or config.head_dim * config.heads != config.hidden:
        kind = "quantised for MLX" if config.quantisation else f"{config.model_type}'s"
        raise UnsupportedModelError(f"{directory}: {kind} weights are not run on tinygrad's host; supported: Llama's")
    views = open_weights(directory)
    lazy = {name: tensor for file in _files(views) for name, tensor in safe_load(file).items()}
    found = {name: lazy[name].to("CPU") for name in views if "rotary_emb" not in name}
    for name, heads in (("q_proj", config.heads), ("k_proj", config.kv_heads)):
        found.update({key: _turned(each, heads) for key, each in found.items() if key.endswith(f".{name}.weight")})
    Tensor.realize(*(each for each in found.values()))
    try:
        return Llama(config, found)
    except KeyError as error:
        raise ModelFormatError(f"{directory}: tensor {error} is missing; download the model again") from None


def _files(views: dict[str, TensorView]) -> list[Path]:
    return sorted({view.file.path for view in views.values() if view.file})


def _turned(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads d, K) of Q or K whose halves belong together, with those that do as neighbours."""
    rows, K = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, K).transpose(1, 2).reshape(rows, K).contiguous()


def _linear(weight: Tensor) -> Any:
    return SimpleNamespace(weight=weight)


def _layer(config: ModelConfig, weights: dict[str, Tensor], prefix: str) -> Any:
    layer = SimpleNamespace(
        attention=SimpleNamespace(n_heads=config.heads, n_kv_heads=config.kv_heads, head_dim=config.head_dim),
        feed_forward=SimpleNamespace(),
    )
    for own, name in EXO_NAMES.items():
        holder, _, attribute = own.rpartition(".")
        setattr(getattr(layer, holder) if holder else layer, attribute, _linear(weights[f"{prefix}{name}.weight"]))
    layer.attention_norm.eps = config.rms_eps
    return layer

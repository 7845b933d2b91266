"""A GGUF file as a model: its metadata as a configuration, its tensors under the names of a checkpoint directory."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .architecture import ConfigReader, ModelConfig, Quantisation
from .errors import ModelFormatError
from .gguf_blocks import BITS, GROUP, affine, q6_k_as_f32
from .gguf_file import GgufFile
from .safetensors_file import TensorView

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ROPE_FACTORS = "rope_freqs.weight"
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_CHANGES = ("attention.scale", "attention.sliding_window", "logit_scale", "residual_scale", "embedding_scale")
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.([a-z_]+)\.(weight|bias)")


def _architecture(reader: ConfigReader) -> str:
    name = reader.values.get("general.architecture")
    if name not in ARCHITECTURES:
        raise reader.unsupported(f"architecture {name!r}", "llama (and Mistral, which says llama), qwen2 and qwen3")
    for key in _CHANGES:
        if reader.values.get(f"{name}.{key}"):
            raise reader.unsupported(f"'{name}.{key}' of {reader.values[f'{name}.{key}']!r}", "models without it")
    if reader.values.get(f"{name}.expert_count"):
        raise reader.unsupported(f"a mixture of {reader.values[f'{name}.expert_count']!r} experts", "dense models")
    return str(name)


def _rope_inv_freq(file: GgufFile, reader: ConfigReader, name: str, head_dim: int) -> npt.NDArray[np.float64]:
    theta = reader.number(reader.values, f"{name}.rope.freq_base", 1.0, 1e12, 10000.0)
    if reader.integer(f"{name}.rope.dimension_count", 0, 1 << 17, head_dim) != head_dim:
        raise reader.unsupported("a partial rotary embedding", "RoPE over the whole head")
    inv_freq: npt.NDArray[np.float64] = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = reader.values.get(f"{name}.rope.scaling.type", "none")
    if kind == "linear":
        inv_freq /= reader.number(reader.values, f"{name}.rope.scaling.factor", 1.0, 1e6)
    elif kind != "none":
        raise reader.unsupported(f"RoPE scaling {kind!r}", f"none, linear, and factors in {_ROPE_FACTORS}")
    if _ROPE_FACTORS not in file.tensors:
        return inv_freq
    tensor = file.tensors[_ROPE_FACTORS]
    if tensor.dtype != "F32" or tensor.shape != (head_dim // 2,):
        raise ModelFormatError(
            f"{file.path}: tensor {_ROPE_FACTORS!r} is {tensor.dtype} of shape {tensor.shape}, but F32 of shape "
            f"{(head_dim // 2,)} is needed; download or convert the model again"
        )
    factors = tensor.as_float32().astype(np.float64)
    if not ((factors > 0) & np.isfinite(factors)).all():
        raise ModelFormatError(
            f"{file.path}: tensor {_ROPE_FACTORS!r} holds factors that are not positive and finite; the file is damaged"
        )
    return inv_freq / factors


def _quantisation(file: GgufFile) -> Quantisation:
    """How each matrix will be stored once converted; a quantised one's module is in the overrides."""
    modules = {name: _module(name, _OF_LAYER) for name in file.tensors if name.endswith(".weight")}
    kinds = {module: file.tensors[name].dtype for name, module in modules.items() if module}
    return Quantisation(4, GROUP, {module: (BITS[kind], GROUP) for module, kind in kinds.items() if kind in BITS})


def gguf_config(file: GgufFile) -> ModelConfig:
    """The decoder's sizes, from the metadata.

    Raises:
        ModelFormatError: a value is missing, of the wrong type or impossible.
        UnsupportedModelError: the model is sound but of a kind specfast does not run.
    """
    reader = ConfigReader(file.path, file.metadata)
    name = _architecture(reader)
    hidden = reader.integer(f"{name}.embedding_length", 1, 1 << 17)
    heads = reader.integer(f"{name}.attention.head_count", 1, 1024)
    kv_heads = reader.integer(f"{name}.attention.head_count_kv", 1, 1024, heads)
    if heads % kv_heads:
        raise ModelFormatError(f"{file.path}: {heads} attention heads cannot be shared by {kv_heads} key/value heads")
    key = f"{name}.attention.key_length"
    if reader.values.get(key) is None and hidden % heads:
        raise ModelFormatError(
            f"{file.path}: embedding_length {hidden} cannot be split over {heads} heads, and '{key}' is missing"
        )
    head_dim = reader.integer(key, 2, 1024, hidden // heads)
    if head_dim % 2:
        raise ModelFormatError(f"{file.path}: '{key}' is {head_dim}, but RoPE needs an even number")
    if reader.integer(f"{name}.attention.value_length", 1, 1 << 17, head_dim) != head_dim:
        raise reader.unsupported("values of another length than keys", "one length for both")
    layers = reader.integer(f"{name}.block_count", 1, 1024)
    embed = file.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2 or embed.shape[0] > 1 << 21:
        raise ModelFormatError(
            f"{file.path}: no matrix 'token_embd.weight' of up to {1 << 21} tokens among {len(file.tensors)} tensors; this is "
            "not a whole decoder, download or convert it again"
        )
    vocab = embed.shape[0]
    ends = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot")]
    return ModelConfig(
        model_type=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=reader.integer(f"{name}.feed_forward_length", 1, 1 << 20),
        vocab=vocab,
        rms_eps=reader.number(reader.values, f"{name}.attention.layer_norm_rms_epsilon", 0.0, 1.0, 1e-6),
        max_context=reader.integer(f"{name}.context_length", 1, 1 << 28, 2048),
        tied="output.weight" not in file.tensors,
        rope_inv_freq=tuple(_rope_inv_freq(file, reader, name, head_dim).tolist()),
        windows=(0,) * layers,
        quantisation=_quantisation(file),
        eos_ids=tuple(
            sorted({reader.integer(end, 0, vocab - 1) for end in ends if reader.values.get(end) is not None})
        ),
    )


def _module(name: str, of_layer: Mapping[str, str]) -> str | None:
    """The module in a checkpoint directory that a tensor belongs to; None if there is none."""
    top, _, part = name.rpartition(".")
    if top in _TOP and part == "weight":
        return _TOP[top]
    layer = _LAYER.fullmatch(name)
    found = of_layer.get(layer[2]) if layer else None
    if layer is None or found is None or (part == "bias" and "proj" not in found):
        return None
    return f"model.layers.{layer[1]}.{found}"


def _in_halves(tensor: TensorView, heads: int) -> TensorView:
    """Rows of Q or K that RoPE turns as neighbours (2 i, 2 i + 1), put where it turns (i, i + head_dim / 2)."""
    rows = tensor.data.reshape(heads, -1, 2, tensor.data.size // tensor.shape[0])
    return TensorView(tensor.dtype, tensor.shape, np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1))


def _in_order(file: GgufFile, name: str, config: ModelConfig, *, in_place: bool) -> TensorView:
    """A tensor, unless in_place with its rows in the order of a checkpoint directory."""
    tensor, layer = file.tensors[name], _LAYER.fullmatch(name)
    matrix = len(tensor.shape) == 2 and name.endswith(".weight")
    if (tensor.dtype in BITS or tensor.dtype == "Q6_K") and not matrix:
        raise ModelFormatError(
            f"{file.path}: tensor {name!r} is {tensor.dtype} of shape {tensor.shape}, but only matrices may be quantised; "
            "download or convert the model again"
        )
    if not turns_pairs(config) or not matrix or layer is None or layer[2] not in ("attn_q", "attn_k"):
        return tensor
    heads = config.heads if layer[2] == "attn_q" else config.kv_heads
    if tensor.shape[0] != heads * config.head_dim:
        raise ModelFormatError(
            f"{file.path}: tensor {name!r} has {tensor.shape[0]} rows, but {heads} heads of {config.head_dim} need "
            f"{heads * config.head_dim}; the file is damaged, download or convert it again"
        )
    return tensor if in_place else _in_halves(tensor, heads)


def turns_pairs(config: ModelConfig) -> bool:
    """Whether a file's rows of Q and K are in an order in which RoPE turns neighbours (2 i, 2 i + 1)."""
    return config.model_type == "llama"


def gguf_weights(file: GgufFile, config: ModelConfig, *, in_place: bool = False) -> dict[str, TensorView]:
    """All tensors under the names of a checkpoint directory, in MLX's layout unless in_place.

    Float tensors are views of the file; quantised ones are new memory with the same values (see gguf_blocks), and so are
    Q and K of llama files, whose rows are in another order.

    Args:
        in_place: all tensors are views of the file, quantised ones as its blocks; RoPE must then turn as `turns_pairs`
            says.

    Raises:
        ModelFormatError: a tensor without a place in the model, or a shape that is not the metadata's.
    """
    weights: dict[str, TensorView] = {}
    names = _OF_LAYER | (_QK_NORMS if config.model_type == "qwen3" else {})
    for name in file.tensors:
        if name == _ROPE_FACTORS:
            continue
        module = _module(name, names)
        if module is None:
            raise ModelFormatError(
                f"{file.path}: tensor {name!r} has no place in a {config.model_type} decoder as specfast knows it; download or "
                "convert the model again, or take one of its safetensors versions"
            )
        tensor = _in_order(file, name, config, in_place=in_place)
        if in_place:
            weights[f"{module}.{name.rpartition('.')[2]}"] = tensor
        elif tensor.dtype in BITS:
            weights |= {f"{module}.{part}": values for part, values in affine(tensor).items()}
        else:
            part = name.rpartition(".")[2]
            weights[f"{module}.{part}"] = q6_k_as_f32(tensor) if tensor.dtype == "Q6_K" else tensor
    if not in_place:
        file.give_back()
    return weights

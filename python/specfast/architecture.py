"""What config.json says about a decoder: sizes, RoPE and quantisation, checked and in one form for all architectures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ModelFormatError, UnsupportedModelError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
SUPPORTED_MODELS = "Llama 3.x, Mistral, Qwen2, Qwen2.5 and Qwen3 (dense)"
SUPPORTED_WEIGHTS = "MLX affine 4 and 8 bit at groups of 32, 64 and 128, bf16, f16 and f32"


@dataclass(frozen=True)
class Quantisation:
    """MLX affine quantisation: a default and overrides by module path; None means the module is not quantised."""

    bits: int
    group_size: int
    overrides: Mapping[str, tuple[int, int] | None] = field(default_factory=dict)

    def of(self, module: str) -> tuple[int, int] | None:
        """(bits, group size) of one module."""
        return self.overrides.get(module, (self.bits, self.group_size))


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes. Everything is checked; the weights are still to be compared with it.

    `windows` has, for each layer, how many positions up to its own a row attends to; 0 is all.
    `tied` says whether the embedding is the head too; None means that config.json leaves it to the weights.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rms_eps: float
    max_context: int
    tied: bool | None
    rope_inv_freq: tuple[float, ...]
    windows: tuple[int, ...]
    quantisation: Quantisation | None
    eos_ids: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MB."""
    try:
        if path.stat().st_size > 64_000_000:
            raise ModelFormatError(
                f"{path}: {path.stat().st_size} bytes are more than a configuration may have (64 MB)"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFormatError(
            f"{path}: cannot be read ({error.strerror}); a model directory needs this file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: holds a {type(value).__name__}, not an object; download it again")
    return value


class ConfigReader:
    """Reads typed values from a config with errors that name the file, or whatever else the values are from."""

    def __init__(self, path: Path | str, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ModelFormatError(f"{self.path}: '{key}' is missing; an integer in {low} to {high} is needed")
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ModelFormatError(f"{self.path}: '{key}' is {value!r}, but must be an integer in {low} to {high}")
        return value

    def number(
        self, values: Mapping[str, Any], key: str, low: float, high: float, default: float | None = None
    ) -> float:
        value = values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ModelFormatError(f"{self.path}: '{key}' is {value!r}, but must be a number in {low:g} to {high:g}")
        return float(value)

    def unsupported(self, what: str, supported: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.path}: {what} is not supported; supported: {supported}")


def _rope_inv_freq(reader: ConfigReader, head_dim: int) -> npt.NDArray[np.float64]:
    values = reader.values
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ModelFormatError(f"{reader.path}: 'rope_scaling' is {scaling!r}, but must be an object")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise reader.unsupported("RoPE that differs between kinds of layers", "the same RoPE in all layers")
    merged = {**values, **{k: v for k, v in scaling.items() if k in ("rope_theta", "partial_rotary_factor")}}
    theta = reader.number(merged, "rope_theta", 1.0, 1e12, 10000.0)
    if reader.number(merged, "partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
        raise reader.unsupported("a partial rotary embedding", "RoPE over the whole head")
    inv_freq: npt.NDArray[np.float64] = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", None):
        return inv_freq
    if kind == "linear":
        return inv_freq / reader.number(scaling, "factor", 1.0, 1e6)
    if kind == "llama3":
        factor = reader.number(scaling, "factor", 1.0, 1e6)
        low = reader.number(scaling, "low_freq_factor", 1e-6, 1e6)
        high = reader.number(scaling, "high_freq_factor", 1e-6, 1e6)
        original = reader.number(scaling, "original_max_position_embeddings", 1, 1e9)
        if high <= low:
            raise ModelFormatError(
                f"{reader.path}: 'high_freq_factor' {high:g} must be above 'low_freq_factor' {low:g}"
            )
        wavelength = 2 * math.pi / inv_freq
        smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        return (1 - smooth) * inv_freq / factor + smooth * inv_freq
    raise reader.unsupported(f"RoPE scaling {kind!r}", "default, linear, llama3")


def _sliding(reader: ConfigReader, layers: int) -> list[bool] | None:
    """Which layers `layer_types` says slide; None where it says nothing."""
    kinds = reader.values.get("layer_types")
    if kinds is None:
        return None
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or not all(isinstance(kind, str) for kind in kinds):
        raise ModelFormatError(
            f"{reader.path}: 'layer_types' is {kinds!r:.200}, but must name {layers} layers as {' or '.join(known)}"
        )
    for kind in kinds:
        if kind not in known:
            raise reader.unsupported(f"a layer of type {kind!r:.100} ('layer_types')", ", ".join(known))
    return [kind == "sliding_attention" for kind in kinds]


def _windows(reader: ConfigReader, model_type: str, layers: int, max_context: int) -> tuple[int, ...]:
    """The sliding window of each layer, with Hugging Face's defaults; one that no context outgrows is none."""
    values = reader.values
    everywhere = (0,) * layers
    sliding, used = _sliding(reader, layers), values.get("use_sliding_window")
    if used is not None and not isinstance(used, bool):
        raise ModelFormatError(f"{reader.path}: 'use_sliding_window' is {used!r:.100}, but must be true or false")
    if model_type == "llama" or (model_type != "mistral" and not used):
        return everywhere
    if "sliding_window" in values and values["sliding_window"] is None:
        return everywhere
    window = reader.integer("sliding_window", 1, 1 << 28, 4096)
    if window >= max_context:
        return everywhere
    if sliding is None:
        first = 0 if model_type == "mistral" else reader.integer("max_window_layers", 0, 1 << 20, 28)
        sliding = [layer >= first for layer in range(layers)]
    return tuple(window if slides else 0 for slides in sliding)


def _quantisation(reader: ConfigReader) -> Quantisation | None:
    values = reader.values.get("quantization") or reader.values.get("quantization_config")
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ModelFormatError(f"{reader.path}: 'quantization' is {values!r}, but must be an object")
    if values.get("quant_method") is not None:  # MLX's own layout has no such key
        raise reader.unsupported(f"quantisation method {values['quant_method']!r}", SUPPORTED_WEIGHTS)

    def checked(entry: Mapping[str, Any]) -> tuple[int, int]:
        mode = entry.get("mode", values.get("mode", "affine"))
        bits = entry.get("bits", values.get("bits"))
        group = entry.get("group_size", values.get("group_size"))
        if mode != "affine" or bits not in (4, 8) or group not in (32, 64, 128):
            raise reader.unsupported(
                f"quantisation {mode!r} with {bits!r} bits in groups of {group!r}", SUPPORTED_WEIGHTS
            )
        return int(bits), int(group)

    bits, group = checked(values)
    overrides: dict[str, tuple[int, int] | None] = {}
    for key, entry in values.items():
        if isinstance(entry, dict):
            overrides[key] = checked(entry)
        elif "." in key and isinstance(entry, bool):
            overrides[key] = (bits, group) if entry else None
    return Quantisation(bits, group, overrides)


def eos_ids(directory: Path, values: dict[str, Any], vocab: int) -> tuple[int, ...]:
    """End tokens by generation_config.json, else by config.json, whose values these are; raises ModelFormatError."""
    path = directory / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    if found is None:
        path, found = directory / "config.json", values.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab for i in ids):
        raise ModelFormatError(
            f"{path}: 'eos_token_id' is {found!r}, but must be token ids from 0 to {vocab - 1} (vocab_size {vocab}), or no "
            "text would end there; correct it, or take the file that belongs to the weights"
        )
    return tuple(ids)


def read_config(directory: Path) -> ModelConfig:
    """Reads and checks config.json (and generation_config.json's end tokens).

    Raises:
        ModelFormatError: a value is missing, of the wrong type or impossible.
        UnsupportedModelError: the model is sound but of a kind specfast does not run.
    """
    values = read_json(directory / "config.json")
    config = parse_config(directory / "config.json", values)
    return replace(config, eos_ids=eos_ids(directory, values, config.vocab))


def parse_config(path: Path | str, values: Mapping[str, Any]) -> ModelConfig:
    """Checks the values of a config.json, end tokens excepted; `path` is what messages call them.

    Raises:
        ModelFormatError, UnsupportedModelError: as for `read_config`.
    """
    reader = ConfigReader(path, values)
    names = values.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    model_type = ARCHITECTURES.get(name) if isinstance(name, str) else values.get("model_type")
    if model_type not in ARCHITECTURES.values():
        raise reader.unsupported(f"architecture {name or values.get('model_type')!r}", SUPPORTED_MODELS)
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise reader.unsupported(f"activation {values['hidden_act']!r}", "silu")
    if values.get("mlp_bias") or (model_type in ("llama", "mistral") and values.get("attention_bias")):
        raise reader.unsupported("a bias on MLP or output projections", "QKV bias (Qwen2) only")

    hidden = reader.integer("hidden_size", 1, 1 << 17)
    heads = reader.integer("num_attention_heads", 1, 1024)
    kv_heads = reader.integer("num_key_value_heads", 1, 1024, heads)
    if heads % kv_heads:
        raise ModelFormatError(f"{path}: {heads} attention heads cannot be shared by {kv_heads} key/value heads")
    if values.get("head_dim") is None and hidden % heads:
        raise ModelFormatError(
            f"{path}: hidden_size {hidden} cannot be split over {heads} heads, and 'head_dim' is missing"
        )
    head_dim = reader.integer("head_dim", 2, 1024, hidden // heads)
    if head_dim % 2:
        raise ModelFormatError(f"{path}: 'head_dim' is {head_dim}, but RoPE needs an even number")
    layers = reader.integer("num_hidden_layers", 1, 1024)
    max_context = reader.integer("max_position_embeddings", 1, 1 << 28, 2048)
    tied = values.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise ModelFormatError(f"{path}: 'tie_word_embeddings' is {tied!r}, but must be true or false")
    vocab = reader.integer("vocab_size", 1, 1 << 21)
    return ModelConfig(
        model_type=str(model_type),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=reader.integer("intermediate_size", 1, 1 << 20),
        vocab=vocab,
        rms_eps=reader.number(values, "rms_norm_eps", 0.0, 1.0, 1e-6),
        max_context=max_context,
        tied=tied,
        rope_inv_freq=tuple(_rope_inv_freq(reader, head_dim).tolist()),
        windows=_windows(reader, str(model_type), layers, max_context),
        quantisation=_quantisation(reader),
        eos_ids=(),
    )

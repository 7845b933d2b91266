"""From a model directory to a native model: tensors are found, compared with the config, and used where they lie."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from . import _core
from .architecture import ModelConfig, read_config, read_json
from .errors import ConfigurationError, ModelFormatError, ShapeError, UnsupportedModelError
from .gguf_blocks import BITS
from .gguf_file import is_gguf, open_gguf
from .gguf_model import gguf_config, gguf_weights, turns_pairs
from .mapped_file import MappedFile
from .safetensors_file import TensorView, open_safetensors

FLOAT_FORMATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
BLOCK_FORMATS = (*BITS, "Q6_K")
PRECISIONS = ("int8", "bf16", "f32")
KV_BITS = (8, 16)
_SAMPLE_BYTES = 1 << 16
_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]{1,9})\.")
_PREFIXES = ("model.", "language_model.model.", "")
_PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True)
class LoadedModel:
    """A native model with what was read beside it, and the files that it runs from.

    `precision` says what its results depend on: the activations, and keys and values in 8 bits if they are.
    """

    model: _core.Model
    config: ModelConfig
    directory: Path
    precision: str
    files: tuple[MappedFile, ...]

    @property
    def name(self) -> str:
        """The directory's or file's name, for messages."""
        return self.directory.name

    @cached_property
    def fingerprint(self) -> str | None:
        """Tells models apart by their configuration, and the size and both ends of their weights, as they were when it
        was first asked for; None where the files were gone by then."""
        digest = hashlib.sha256()
        try:
            for path in (
                [self.directory]
                if is_gguf(self.directory)
                else [self.directory / "config.json", *sorted(self.directory.glob("*.safetensors"))]
            ):
                if not path.is_file():
                    return None
                with path.open("rb") as file:
                    size = path.stat().st_size
                    digest.update(f"{path.name} {size}".encode())
                    digest.update(file.read(_SAMPLE_BYTES))
                    file.seek(max(0, size - _SAMPLE_BYTES))
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError:
            return None
        return digest.hexdigest()

    def require_unchanged(self) -> None:
        """Looks at the files, packed or not: the embedding is read from them for every token.

        Raises:
            ModelFormatError: one was written in place since.
        """
        for file in self.files:
            file.require_unchanged()


def _in_range(name: str, layers: range, names: Collection[str], total: int) -> bool:
    """Whether a range of a model's layers needs a tensor: the first also the embedding, the last norm and head."""
    if found := _LAYER.search(name):
        return int(found[1]) in layers
    last = total - 1 in layers
    if "embed_tokens" in name:
        return 0 in layers or (last and not any("lm_head" in other for other in names))
    return last


def _named_files(directory: Path, layers: range | None, total: int) -> list[Path] | None:
    """The files that the index names for layers; None without an index."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return None
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) and "/" not in v for v in names.values()):
        raise ModelFormatError(f"{index}: 'weight_map' is not a map from tensors to files; download it again")
    needed = [file for name, file in names.items() if layers is None or _in_range(name, layers, names, total)]
    return [directory / name for name in sorted(set(needed))]


def missing_files(directory: Path, layers: range, total: int) -> list[str]:
    """Names of the files that a range of a model's `total` layers needs and a directory lacks; raises as `open_weights`."""
    return [file.name for file in _named_files(directory, layers, total) or () if not file.is_file()]


def open_weights(directory: Path, layers: range | None = None, total: int = 0) -> dict[str, TensorView]:
    """All tensors of a directory's *.safetensors files, single or sharded.

    Args:
        layers: only what these need, of `total` layers; files without anything of it may be missing.

    Raises:
        ModelFormatError: no weights, a shard the index names is missing, a file is damaged, or a name occurs twice.
        UnsupportedModelError: the directory has only pickled or GGUF weights.
    """
    named = _named_files(directory, layers, total)
    if named is not None:
        files = named
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelFormatError(
                f"{directory}: the index names {', '.join(missing[:3])}, which is missing; download it again"
            )
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
        if pickled:
            raise UnsupportedModelError(
                f"{directory}: only pickled weights ({pickled[0]}) are there; they can run code when loaded and are refused. "
                "Use a *.safetensors version of the model"
            )
        if other := sorted(directory.glob("*.gguf")):
            raise UnsupportedModelError(f"{directory}: no *.safetensors file; a GGUF file is named itself: {other[0]}")
        raise ModelFormatError(
            f"{directory}: no *.safetensors file; a model directory needs config.json, weights and tokenizer.json"
        )
    tensors: dict[str, TensorView] = {}
    for file in files:
        for name, tensor in open_safetensors(file).items():
            if name in tensors:
                raise ModelFormatError(f"{file}: tensor {name!r} is in another file as well; download the model again")
            tensors[name] = tensor
    if layers is None:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if _in_range(name, layers, tensors, total)}


class _Weights:
    """Tensors of one checkpoint under the names of its layout."""

    def __init__(self, source: Path | str, config: ModelConfig, tensors: Mapping[str, TensorView]) -> None:
        self.source, self.config, self.tensors = source, config, tensors
        whole = isinstance(source, Path) and is_gguf(source)
        self._sizes, self._count = ("its metadata", "block_count") if whole else ("config.json", "num_hidden_layers")
        self._remedy = "download or convert it again" if whole else "the two files belong to different models"
        for prefix in _PREFIXES:
            if any(name.startswith((f"{prefix}embed_tokens.", f"{prefix}layers.")) for name in tensors):
                self.prefix = prefix
                break
        else:
            raise ModelFormatError(
                f"{source}: no embed_tokens.weight among {len(tensors)} tensors; this is not a decoder checkpoint"
            )

    def find(self, name: str) -> TensorView:
        if name not in self.tensors:
            raise ModelFormatError(f"{self.source}: tensor {name!r} is missing; download or convert the model again")
        return self.tensors[name]

    def expect_shape(self, name: str, shape: tuple[int, ...]) -> TensorView:
        tensor = self.find(name)
        if tensor.shape != shape:
            raise ModelFormatError(
                f"{self.source}: tensor {name!r} has shape {tensor.shape}, but {self._sizes} needs {shape}; "
                f"{self._remedy}"
            )
        return tensor

    def vector(self, name: str, size: int) -> npt.NDArray[np.float32]:
        tensor = self.expect_shape(name, (size,))
        if tensor.dtype not in FLOAT_FORMATS:
            raise ModelFormatError(
                f"{self.source}: tensor {name!r} is {tensor.dtype}, but F32, F16 or BF16 is needed; "
                "download or convert the model again"
            )
        values = tensor.as_float32()
        if not np.isfinite(values).all():
            raise ModelFormatError(f"{self.source}: tensor {name!r} holds NaN or infinite values; the file is damaged")
        return values

    def matrix(self, module: str, N: int, K: int) -> _core.Matrix:
        if f"{module}.scales" not in self.tensors:
            tensor = self.expect_shape(f"{module}.weight", (N, K))
            if tensor.dtype in BLOCK_FORMATS:
                return _core.Matrix(tensor.dtype, N, K, tensor.data)
            if tensor.dtype not in FLOAT_FORMATS:
                raise UnsupportedModelError(
                    f"{self.source}: tensor '{module}.weight' is {tensor.dtype}; supported: F32, F16, BF16, or MLX affine quantisation"
                )
            return _core.Matrix(FLOAT_FORMATS[tensor.dtype], N, K, tensor.data)
        quantisation = self.config.quantisation
        kind = quantisation.of(module) if quantisation else None
        if kind is None:
            raise ModelFormatError(
                f"{self.source}: '{module}' has scales, but config.json does not say how it is quantised ('quantization')"
            )
        bits, group = kind
        if K % group:
            raise ModelFormatError(
                f"{self.source}: '{module}' has {K} inputs, not a multiple of the group size {group}"
            )
        weight = self.expect_shape(f"{module}.weight", (N, K * bits // 32))
        scales = self.expect_shape(f"{module}.scales", (N, K // group))
        biases = self.expect_shape(f"{module}.biases", (N, K // group))
        if weight.dtype != "U32" or scales.dtype not in FLOAT_FORMATS or biases.dtype != scales.dtype:
            raise ModelFormatError(
                f"{self.source}: '{module}' is stored as {weight.dtype} with {scales.dtype} scales and {biases.dtype} biases, "
                "but U32 with scales and biases of one floating type is needed"
            )
        return _core.Matrix(
            f"q{bits}", N, K, weight.data,
            group=group, scales=scales.data, biases=biases.data, scale_format=FLOAT_FORMATS[scales.dtype],
        )  # fmt: skip

    def head(self) -> _core.Matrix | None:
        """The output matrix; None where it is the embedding."""
        name = self.prefix.removesuffix("model.") + "lm_head"
        if self.config.tied:
            return None
        if any(f"{name}.{part}" in self.tensors for part in ("weight", "scales")):
            return self.matrix(name, self.config.vocab, self.config.hidden)
        if self.config.tied is None:
            return None
        raise ModelFormatError(
            f"{self.source}: tensor '{name}.weight' is missing, but config.json says that the head is a matrix of its own "
            "(tie_word_embeddings is false); download or convert the model again, or correct config.json if it is not"
        )

    def require_no_more_layers(self) -> None:
        """The architectures that are supported have nothing beyond num_hidden_layers."""
        layer = re.compile(re.escape(f"{self.prefix}layers.") + r"([0-9]{1,9})\.")
        layers = 1 + max((int(found[1]) for found in map(layer.match, self.tensors) if found), default=-1)
        if layers > self.config.layers:
            raise ModelFormatError(
                f"{self.source}: the weights have {layers} layers, but {self._sizes} says {self.config.layers} "
                f"({self._count}); {self._remedy}"
            )

    def layer(self, index: int) -> dict[str, Any]:
        c = self.config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        sizes = {
            "q": (q, c.hidden), "k": (kv, c.hidden), "v": (kv, c.hidden), "o": (c.hidden, q),
            "gate": (c.intermediate, c.hidden), "up": (c.intermediate, c.hidden), "down": (c.hidden, c.intermediate),
        }  # fmt: skip
        at = f"{self.prefix}layers.{index}."
        layer: dict[str, Any] = {key: self.matrix(at + _PROJECTIONS[key], *size) for key, size in sizes.items()}
        layer["window"] = c.windows[index]
        layer["input_norm"] = self.vector(at + "input_layernorm.weight", c.hidden)
        layer["post_norm"] = self.vector(at + "post_attention_layernorm.weight", c.hidden)
        if c.model_type == "qwen2":
            layer |= {f"{key}_bias": self.vector(f"{at}{_PROJECTIONS[key]}.bias", sizes[key][0]) for key in "qkv"}
        if c.model_type == "qwen3":
            layer |= {f"{key}_norm": self.vector(f"{at}self_attn.{key}_norm.weight", c.head_dim) for key in "qk"}
        for key in _PROJECTIONS if c.model_type != "qwen2" else ("o", "gate", "up", "down"):
            if f"{at}{_PROJECTIONS[key]}.bias" in self.tensors:
                raise UnsupportedModelError(
                    f"{self.source}: a bias on {_PROJECTIONS[key]} is not supported; supported: QKV bias of Qwen2"
                )
        return layer


def default_precision(formats: set[str]) -> str:
    """int8 where anything is quantised, bf16 for 16-bit weights, f32 for f32 weights."""
    if formats & {"q4", "q8"}:
        return "int8"
    return "bf16" if formats & {"bf16", "f16"} else "f32"


def check_precision(precision: str | None) -> None:
    """Raises ConfigurationError unless it is None or one of PRECISIONS."""
    if precision is not None and precision not in PRECISIONS:
        raise ConfigurationError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")


def check_isa(isa: str | None) -> None:
    """Refuses a kernel table that cannot be used here.

    Raises:
        ConfigurationError: `isa`, or SPECFAST_ISA where that is None, is unknown or not for this CPU; names the others.
    """
    info = _core.build_info()
    if isa is None and info["isa_problem"]:
        raise ConfigurationError(str(info["isa_problem"]))
    supported = cast(list[str], info["isas_supported"])
    if isa is not None and isa not in supported:
        raise ConfigurationError(f"isa {isa!r} cannot be used here; choose one of {', '.join(supported)}, or none")


def build_model(
    source: Path | str,
    config: ModelConfig,
    tensors: Mapping[str, TensorView],
    *,
    precision: str | None = None,
    isa: str | None = None,
    max_context: int | None = None,
    pack: bool = False,
    mapped: bool = False,
    kv_bits: int | None = None,
    layers: range | None = None,
    rope_pairs: bool = False,
) -> _core.Model:
    """A native model of tensors under the names of a checkpoint; matrices are used where they lie, and kept alive.

    Args:
        source: what messages call the tensors' origin.
        precision, isa, max_context, pack, kv_bits, layers: as for `load_model`.
        mapped: all tensors lie in read-only mappings of files, whose memory may be given back once packed.
        rope_pairs: RoPE turns neighbours (2 i, 2 i + 1) of a head.

    Raises:
        ModelFormatError, UnsupportedModelError: a tensor is missing, does not fit the config, or is of a kind not supported.
    """
    weights = _Weights(source, config, tensors)
    part = range(config.layers) if layers is None else layers
    first, last = part.start == 0, part.stop == config.layers
    head = weights.head() if last else None
    embed = None
    if first or (last and head is None):
        embed = weights.matrix(f"{weights.prefix}embed_tokens", config.vocab, config.hidden)
    weights.require_no_more_layers()
    if not first:
        embed, head = None, head or embed
    decoded = [weights.layer(index) for index in part]
    matrices = [each for each in (embed, head) if each]
    matrices += [layer[key] for layer in decoded for key in _PROJECTIONS]
    try:
        return _core.Model(
            hidden=config.hidden,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            intermediate=config.intermediate,
            vocab=config.vocab,
            rms_eps=config.rms_eps,
            rope_inv_freq=np.asarray(config.rope_inv_freq, dtype=np.float32),
            max_context=max_context or config.max_context,
            embed=embed,
            head=head,
            norm=weights.vector(f"{weights.prefix}norm.weight", config.hidden) if last else None,
            layers=decoded,
            precision=precision or default_precision({matrix.format for matrix in matrices}),
            isa=isa,
            pack=pack,
            mapped=mapped,
            kv_bits=kv_bits or 16,
            rope_pairs=rope_pairs,
        )
    except ShapeError as error:
        raise ModelFormatError(f"{source}: {error}") from None


def _files(tensors: Mapping[str, TensorView]) -> tuple[MappedFile, ...]:
    return tuple({tensor.file: None for tensor in tensors.values() if tensor.file})


def model_config(path: Path) -> ModelConfig:
    """The configuration of a model directory or GGUF file; raises as read_config and gguf_config do."""
    return gguf_config(open_gguf(path)) if is_gguf(path) else read_config(path)


def _open(
    path: Path, layers: range | None, *, in_place: bool = False
) -> tuple[ModelConfig, dict[str, TensorView], tuple[MappedFile, ...]]:
    """Configuration and tensors of a model or some of its layers, and the files they lie in; those of a GGUF file
    converted unless in_place."""
    if not is_gguf(path):
        config = read_config(path)
        if layers is not None and not 0 <= layers.start < layers.stop <= config.layers:
            raise ConfigurationError(
                f"layers {layers.start} to {layers.stop - 1} are not all among the {config.layers} of {path}"
            )
        tensors = open_weights(path, layers, config.layers)
        return config, tensors, _files(tensors)
    if layers is not None:
        raise UnsupportedModelError(f"{path}: a GGUF file is loaded whole, not by ranges of layers")
    file = open_gguf(path)
    config = gguf_config(file)
    return config, gguf_weights(file, config, in_place=in_place), _files(file.tensors)


def weight_bytes(directory: Path, layers: range | None = None, total: int = 0) -> int:
    """Bytes of a directory's weights, or of those that some of its `total` layers need, of any architecture; raises as
    `open_weights`."""
    return sum(tensor.data.nbytes for tensor in open_weights(directory, layers, total).values())


def load_model(
    directory: Path,
    *,
    precision: str | None = None,
    isa: str | None = None,
    max_context: int | None = None,
    pack: bool = True,
    kv_bits: int | None = None,
    layers: range | None = None,
) -> LoadedModel:
    """Loads a model directory in Hugging Face or MLX layout, or a GGUF file.

    Files are mapped. Weights stay there, or are packed for kernels that stream a layout of their own (quantised and bf16
    weights on AVX-512), matrix by matrix: the packed copy takes the place of the mapped pages, so that memory holds the weights once. Replace the files of a
    running model by rename, never in place: `LoadedModel.require_unchanged`, which an engine calls before each request, finds
    files written in place, but one that is cut short during a request ends the process (SIGBUS).

    Args:
        directory: config.json, *.safetensors and generation_config.json if any; or a *.gguf file, whose quantised
            matrices are converted into new memory with the same values, or without pack unpacked as they are read.
        precision: of the activations: "int8", "bf16" or "f32"; None chooses by the weights.
        isa: kernel table to use; None is the best.
        max_context: bounds the context below the model's own.
        kv_bits: of keys and values: 8 stores them as int8 with a scale for each vector, in about half the memory; None and
            16 as bf16, or f32 with f32 activations.
        layers: only these of its layers, with what comes before the first or after the last of them; None is all.
        pack: False keeps all weights in the mapping, which processes share; a pass is slower, its bits are the same.

    Raises:
        ModelFormatError, UnsupportedModelError: what the files hold does not fit.
        ConfigurationError: unknown precision, bits or kernel table, or an impossible context.
    """
    check_precision(precision)
    if kv_bits is not None and (not isinstance(kv_bits, int) or kv_bits not in KV_BITS):
        raise ConfigurationError(f"kv_bits is {kv_bits!r}, but must be 8 or 16")
    check_isa(isa)
    config, tensors, files = _open(directory, layers, in_place=not pack)
    whole = isinstance(max_context, int) and not isinstance(max_context, bool)
    if max_context is not None and not (whole and 1 <= max_context <= config.max_context):
        raise ConfigurationError(f"a context of {max_context!r} is outside 1 to the model's {config.max_context}")
    model = build_model(
        directory, config, tensors, precision=precision, isa=isa, max_context=max_context, pack=pack,
        mapped=all(tensor.file for tensor in tensors.values()), kv_bits=kv_bits, layers=layers,
        rope_pairs=not pack and is_gguf(directory) and turns_pairs(config),
    )  # fmt: skip
    said = f"{model.precision}, kv 8 bit" if kv_bits == 8 else model.precision
    return LoadedModel(model, config, directory, said, files)

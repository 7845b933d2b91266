"""A tinygrad model's weights as a native model: its layers' names, its sizes, and its memory, used in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes

from .. import _core
from ..architecture import ModelConfig
from ..checkpoint import build_model
from ..errors import SpecfastError, UnsupportedModelError
from ..gguf_file import TYPES, GgufFile, parse_gguf
from ..safetensors_file import TensorView
from . import private

SUPPORTED_MODELS = (
    "tinygrad.llm's Transformer (Llama, Mistral, Qwen2, Qwen3; dense), and classes with exo's first-generation layers"
)
_LLM_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_EXO_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LLM = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXO_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_FAMILIES = {"llm": ("blk", _LLM_TOP, _LLM), "exo": ("layers", _EXO_TOP, EXO_NAMES)}
_DTYPES = {dtypes.float32: "F32", dtypes.float16: "F16", dtypes.bfloat16: "BF16"}


@dataclass(frozen=True)
class Weight:
    """One parameter: where a checkpoint has it, what the model calls it, and its tensor."""

    name: str
    own_name: str
    tensor: Tensor


@dataclass(frozen=True)
class Seams:
    """What of a model of either family the native one needs. `rope_pairs`: its own rows of Q and K turn as neighbours."""

    kind: str
    config: ModelConfig
    weights: tuple[Weight, ...]
    rope_pairs: bool


@dataclass(frozen=True)
class NativeWeights:
    """A native model over a host's weights.

    Attributes:
        model: the native model.
        held: how many parameters are held as "file blocks", "in place", "realised" (made memory of by tinygrad, then in place) or
            "copied".
        vectors: the memory, by the model's names, of norms and biases, of which the native model has copies.
    """

    model: _core.Model
    held: Counter[str]
    vectors: dict[str, npt.NDArray[np.uint8]]


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _unsupported(source: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{source} has {what}; supported: {SUPPORTED_MODELS}")


def _parameters(prefix: str, own: str, module: Any, names: dict[str, str]) -> Iterator[Weight]:
    for path, name in names.items():
        try:
            linear = _at(module, path)
        except AttributeError:
            continue
        for part in ("weight", "bias"):
            if getattr(linear, part, None) is not None:
                yield Weight(f"{prefix}{name}.{part}", f"{own}{path}.{part}", getattr(linear, part))


def weights_of(model: Any, kind: str) -> tuple[Weight, ...]:
    """The parameters that a model of a family has now."""
    layers, top, names = _FAMILIES[kind]
    found = list(_parameters("", "", model, top))
    for i, layer in enumerate(getattr(model, layers, ())):
        found += _parameters(f"model.layers.{i}.", f"{layers}.{i}.", layer, names)
    return tuple(found)


def read_seams(model: Any) -> Seams:
    """Finds the parts of a model by their names.

    Raises:
        UnsupportedModelError: a model of another build, or with a part that the native decoder does not have.
    """
    source = f"{type(model).__module__}.{type(model).__name__}"
    if all(hasattr(model, name) for name in ("blk", "token_embd", "output_norm", "output")):
        return _llm_seams(source, model)
    turning = hasattr(model, "inv_freq") or hasattr(model, "freqs_cis")
    if turning and all(hasattr(model, name) for name in ("layers", "tok_embeddings", "norm", "output")):
        return _exo_seams(source, model)
    raise _unsupported(source, "no layers known here")


def _llm_seams(source: str, model: Any) -> Seams:
    c = model.blk[0].config
    needed = set(_LLM) - {"attn_q_norm", "attn_k_norm"}
    for i, block in enumerate(model.blk):
        own = {name for name, value in vars(block).items() if hasattr(value, "weight")}
        lacking, more = sorted(needed - own), sorted(own - set(_LLM))
        if lacking or more:
            raise _unsupported(source, f"a block {i} {'without ' + lacking[0] if lacking else 'with ' + more[0]}")
    if c.attn_output_gate or c.ssm is not None or c.kv_lora_rank or c.num_experts:
        raise _unsupported(source, "gated, recurrent, latent or expert layers")
    if c.rope_dim != c.head_dim or c.qk_norm not in (0, c.head_dim):
        raise _unsupported(
            source, f"RoPE over {c.rope_dim} and QK-norm over {c.qk_norm} of the {c.head_dim} inputs of a head"
        )
    if c.qk_norm and c.qkv_bias:
        raise _unsupported(source, "QK-norm and biases together")
    inv_freq = c.rope_theta ** (-np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim)
    return Seams(
        "llm",
        _config(
            "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama",
            len(model.blk), c.n_heads, c.n_kv_heads, c.head_dim, c.norm_eps, model.max_context, inv_freq, model.token_embd,
            model.blk[0].ffn_gate,
        ),
        weights_of(model, "llm"),
        rope_pairs=False,
    )  # fmt: skip


def _exo_seams(source: str, model: Any) -> Seams:
    shard = getattr(model, "shard", None)
    if shard is not None and (shard.start_layer, shard.end_layer) != (0, len(model.layers) - 1):
        raise _unsupported(source, f"layers {shard.start_layer} to {shard.end_layer} of {shard.n_layers} only")
    attention = model.layers[0].attention
    eps = model.layers[0].attention_norm.eps
    given = getattr(model, "inv_freq", None)
    inv_freq = _frequencies(model.freqs_cis) if given is None else np.asarray(given, dtype=np.float64)
    return Seams(
        "exo",
        _config(
            "llama", len(model.layers), attention.n_heads, attention.n_kv_heads, attention.head_dim, eps, model.max_context,
            inv_freq, model.tok_embeddings, model.layers[0].feed_forward.w1,
        ),
        weights_of(model, "exo"),
        rope_pairs=True,
    )  # fmt: skip


def _config(
    model_type: str, layers: int, heads: int, kv_heads: int, head_dim: int, eps: float, max_context: int,
    inv_freq: npt.NDArray[np.float64], embedding: Any, gate: Any,
) -> ModelConfig:  # fmt: skip
    vocab, hidden = embedding.weight.shape
    return ModelConfig(
        model_type=model_type, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        intermediate=gate.weight.shape[0], vocab=vocab, rms_eps=eps, max_context=max_context, tied=False,
        rope_inv_freq=tuple(inv_freq.tolist()), windows=(0,) * layers, quantisation=None, eos_ids=(),
    )  # fmt: skip


def _frequencies(table: Tensor) -> npt.NDArray[np.float64]:
    """RoPE's frequencies from a table (1, positions, 1, head_dim / 2, 2) of cosines and sines, in any precision.

    The angle of a position twice as far tells the frequency twice as well, once the turns before it are known.
    """
    positions = table.shape[1]
    found = np.zeros(table.shape[3])
    at = 1
    while at < positions:
        cosine, sine = table[0, at, 0].float().numpy().astype(np.float64).T
        turns = np.round((at * found - np.arctan2(sine, cosine)) / (2 * np.pi)) if at > 1 else 0
        found = (np.arctan2(sine, cosine) + 2 * np.pi * turns) / at
        at *= 2
    return found


def _devices(seams: Seams) -> set[str]:
    named = {weight.tensor.device for weight in seams.weights}
    return {str(name).split(":")[0] for each in named for name in (each if isinstance(each, tuple) else (each,))}


def on_metal(seams: Seams) -> bool:
    """Whether a model's weights are on an Apple GPU."""
    return _devices(seams) == {"METAL"}


def native_weights(model: Any, seams: Seams, precision: str | None) -> NativeWeights:
    """A native model over the memory of a model's tensors, which is kept for as long as the native model lives.

    Tensors that tinygrad would unpack from a GGUF file in every step are read as the file's blocks, where tinygrad holds the
    file; those it holds are used in place; what it has only as a computation is realised first. Without graphs all are copied.

    Raises:
        UnsupportedModelError, ModelFormatError, ShapeError: an architecture, a device or a format without a native form.
    """
    source = f"{type(model).__module__}.{type(model).__name__}"
    devices = _devices(seams)
    if not devices <= {"CPU", "CLANG", "LLVM"}:
        raise UnsupportedModelError(
            f"{source} is on {', '.join(sorted(devices))}; supported: weights on the CPU (DEV=CPU, or .to('CPU')), or all on METAL"
        )
    for weight in seams.weights:
        if isinstance(weight.tensor.device, tuple):
            raise UnsupportedModelError(
                f"{weight.own_name} is in parts on {', '.join(weight.tensor.device)}; supported: every weight on one device"
            )
        if weight.tensor.dtype not in _DTYPES:  # before anything is realised
            raise UnsupportedModelError(
                f"{weight.own_name} is {weight.tensor.dtype}; supported: float32, float16, bfloat16"
            )
    reader = _Reader(seams.config, in_place=not private.graph_problem())
    tensors = {weight.name: reader.read(weight) for weight in seams.weights}
    if len(reader.orders) > 1:
        raise UnsupportedModelError(f"{source} has Q and K of more than one order; realise the weights (REALIZE=1)")
    pairs = seams.rope_pairs or "turned" in reader.orders
    native = build_model(
        source, seams.config, tensors, precision=precision, max_context=seams.config.max_context, rope_pairs=pairs
    )
    return NativeWeights(native, reader.held, reader.vectors)


class _Reader:
    """Takes tensors where they lie."""

    def __init__(self, config: ModelConfig, *, in_place: bool) -> None:
        self.held: Counter[str] = Counter()
        self.vectors: dict[str, npt.NDArray[np.uint8]] = {}
        self.orders: set[str] = set()  # of Q and K: "turned" if the file's rows are not in the model's order
        self._file: GgufFile | None = None
        self._heads = {"q_proj": config.heads, "k_proj": config.kv_heads}
        self._in_place = in_place
        self._buffer: Any = None

    def read(self, weight: Weight) -> TensorView:
        found = self._read_in_place(weight) if self._in_place else self._copied(weight)
        if self._in_place and len(found.shape) == 1:
            self.vectors[weight.own_name] = found.data
        return found

    def _read_in_place(self, weight: Weight) -> TensorView:
        tensor = weight.tensor
        if not private.is_realized(tensor):
            found = self._from_file(weight)
            if found is not None:
                self.held["file blocks"] += 1
                return found
            tensor.replace(tensor.contiguous().clone()).realize()
            self.held["realised"] += 1
        else:
            self.held["in place"] += 1
        if weight.name.endswith(("q_proj.weight", "k_proj.weight")):
            self.orders.add("plain")
        return TensorView(_DTYPES[tensor.dtype], tuple(tensor.shape), private.memory_of(tensor))

    def _copied(self, weight: Weight) -> TensorView:
        self.held["copied"] += 1
        tensor = weight.tensor
        kind = "F32" if tensor.dtype == dtypes.bfloat16 else _DTYPES[tensor.dtype]
        values = (tensor if kind == "F16" else tensor.cast(dtypes.float32)).numpy()
        return TensorView(kind, tuple(values.shape), np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    def _from_file(self, weight: Weight) -> TensorView | None:
        """The part of a GGUF file that a lazy tensor is, unconverted; None if it is computed in any other way."""
        part = private.file_part(weight.tensor)
        if part is None:
            return None
        whole, start = part
        if self._file is None or private.identity(whole) is not self._buffer:
            data = private.memory_of(whole)
            try:
                self._file, self._buffer = parse_gguf(Path("tinygrad's GGUF file"), data), private.identity(whole)
            except SpecfastError:  # no GGUF file, or one with types of its own
                return None
        place = self._file.start + start
        found = next((tensor for tensor in self._file.tensors.values() if tensor.data.ctypes.data == place), None)
        if found is None:
            return None
        heads = next((n for name, n in self._heads.items() if weight.name.endswith(f"{name}.weight")), 0)
        order = private.order_in_file(weight.tensor, whole, start, _TYPE_NUMBERS[found.dtype], found.shape, heads)
        if order and heads:
            self.orders.add(order)
        return found if order else None


_TYPE_NUMBERS = {kind.name: number for number, kind in TYPES.items()}

"""An mlx-lm model's forward pass on specfast's Metal kernels, as MLX graph operations: no MLX ABI, no host synchronisation.

Every launch is an `mx.fast.metal_kernel`. MLX gives a kernel new output arrays, so keys and values are appended by MLX's own
slice update, in place where nothing else holds the cache's array, and attention gets the whole array and a length. Where
`specfast._mlx` is used, the kernel that makes them writes them to the cache itself.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import KVCache

from .. import metal
from ..architecture import ModelConfig
from ..errors import ShapeError, UnsupportedModelError
from ..metal.launches import Activations, Between, check_heads
from . import primitives

_ACTIVATIONS: dict[mx.Dtype, Activations] = {mx.float16: "f16", mx.bfloat16: "bf16", mx.float32: "f32"}
_DTYPES: dict[str, mx.Dtype] = {name: dtype for dtype, name in _ACTIVATIONS.items()}
_Cache: Any = KVCache
_PADDING = 8  # elements from which on MLX hands an input over as device memory


@functools.cache
def _function(kernel: metal.Kernel) -> Any:
    made = metal.generated(kernel)
    return mx.fast.metal_kernel(
        name=made.name,
        input_names=list(made.inputs),
        output_names=list(made.outputs),
        source=made.body,
        header=made.header,
    )


@functools.cache
def _constants(dims: tuple[int, ...]) -> mx.array:
    return mx.array(dims, mx.int32)


def call(launch: metal.Launch, inputs: Sequence[mx.array], outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]]) -> Any:
    """One launch in the graph: its outputs, of the given shapes and types. The constants are added to the inputs."""
    dims = [_constants(launch.dims)] if launch.dims else []
    threads = tuple(a * b for a, b in zip(launch.grid, launch.threadgroup, strict=True))
    return _function(launch.kernel)(
        inputs=[*inputs, *dims],
        grid=threads,
        threadgroup=launch.threadgroup,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )


def call_in_place(
    launch: metal.Launch,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    updated: Sequence[mx.array],
) -> Any:
    """One launch of `specfast._mlx`: its outputs, then the updated arrays, whose buffers come before the constants'.

    These are written in place, or in a copy where somebody else has the array.
    """
    library, text = _program(launch.kernel)
    return primitives.module().launch(
        library, text, launch.kernel.name, launch.grid, launch.threadgroup, launch.dims, list(inputs),
        [shape for shape, _ in outputs], [dtype for _, dtype in outputs], list(updated),
    )  # fmt: skip


@functools.cache
def _program(kernel: metal.Kernel) -> tuple[str, str]:
    """The text of a kernel's library, and a name that no other text has."""
    text = metal.program([kernel])
    return f"specfast_{kernel.name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}", text


class Matrix:
    """A linear layer's or an embedding's weight as the kernels take it; nothing is copied."""

    def __init__(self, path: str, module: nn.Module, dtype: mx.Dtype) -> None:
        weight = module["weight"]
        if "scales" in module:
            self.weights = metal.Weights(module.bits, module.group_size)
            self.buffers = (weight, module["scales"], module["biases"])
            self.N, self.K = weight.shape[0], weight.shape[1] * 32 // module.bits
            found = module["scales"].dtype
        else:
            self.weights = metal.Weights()
            self.N, self.K = weight.shape
            words = weight.view(mx.uint32)  # the same memory
            self.buffers = (words, weight, weight)
            found = weight.dtype
        if found != dtype:
            raise UnsupportedModelError(f"{path} is {found}, the embedding {dtype}; one type is supported")
        if self.N * self.K < _PADDING or self.buffers[1].size < _PADDING:
            raise ShapeError(f"{path} is ({self.N}, {self.K}), too small for the Metal kernels")
        self.weights.check(self.K)
        self.nbytes = sum(buffer.nbytes for buffer in (self.buffers if self.weights.bits else self.buffers[:1]))


class Layer:
    """One decoder layer's weights."""

    def __init__(self, path: str, layer: nn.Module, dtype: mx.Dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp

        def matrix(owner: nn.Module, name: str) -> Matrix:
            return Matrix(f"{path}.{name}", owner[name], dtype)

        self.qkv = [matrix(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
        self.o, self.down = matrix(attention, "o_proj"), matrix(mlp, "down_proj")
        self.gate, self.up = matrix(mlp, "gate_proj"), matrix(mlp, "up_proj")
        for group in (self.qkv, [self.gate, self.up]):
            if len({part.weights for part in group}) > 1:
                raise UnsupportedModelError(
                    f"{path} has matrices of one kernel in different formats; supported: one format"
                )
        self.input_norm, self.post_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.between: Between = "nothing"
        self.bias = self.norms = mx.zeros(_PADDING, dtype)
        if "bias" in attention.q_proj:
            self.between = "bias"
            self.bias = mx.concatenate([attention[name].bias for name in ("q_proj", "k_proj", "v_proj")])
        if "q_norm" in attention:
            self.between = "qk_norm"
            self.norms = mx.concatenate([attention.q_norm.weight, attention.k_norm.weight])
        if "bias" in attention.o_proj or any("bias" in mlp[name] for name in ("gate_proj", "up_proj", "down_proj")):
            raise UnsupportedModelError(f"{path} has biases outside q, k and v, which are not supported")


class MetalForward:
    """The forward pass of a Llama, Mistral, Qwen2 or Qwen3 model on Metal kernels.

    A row's logits have the same bits whatever rows are beside it, up to `most_rows`; more rows are better served by MLX's
    own matrix products. Caches are mlx-lm's `KVCache`.
    """

    most_rows = 3 * metal.MAX_ROWS

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        """Raises UnsupportedModelError or ShapeError where there are no kernels for the model."""
        inner: Any = model.model
        embedding = inner.embed_tokens
        self.dtype = (embedding["scales"] if "scales" in embedding else embedding["weight"]).dtype
        if self.dtype not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"weights of type {self.dtype} have no Metal kernels; supported: float16, bfloat16, float32"
            )
        self.activations: Activations = _ACTIVATIONS[self.dtype]
        self.config = config
        if any(config.windows):
            raise UnsupportedModelError("layers attend to a sliding window, which the Metal kernels do not have")
        check_heads(config.heads, config.kv_heads, config.head_dim)
        self.embed = Matrix("embed_tokens", embedding, self.dtype)
        self.head = Matrix("lm_head", model.lm_head, self.dtype) if "lm_head" in model else self.embed
        self.layers = [Layer(f"layers.{i}", layer, self.dtype) for i, layer in enumerate(inner.layers)]
        self.norm = inner.norm.weight
        self.inv_freq = mx.array(np.asarray(config.rope_inv_freq, np.float32))
        if len(config.rope_inv_freq) < _PADDING:
            raise ShapeError(f"head_dim is {config.head_dim}, too small for the Metal kernels")

        self.weight_bytes = sum(matrix.nbytes for matrix in self._matrices())

    def _matrices(self) -> list[Matrix]:
        """What a pass streams."""
        return [m for layer in self.layers for m in (*layer.qkv, layer.o, layer.gate, layer.up, layer.down)] + [
            self.head
        ]

    def new_caches(self) -> list[Any]:
        return [_Cache() for _ in self.layers]

    def why_not(self, inputs: mx.array, caches: Sequence[Any]) -> str:
        """Why a call runs mlx-lm's layers; "" where it need not."""
        if inputs.shape[1] > self.most_rows:
            return f"more than {self.most_rows} rows, which MLX's own matrix products read faster"
        if len(caches) != len(self.layers):
            return f"{len(caches)} caches for {len(self.layers)} layers"
        kinds = {type(cache) for cache in caches} - {_Cache}
        if kinds:
            return f"a cache of type {', '.join(sorted(kind.__name__ for kind in kinds))}; supported: KVCache"
        offset, keys = caches[0].offset, caches[0].keys
        if any(cache.offset != offset for cache in caches):
            return "caches whose layers have different offsets"
        if keys is not None and (keys.dtype != self.dtype or keys.shape[0] != 1):
            return f"a cache of {keys.shape[0]} sequences of {keys.dtype}; supported: one of {self.dtype}"
        return ""

    def __call__(self, inputs: mx.array, caches: Sequence[Any]) -> mx.array:
        """Logits (1, M, vocab) float32 of inputs (1, M); keys and values are appended to the caches."""
        tokens = inputs.reshape(-1).astype(mx.int32)
        M, most = tokens.size, metal.MAX_ROWS
        parts = [self._tile(tokens[first : first + most], caches) for first in range(0, M, most)]
        return (parts[0] if len(parts) == 1 else mx.concatenate(parts))[None]

    def _rows(self, M: int, columns: int) -> tuple[tuple[int, int], mx.Dtype]:
        return (M, columns), self.dtype

    def _normed(self, x: mx.array, weight: mx.array) -> mx.array:
        launch = metal.norm_rows(self.activations, M=x.shape[0], K=x.shape[1], eps=self.config.rms_eps)
        (y,) = call(launch, [x, weight], [self._rows(*x.shape)])
        return y

    def _added(self, matrix: Matrix, x: mx.array, residual: mx.array) -> mx.array:
        M = x.shape[0]
        launch = metal.matmul_rows(matrix.weights, self.activations, M=M, N=matrix.N, K=matrix.K, epilogue="residual")
        (y,) = call(launch, [*matrix.buffers, x, residual], [self._rows(M, matrix.N)])
        return y

    def _tile(self, tokens: mx.array, caches: Sequence[Any]) -> mx.array:
        """Logits (M, vocab) of at most MAX_ROWS rows."""
        M, hidden, config = tokens.size, self.config.hidden, self.config
        padded = mx.pad(tokens, (0, max(0, _PADDING - M)))
        launch = metal.embed_rows(self.embed.weights, self.activations, M=M, V=self.embed.N, K=hidden)
        (x,) = call(launch, [*self.embed.buffers, padded], [self._rows(M, hidden)])
        offset = caches[0].offset
        rotated = mx.array([offset] + [0] * (_PADDING - 1), mx.int32)  # the slot is that of the kernel's own output
        seen = mx.array([offset] * _PADDING, mx.int32)
        for layer, cache in zip(self.layers, caches, strict=True):
            attended = self._attend(layer, cache, self._normed(x, layer.input_norm), rotated, seen)
            x = self._added(layer.o, attended, x)
            normed = self._normed(x, layer.post_norm)
            launch = metal.swiglu_rows(layer.gate.weights, self.activations, M=M, N=layer.gate.N, K=hidden)
            (h,) = call(launch, [*layer.gate.buffers, *layer.up.buffers, normed], [self._rows(M, layer.gate.N)])
            x = self._added(layer.down, h, x)
        V, head = config.vocab, self.head
        launch = metal.logits_rows(head.weights, self.activations, M=M, V=V, K=hidden, limit=V)
        shapes = [((M, V), mx.float32), ((M, -(-V // 256), 4), mx.float32)]
        logits, _ = call(launch, [*head.buffers, self._normed(x, self.norm)], shapes)
        return logits

    def _attend(self, layer: Layer, cache: Any, normed: mx.array, rotated: mx.array, seen: mx.array) -> mx.array:
        """Attention's output (M, heads * head_dim); the rows' keys and values are in the cache afterwards."""
        config, M = self.config, normed.shape[0]
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        shape = {"M": M, "heads": heads, "kv_heads": kv_heads, "head_dim": dim}
        positions, in_place = cache.offset + M, primitives.module() is not None
        if in_place:
            self._make_room(cache, positions)
        launch = metal.qkv_rope_append(
            layer.qkv[0].weights,
            self.activations,
            **shape,
            K=config.hidden,
            capacity=cache.keys.shape[2] if in_place else M,
            eps=config.rms_eps,
            between=layer.between,
        )
        buffers = [buffer for matrix in layer.qkv for buffer in matrix.buffers]
        inputs = [*buffers, normed, self.inv_freq, layer.bias, layer.norms]
        queries, new = ((M, heads, dim), self.dtype), ((1, kv_heads, M, dim), self.dtype)
        if in_place:
            held = cache.keys, cache.values
            cache.keys = cache.values = None
            q, cache.keys, cache.values = call_in_place(launch, [*inputs, seen], [queries], held)
            cache.offset = positions
        else:
            q, keys, values = call(launch, [*inputs, rotated], [queries, new, new])
            cache.update_and_fetch(keys, values)
        launch = metal.attend_rows(self.activations, **shape, capacity=cache.keys.shape[2], positions=positions)
        spans = ((launch.grid[1], M, heads, dim + 2), mx.float32)
        (partial,) = call(launch, [q, cache.keys, cache.values, seen], [spans])
        launch = metal.attend_spans(self.activations, M=M, heads=heads, head_dim=dim)
        (out,) = call(launch, [partial, seen], [((M, heads, dim), self.dtype)])
        return out.reshape(M, heads * dim)

    def _make_room(self, cache: Any, positions: int) -> None:
        """Lets a cache's arrays have so many positions, in mlx-lm's steps."""
        there = 0 if cache.keys is None else cache.keys.shape[2]
        if positions <= there:
            return
        more = -(-(positions - there) // cache.step) * cache.step
        shape = (1, self.config.kv_heads, more, self.config.head_dim)
        for name in ("keys", "values"):
            empty, rows = mx.zeros(shape, self.dtype), getattr(cache, name)
            setattr(cache, name, mx.contiguous(empty) if rows is None else mx.concatenate([rows, empty], axis=2))


def available() -> bool:
    """Whether MLX would run these kernels: its default device is a GPU and that is Apple's."""
    return bool(mx.default_device().type == mx.gpu and mx.metal.is_available())

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
from ..errors import ConfigurationError, ShapeError, UnsupportedModelError
from ..metal.launches import Activations, check_heads
from . import primitives
from .metal_weights import PADDING, Layer, Matrix

_ACTIVATIONS: dict[mx.Dtype, Activations] = {mx.float16: "f16", mx.bfloat16: "bf16", mx.float32: "f32"}
_DTYPES: dict[str, mx.Dtype] = {name: dtype for dtype, name in _ACTIVATIONS.items()}
_Cache: Any = KVCache


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


class MetalForward:
    """The forward pass of a Llama, Mistral, Qwen2 or Qwen3 model on Metal kernels, or that of a range of its layers.

    A row's results have the same bits whatever rows are beside it, up to `most_rows`, and whatever ranges the model is
    cut into; more rows are better served by MLX's own matrix products. Caches are mlx-lm's `KVCache`, one for each layer
    of the range.

    Attributes:
        range: the indices of its layers.
        first, last: whether it begins with the embedding, and ends with the head.
        dtype, activations: the type of its weights and hidden rows.
        in_place: whether keys and values are written to the caches by the kernel that makes them, through `specfast._mlx`;
            may be set to False.
        weight_bytes: bytes of weights that a pass of this range reads.
    """

    most_rows = 3 * metal.MAX_ROWS

    def __init__(self, model: nn.Module, config: ModelConfig, layers: range | None = None) -> None:
        """Takes the weights where MLX holds them; no other layers, nor an embedding or a head out of the range, are touched.

        Args:
            model: mlx-lm's, all of it or with the modules of this range.
            config: of the whole model.
            layers: which to run; None is all.

        Raises:
            ConfigurationError: layers that the model does not have.
            UnsupportedModelError, ShapeError: there are no kernels for the model.
        """
        every = range(config.layers)
        self.range = every if layers is None else layers
        if not self.range or self.range != every[self.range[0] : self.range[-1] + 1]:
            raise ConfigurationError(
                f"layers is {self.range}, but must be a part of {every}, at least one and in order"
            )
        self.first, self.last = self.range.start == 0, self.range[-1] == every[-1]
        inner: Any = model.model
        matrix = inner.embed_tokens if self.first else inner.layers[self.range.start].self_attn.q_proj
        self.dtype = (matrix["scales"] if "scales" in matrix else matrix["weight"]).dtype
        if self.dtype not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"weights of type {self.dtype} have no Metal kernels; supported: float16, bfloat16, float32"
            )
        self.activations: Activations = _ACTIVATIONS[self.dtype]
        self.config = config
        if any(config.windows[i] for i in self.range):
            raise UnsupportedModelError("layers attend to a sliding window, which the Metal kernels do not have")
        check_heads(config.heads, config.kv_heads, config.head_dim)
        if self.first:
            self.embed = Matrix("embed_tokens", inner.embed_tokens, self.dtype)
        self.layers = [Layer(f"layers.{i}", inner.layers[i], self.dtype) for i in self.range]
        if self.last:
            tied = "lm_head" not in model
            self.head = Matrix("the head", inner.embed_tokens if tied else model.lm_head, self.dtype)
            self.norm = inner.norm.weight
        self.inv_freq = mx.array(np.asarray(config.rope_inv_freq, np.float32))
        if len(config.rope_inv_freq) < PADDING:
            raise ShapeError(f"head_dim is {config.head_dim}, too small for the Metal kernels")
        self.in_place = primitives.module() is not None
        self.weight_bytes = sum(matrix.nbytes for matrix in self._matrices())

    def _matrices(self) -> list[Matrix]:
        """What a pass streams."""
        layers = [m for layer in self.layers for m in (*layer.qkv, layer.o, layer.gate, layer.up, layer.down)]
        return [*layers, self.head] if self.last else layers

    def new_caches(self) -> list[Any]:
        """Empty ones, of this range's layers."""
        return [_Cache() for _ in self.layers]

    def why_not(self, inputs: mx.array, caches: Sequence[Any]) -> str:
        """Why a call runs mlx-lm's layers; "" where it need not."""
        if wrong := self._wrong(inputs):
            return wrong
        if inputs.shape[1] > self.most_rows:
            return f"more than {self.most_rows} rows, which MLX's own matrix products read faster"
        return self._wrong_caches(caches)

    def _wrong_caches(self, caches: Sequence[Any]) -> str:
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
        """Runs M rows through the range; their keys and values are appended to the caches.

        Args:
            inputs: token ids (1, M) where the range begins with the first layer, else hidden rows (1, M, hidden) of
                `dtype`, as the range before gave them.
            caches: of the range's layers, in order.

        Returns:
            Logits (1, M, vocab) float32 where the range ends with the last layer, else hidden rows (1, M, hidden) of
            `dtype`; not computed yet.

        Raises:
            ShapeError: inputs of another shape or type.
        """
        if wrong := self._wrong(inputs):
            raise ShapeError(wrong)
        rows, most = inputs[0].astype(mx.int32) if self.first else inputs[0], metal.MAX_ROWS
        parts = [self._tile(rows[first : first + most], caches) for first in range(0, rows.shape[0], most)]
        return (parts[0] if len(parts) == 1 else mx.concatenate(parts))[None]

    def _wrong(self, inputs: mx.array) -> str:
        """What is wrong with the inputs' shape or type; "" where nothing is."""
        trailing, hidden = tuple(inputs.shape[2:]), self.config.hidden
        if inputs.ndim < 2 or inputs.shape[0] != 1 or trailing != (() if self.first else (hidden,)):
            expected = "(1, M)" if self.first else f"(1, M, {hidden})"
            return f"inputs of shape {tuple(inputs.shape)}; {self.range} takes {expected}"
        if not self.first and inputs.dtype != self.dtype:
            return f"hidden rows of {inputs.dtype}; {self.range} takes {self.dtype}"
        return ""

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

    def _tile(self, rows: mx.array, caches: Sequence[Any]) -> mx.array:
        """The results of at most MAX_ROWS rows: of token ids (M,), or of hidden rows (M, hidden)."""
        M, hidden = rows.shape[0], self.config.hidden
        x = self._embedded(rows) if self.first else rows
        offset = caches[0].offset
        rotated = mx.array([offset] + [0] * (PADDING - 1), mx.int32)  # the slot is that of the kernel's own output
        seen = mx.array([offset] * PADDING, mx.int32)
        for layer, cache in zip(self.layers, caches, strict=True):
            attended = self._attend(layer, cache, self._normed(x, layer.input_norm), rotated, seen)
            x = self._added(layer.o, attended, x)
            normed = self._normed(x, layer.post_norm)
            launch = metal.swiglu_rows(layer.gate.weights, self.activations, M=M, N=layer.gate.N, K=hidden)
            (h,) = call(launch, [*layer.gate.buffers, *layer.up.buffers, normed], [self._rows(M, layer.gate.N)])
            x = self._added(layer.down, h, x)
        return self._logits(x) if self.last else x

    def _embedded(self, tokens: mx.array) -> mx.array:
        M, hidden = tokens.size, self.config.hidden
        padded = mx.pad(tokens, (0, max(0, PADDING - M)))
        launch = metal.embed_rows(self.embed.weights, self.activations, M=M, V=self.embed.N, K=hidden)
        (x,) = call(launch, [*self.embed.buffers, padded], [self._rows(M, hidden)])
        return x

    def _logits(self, x: mx.array) -> mx.array:
        M, V, head = x.shape[0], self.config.vocab, self.head
        launch = metal.logits_rows(head.weights, self.activations, M=M, V=V, K=self.config.hidden, limit=V)
        shapes = [((M, V), mx.float32), ((M, -(-V // 256), 4), mx.float32)]
        logits, _ = call(launch, [*head.buffers, self._normed(x, self.norm)], shapes)
        return logits

    def _attend(self, layer: Layer, cache: Any, normed: mx.array, rotated: mx.array, seen: mx.array) -> mx.array:
        """Attention's output (M, heads * head_dim); the rows' keys and values are in the cache afterwards."""
        config, M = self.config, normed.shape[0]
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        shape = {"M": M, "heads": heads, "kv_heads": kv_heads, "head_dim": dim}
        positions = cache.offset + M
        if self.in_place:
            self._make_room(cache, positions)
        launch = metal.qkv_rope_append(
            layer.qkv[0].weights,
            self.activations,
            **shape,
            K=config.hidden,
            capacity=cache.keys.shape[2] if self.in_place else M,
            eps=config.rms_eps,
            between=layer.between,
        )
        buffers = [buffer for matrix in layer.qkv for buffer in matrix.buffers]
        inputs = [*buffers, normed, self.inv_freq, layer.bias, layer.norms]
        queries, new = ((M, heads, dim), self.dtype), ((1, kv_heads, M, dim), self.dtype)
        if self.in_place:
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

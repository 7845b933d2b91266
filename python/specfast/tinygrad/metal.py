"""A tinygrad.llm model's forward pass on specfast's Metal kernels: one program of tinygrad's graph for each launch.

The kernels' source, grid and constants are `specfast.metal`'s. Every array is a tensor of tinygrad's, keys and values included,
so that its scheduler and its jit order, capture and replay the launches as their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from tinygrad import Tensor, dtypes

from .. import metal
from ..errors import ShapeError, UnsupportedModelError
from ..metal.launches import Activations, Between, check_heads
from . import private
from .weights import Seams, Weight

_ACTIVATIONS: dict[Any, Activations] = {dtypes.float16: "f16", dtypes.bfloat16: "bf16", dtypes.float32: "f32"}
_SPARE = 32  # positions after the context: rows of a pass may go beyond it where its start is a variable


def launch(
    launch: metal.Launch, inputs: Sequence[Tensor], outputs: Sequence[Tensor], updated: Sequence[Tensor] = ()
) -> list[Tensor]:
    """One launch in the graph, lazily: the outputs, then the updated tensors, after it.

    Args:
        launch: of specfast.metal's table.
        inputs: the buffers that the kernel reads, in its order; the constants are added where it has any.
        outputs: those it writes, `updated` those it reads or keeps and writes: with memory of their own.
    """  # fmt: skip
    buffers = [*inputs, *outputs, *updated]
    first = len(inputs)
    if launch.dims:
        buffers.append(Tensor(np.array(launch.dims, np.int32), device=buffers[0].device))
    program = private.Program(
        launch.kernel.name,
        source=metal.program([launch.kernel]),
        grid=launch.grid,
        group=launch.threadgroup,
        outs=tuple(range(first, first + len(outputs))),
        inouts=tuple(range(first + len(outputs), first + len(outputs) + len(updated))),
    )
    return program(buffers)[first : first + len(outputs) + len(updated)]


class _Matrix:
    """A matrix as the kernels take it: floats, which have no scales and biases."""

    def __init__(self, tensor: Tensor) -> None:
        self.weights = metal.Weights()
        self.N, self.K = (int(n) for n in tensor.shape)
        self.weights.check(self.K)
        self.buffers = (tensor, tensor, tensor)


class MetalPath:
    """A model's pass of any number of rows, in tiles of the kernels' 9, for one sequence.

    A row's logits have the same bits whatever rows are beside it. Keys and values are `keys[i]` and `values[i]`, (kv_heads,
    capacity, head_dim); a start position says what of them counts.
    """

    graphs = True

    def __init__(self, seams: Seams, precision: str | None) -> None:
        """Raises UnsupportedModelError or ShapeError where there are no kernels for the model."""
        if seams.kind != "llm":
            raise UnsupportedModelError("exo's layers turn neighbours, for which there is no Metal kernel")
        if private.graph_problem():
            raise UnsupportedModelError(f"no graph takes the Metal kernels: {private.graph_problem()}")
        config = self.config = seams.config
        self.max_context, self.vocab, self.layers = config.max_context, config.vocab, config.layers
        check_heads(config.heads, config.kv_heads, config.head_dim)
        weights = {weight.name: weight for weight in seams.weights}
        embed = weights["model.embed_tokens.weight"].tensor
        if embed.dtype not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"weights of type {embed.dtype}; the Metal kernels have float16, bfloat16 and float32"
            )
        self.dtype, self.device = embed.dtype, str(embed.device)
        self.activations = _ACTIVATIONS[embed.dtype]
        if precision not in (None, self.activations):
            raise UnsupportedModelError(
                f"precision {precision} on weights of {self.activations}; on Metal these are one"
            )
        self.held: Counter[str] = Counter()
        self.calls = 0
        tensors = {name: self._own(weight) for name, weight in weights.items()}
        self.weight_bytes = sum(t.numel() * self.dtype.itemsize for name, t in tensors.items() if "embed" not in name)
        self._embed = _Matrix(tensors["model.embed_tokens.weight"])
        self._head = _Matrix(tensors["lm_head.weight"])
        self._norm = tensors["model.norm.weight"]
        self._layers = [_Layer(f"model.layers.{i}.", tensors) for i in range(config.layers)]
        self._inv_freq = Tensor(np.asarray(config.rope_inv_freq, np.float32), device=self.device)
        self.capacity = config.max_context + _SPARE
        self.keys, self.values = (
            [self._empty(config.kv_heads, self.capacity, config.head_dim) for _ in self._layers] for _ in "kv"
        )

    def _own(self, weight: Weight) -> Tensor:
        """A weight in memory and of the activations' type; matrices are the model's own."""
        tensor = weight.tensor
        if private.is_unpacked(tensor):
            raise UnsupportedModelError(
                f"{weight.own_name} is unpacked from blocks, which the Metal kernels do not read; supported: files of F16, BF16 or F32"
            )
        if tensor.dtype != self.dtype:
            if len(tensor.shape) > 1:
                raise UnsupportedModelError(
                    f"{weight.own_name} is {tensor.dtype}, the embedding {self.dtype}; one type is supported"
                )
            self.held["copied"] += 1
            return tensor.cast(self.dtype).contiguous()
        if private.is_realized(tensor):
            self.held["in place"] += 1
        else:
            tensor.replace(tensor.contiguous().clone()).realize()
            self.held["realised"] += 1
        return tensor

    def native_calls(self) -> int:
        """Passes built; a replayed graph is not counted, as nothing of ours runs on the host then."""
        return self.calls

    def settle(self) -> None:
        """Nothing waits on the host: keys and values are tensors of the graph."""

    def cached(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]

    def state(self, start_pos: Any) -> Tensor:
        """The position and the slot of row 0, on the device (8,) int32."""
        return (Tensor.zeros(8, dtype=dtypes.int32, device=self.device) + start_pos).cast(dtypes.int32).contiguous()

    def logits(self, tokens: Tensor, start_pos: Any, *, last: bool) -> Tensor:
        """Logits (M, vocab) float32 of tokens (1, M), or (1, vocab) of the last."""
        M = tokens.shape[1]
        fixed = isinstance(M, int)
        room = M if fixed else int(M.vmax)
        last_start = start_pos if isinstance(start_pos, int) else int(start_pos.unbind()[0].vmax)
        if last_start + room > self.capacity:
            raise ShapeError(
                f"{room} tokens from position {last_start} on (or up to it, where it is a variable) do not fit: there are "
                f"{self.config.max_context} positions and {_SPARE} to spare; give fewer tokens at once"
            )
        padded = (tokens if fixed else tokens.pad_to((1, room))).pad_to((1, max(room, 8)))
        ids, state = padded.reshape(max(room, 8)).cast(dtypes.int32).contiguous(), self.state(start_pos)
        self.calls += 1
        keys, values = list(self.keys), list(self.values)
        tiles = [
            self._tile(ids, state, first, min(metal.MAX_ROWS, room - first), keys, values)
            for first in range(0, room, metal.MAX_ROWS)
        ]
        if not private.in_function():
            self.keys, self.values = keys, values
        logits = tiles[0] if len(tiles) == 1 else Tensor.cat(*tiles)
        if last:
            return logits[room - 1 :] if fixed else logits[M - 1 : M].reshape(1, self.config.vocab)
        return logits if fixed else logits.shrink(((0, M), None))

    def _empty(self, *shape: int, dtype: Any = None) -> Tensor:
        return Tensor.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        M, K = x.shape
        how = metal.norm_rows(self.activations, M=M, K=K, eps=self.config.rms_eps)
        return launch(how, [x, weight], [self._empty(M, K)])[0]

    def _added(self, matrix: _Matrix, x: Tensor, residual: Tensor) -> Tensor:
        M = x.shape[0]
        how = metal.matmul_rows(matrix.weights, self.activations, M=M, N=matrix.N, K=matrix.K, epilogue="residual")
        return launch(how, [*matrix.buffers, x, residual], [self._empty(M, matrix.N)])[0]

    def _tile(self, ids: Tensor, state: Tensor, first: int, M: int, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Logits (M, vocab) of rows first to first + M - 1; their keys and values are in the tensors that the lists then have."""
        config, a = self.config, self.activations
        how = metal.embed_rows(self._embed.weights, a, M=M, V=self._embed.N, K=config.hidden, first=first)
        (x,) = launch(how, [*self._embed.buffers, ids], [self._empty(M, config.hidden)])
        shape = {
            "M": M,
            "heads": config.heads,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "ahead": first,
        }
        for i, layer in enumerate(self._layers):
            how = metal.qkv_rope_append(
                layer.qkv[0].weights, a, **shape, K=config.hidden, capacity=self.capacity, eps=config.rms_eps, between=layer.between
            )  # fmt: skip
            matrices = [buffer for matrix in layer.qkv for buffer in matrix.buffers]
            inputs = [*matrices, self._normed(x, layer.input_norm), self._inv_freq, layer.bias, layer.norms, state]
            queries = self._empty(M, config.heads, config.head_dim)
            q, keys[i], values[i] = launch(how, inputs, [queries], [keys[i], values[i]])
            # A grid for the whole context: spans that no row sees end at once, and a captured graph holds for every position.
            how = metal.attend_rows(a, **shape, capacity=self.capacity, positions=self.capacity)
            spans = self._empty(how.grid[1], M, config.heads, config.head_dim + 2, dtype=dtypes.float32)
            (partial,) = launch(how, [q, keys[i], values[i], state], [spans])
            how = metal.attend_spans(a, M=M, heads=config.heads, head_dim=config.head_dim, ahead=first)
            (out,) = launch(how, [partial, state], [self._empty(M, config.heads * config.head_dim)])
            x = self._added(layer.o, out, x)
            how = metal.swiglu_rows(layer.gate.weights, a, M=M, N=layer.gate.N, K=config.hidden)
            inputs = [*layer.gate.buffers, *layer.up.buffers, self._normed(x, layer.post_norm)]
            (h,) = launch(how, inputs, [self._empty(M, layer.gate.N)])
            x = self._added(layer.down, h, x)
        how = metal.logits_rows(self._head.weights, a, M=M, V=config.vocab, K=config.hidden, limit=config.vocab)
        outputs = [
            self._empty(*shape, dtype=dtypes.float32) for shape in ((M, config.vocab), (M, -(-config.vocab // 256), 4))
        ]
        return launch(how, [*self._head.buffers, self._normed(x, self._norm)], outputs)[0]


class _Layer:
    """One decoder layer's weights."""

    def __init__(self, prefix: str, tensors: dict[str, Tensor]) -> None:
        def matrix(name: str) -> _Matrix:
            return _Matrix(tensors[f"{prefix}{name}.weight"])

        attention = f"{prefix}self_attn."
        self.qkv = [matrix(f"self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")]
        self.o, self.gate = matrix("self_attn.o_proj"), matrix("mlp.gate_proj")
        self.up, self.down = matrix("mlp.up_proj"), matrix("mlp.down_proj")
        self.input_norm = tensors[f"{prefix}input_layernorm.weight"]
        self.post_norm = tensors[f"{prefix}post_attention_layernorm.weight"]
        self.between: Between = "nothing"
        self.bias = self.norms = self.input_norm  # any buffer, where the kernel reads none
        if f"{attention}q_proj.bias" in tensors:
            self.between = "bias"
            self.bias = Tensor.cat(
                *(tensors[f"{attention}{name}.bias"] for name in ("q_proj", "k_proj", "v_proj"))
            ).contiguous()
        if f"{attention}q_norm.weight" in tensors:
            self.between = "qk_norm"
            self.norms = Tensor.cat(
                tensors[f"{attention}q_norm.weight"], tensors[f"{attention}k_norm.weight"]
            ).contiguous()

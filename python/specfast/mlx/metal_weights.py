"""An mlx-lm layer's weights as the Metal kernels take them: checked, and used where MLX holds them."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from .. import metal
from ..errors import ShapeError, UnsupportedModelError
from ..metal.launches import Between

PADDING = 8  # elements from which on MLX hands an input over as device memory


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
            raise UnsupportedModelError(f"{path} is {found}, the first matrix {dtype}; one type is supported")
        if self.N * self.K < PADDING or self.buffers[1].size < PADDING:
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
        self.bias = self.norms = mx.zeros(PADDING, dtype)
        if "bias" in attention.q_proj:
            self.between = "bias"
            self.bias = mx.concatenate([attention[name].bias for name in ("q_proj", "k_proj", "v_proj")])
        if "q_norm" in attention:
            self.between = "qk_norm"
            self.norms = mx.concatenate([attention.q_norm.weight, attention.k_norm.weight])
        if "bias" in attention.o_proj or any("bias" in mlp[name] for name in ("gate_proj", "up_proj", "down_proj")):
            raise UnsupportedModelError(f"{path} has biases outside q, k and v, which are not supported")

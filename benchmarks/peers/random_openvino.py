"""Converts a Llama of random weights to OpenVINO, with a KV state, its layers in 4 bits and its embedding and output in 8."""

from __future__ import annotations

from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from specfast.bench.shapes import Shape
from torch import Tensor, nn
from torch.nn import functional

GROUP = 128
DISTINCT_ROWS = 1024  # of a matrix; the rest repeats them


def _matrix(outputs: int, inputs: int) -> Tensor:
    """Random float32 (outputs, inputs) of standard deviation 1 / sqrt(inputs)."""
    rows = torch.randn(min(outputs, DISTINCT_ROWS), inputs) * inputs**-0.5
    return rows.repeat(-(-outputs // len(rows)), 1)[:outputs].contiguous()


class _Linear(nn.Module):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_matrix(outputs, inputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class _Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.input_norm, self.post_norm = _Norm(s.hidden), _Norm(s.hidden)
        self.q, self.o = _Linear(s.heads * s.head_dim, s.hidden), _Linear(s.hidden, s.heads * s.head_dim)
        self.k, self.v = (_Linear(s.kv_heads * s.head_dim, s.hidden) for _ in range(2))
        self.gate, self.up = (_Linear(s.intermediate, s.hidden) for _ in range(2))
        self.down = _Linear(s.hidden, s.intermediate)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, beam: Tensor, past_k: Tensor, past_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, (batch, M, _) = self.shape, x.shape
        h = self.input_norm(x)
        q, k, v = (
            matrix(h).view(batch, M, heads, s.head_dim).transpose(1, 2)
            for matrix, heads in ((self.q, s.heads), (self.k, s.kv_heads), (self.v, s.kv_heads))
        )
        k = torch.cat([past_k.index_select(0, beam), _rotate(k, cos, sin)], dim=2)
        v = torch.cat([past_v.index_select(0, beam), v], dim=2)
        shared = (batch, s.kv_heads, s.heads // s.kv_heads, k.shape[2], s.head_dim)
        flat = (batch, s.heads, k.shape[2], s.head_dim)
        every_k, every_v = (t[:, :, None].expand(shared).reshape(flat) for t in (k, v))
        mixed = functional.scaled_dot_product_attention(_rotate(q, cos, sin), every_k, every_v, attn_mask=mask)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, M, s.heads * s.head_dim))
        h = self.post_norm(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h)), k, v


class _Llama(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(s.vocab, s.hidden, _weight=_matrix(s.vocab, s.hidden), _freeze=True)
        self.layers = nn.ModuleList(_Layer(s) for _ in range(s.layers))
        self.norm, self.head = _Norm(s.hidden), _Linear(s.vocab, s.hidden)
        self.register_buffer("frequencies", 500000.0 ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim))

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, beam: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        x = self.embed(tokens)
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        cos, sin, present = angles.cos(), angles.sin(), []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, cos, sin, mask, beam, past[2 * i], past[2 * i + 1])
            present += [k, v]
        return self.head(self.norm(x)), *present


def _make_stateful(model: ov.Model, s: Shape) -> None:
    """Turns the past and present tensors into states that are empty, of the batch of `tokens`, when reset."""
    states = [f"{kind}.{i}" for i in range(s.layers) for kind in ("k", "v")]
    for tensor, name in zip(
        model.inputs, ["tokens", "positions", "mask", "beam_idx", *(f"past.{n}" for n in states)], strict=True
    ):
        tensor.get_tensor().set_names({name})
    for tensor, name in zip(model.outputs, ["logits", *(f"present.{n}" for n in states)], strict=True):
        tensor.get_tensor().set_names({name})
    shapes = {"tokens": [1, -1], "positions": [1, -1], "mask": [1, 1, -1, -1], "beam_idx": [-1]}
    shapes |= {f"past.{n}": [-1, s.kv_heads, -1, s.head_dim] for n in states}
    model.reshape({name: ov.PartialShape(sizes) for name, sizes in shapes.items()})
    apply_make_stateful_transformation(model, {f"past.{n}": f"present.{n}" for n in states})
    sizes = ops.shape_of(model.input("tokens"), output_type="i64")
    batch = ops.gather(sizes, ops.constant(np.array([0], np.int64)), ops.constant(np.int64(0)))
    rest = [ops.constant(np.array([n], np.int64)) for n in (s.kv_heads, 0, s.head_dim)]
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, *rest], axis=0))])
    model.validate_nodes_and_infer_types()


def write(path: Path, s: Shape) -> None:
    """Writes path (.xml) and its weights beside it (.bin)."""
    torch.manual_seed(0)
    past, M = 3, 2
    with torch.no_grad():
        llama = _Llama(s).eval()
        example = (
            torch.ones(1, M, dtype=torch.long), torch.arange(past, past + M)[None], torch.zeros(1, 1, M, past + M),
            torch.zeros(1, dtype=torch.int32), *(torch.randn(1, s.kv_heads, past, s.head_dim) for _ in range(2 * s.layers)),
        )  # fmt: skip
        model = ov.convert_model(llama, example_input=example)
    del llama
    _make_stateful(model, s)
    model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP, ratio=1.0)
    partial = path.with_name(f"partial-{path.name}")
    ov.save_model(model, partial)
    partial.with_suffix(".bin").rename(path.with_suffix(".bin"))
    partial.rename(path)

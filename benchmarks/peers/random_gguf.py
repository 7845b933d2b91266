"""Writes a Llama of random weights as GGUF, for every benchmark that needs one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from specfast.bench.shapes import Shape

Type = gguf.GGMLQuantizationType
Tensor = tuple[str, int, int, Type]  # name, rows, columns (0 rows: a vector), type
MADE = 1024  # rows of floats that are drawn; a longer matrix repeats them


def tensors(shape: Shape, kind: Type = Type.Q4_0, head: Type = Type.Q6_K) -> Iterator[Tensor]:
    """Every tensor: matrices of a kind, and the head of another; where it is tied to the embedding, so is that.

    The defaults are what llama.cpp's own quantiser gives a Q4_0 file.
    """
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd.weight", shape.vocab, shape.hidden, head if shape.tied else kind
    for i in range(shape.layers):
        yield f"blk.{i}.attn_norm.weight", 0, shape.hidden, Type.F32
        yield f"blk.{i}.attn_q.weight", q, shape.hidden, kind
        yield f"blk.{i}.attn_k.weight", kv, shape.hidden, kind
        yield f"blk.{i}.attn_v.weight", kv, shape.hidden, kind
        yield f"blk.{i}.attn_output.weight", shape.hidden, q, kind
        yield f"blk.{i}.ffn_norm.weight", 0, shape.hidden, Type.F32
        yield f"blk.{i}.ffn_gate.weight", shape.intermediate, shape.hidden, kind
        yield f"blk.{i}.ffn_up.weight", shape.intermediate, shape.hidden, kind
        yield f"blk.{i}.ffn_down.weight", shape.hidden, shape.intermediate, kind
    yield "output_norm.weight", 0, shape.hidden, Type.F32
    if not shape.tied:
        yield "output.weight", shape.vocab, shape.hidden, head


def streamed_bytes(shape: Shape) -> int:
    """Bytes of weights one pass reads: all but an embedding of its own."""
    total = 0
    for name, rows, columns, kind in tensors(shape):
        if name != "token_embd.weight" or shape.tied:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            total += max(rows, 1) * columns // block * size
    return total


def _bytes_per_row(columns: int, kind: Type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if columns % block:
        raise ValueError(f"{columns} columns are no whole number of {kind.name} blocks of {block}")
    return columns // block * size


def _random_matrix(random: np.random.Generator, rows: int, columns: int, kind: Type) -> npt.NDArray[np.uint8]:
    """Weights of standard deviation 1 / sqrt(columns), of blocks through their f16 scale: (rows, bytes) uint8."""
    if kind == Type.F16:
        made = random.standard_normal((min(rows, MADE), columns), np.float32) / np.sqrt(columns, dtype=np.float32)
        return np.resize(made.astype(np.float16).view(np.uint8), (rows, 2 * columns))
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = random.integers(0, 256, (rows, _bytes_per_row(columns, kind) // size, size), dtype=np.uint8)
    # Q4_0: scale, then 4-bit values less 8 (deviation 4.6). Q6_K: 6-bit values less 32 (18.5), int8 scales (74), then the scale.
    at, deviation = (0, 4.6) if kind == Type.Q4_0 else (size - 2, 18.5 * 74)
    blocks[:, :, at : at + 2] = np.array([columns**-0.5 / deviation], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write(
    path: Path,
    shape: Shape,
    kind: Type = Type.Q4_0,
    head: Type = Type.Q6_K,
    max_context: int = 8192,
    seed: int = 0,
) -> None:
    """Writes the file tensor by tensor under another name, so that an interrupted run leaves no half model.

    Types are Q4_0, Q6_K and F16; see `tensors`.
    """
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_context_length(max_context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")
    writer.add_token_list([f"t{i}" for i in range(shape.vocab)])  # tinygrad counts them
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    every = list(tensors(shape, kind, head))
    for name, rows, columns, of in every:
        if of == Type.F32:
            writer.add_tensor_info(name, (columns,), np.dtype(np.float32), 4 * columns)
        else:
            width = _bytes_per_row(columns, of)
            writer.add_tensor_info(name, (rows, width), np.dtype(np.uint8), rows * width, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(seed)
    for _, rows, columns, of in every:
        writer.write_tensor_data(
            np.ones(columns, np.float32) if of == Type.F32 else _random_matrix(random, rows, columns, of)
        )
    writer.close()
    partial.rename(path)

"""Writes a Llama of random weights as GGUF, with the types llama.cpp's own quantiser gives a Q4_0 file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from specfast.bench.shapes import Shape

F32, Q4_0, Q6_K = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q4_0", "Q6_K"))
Tensor = tuple[str, int, int, gguf.GGMLQuantizationType]  # name, rows, columns (0 rows: a vector), type


def tensors(shape: Shape) -> Iterator[Tensor]:
    """Every tensor. The output matrix is Q6_K; where it is tied to the embedding, so is that."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd.weight", shape.vocab, shape.hidden, Q6_K if shape.tied else Q4_0
    for i in range(shape.layers):
        yield f"blk.{i}.attn_norm.weight", 0, shape.hidden, F32
        yield f"blk.{i}.attn_q.weight", q, shape.hidden, Q4_0
        yield f"blk.{i}.attn_k.weight", kv, shape.hidden, Q4_0
        yield f"blk.{i}.attn_v.weight", kv, shape.hidden, Q4_0
        yield f"blk.{i}.attn_output.weight", shape.hidden, q, Q4_0
        yield f"blk.{i}.ffn_norm.weight", 0, shape.hidden, F32
        yield f"blk.{i}.ffn_gate.weight", shape.intermediate, shape.hidden, Q4_0
        yield f"blk.{i}.ffn_up.weight", shape.intermediate, shape.hidden, Q4_0
        yield f"blk.{i}.ffn_down.weight", shape.hidden, shape.intermediate, Q4_0
    yield "output_norm.weight", 0, shape.hidden, F32
    if not shape.tied:
        yield "output.weight", shape.vocab, shape.hidden, Q6_K


def streamed_bytes(shape: Shape) -> int:
    """Bytes of weights one pass reads: all but an embedding of its own."""
    total = 0
    for name, rows, columns, kind in tensors(shape):
        if name != "token_embd.weight" or shape.tied:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            total += max(rows, 1) * columns // block * size
    return total


def _bytes_per_row(columns: int, kind: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if columns % block:
        raise ValueError(f"{columns} columns are no whole number of {kind.name} blocks of {block}")
    return columns // block * size


def _random_matrix(
    random: np.random.Generator, rows: int, columns: int, kind: gguf.GGMLQuantizationType
) -> npt.NDArray[np.uint8]:
    """Random blocks whose f16 scale gives weights of standard deviation 1 / sqrt(columns): (rows, bytes) uint8."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = random.integers(0, 256, (rows, _bytes_per_row(columns, kind) // size, size), dtype=np.uint8)
    # Q4_0: scale, then 4-bit values less 8 (deviation 4.6). Q6_K: 6-bit values less 32 (18.5), int8 scales (74), then the scale.
    at, deviation = (0, 4.6) if kind == Q4_0 else (size - 2, 18.5 * 74)
    blocks[:, :, at : at + 2] = np.array([columns**-0.5 / deviation], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, shape: Shape, max_context: int = 8192, seed: int = 0) -> None:
    """Writes the file tensor by tensor under another name, so that an interrupted run leaves no half model."""
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
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, rows, columns, kind in tensors(shape):
        if kind == F32:
            writer.add_tensor_info(name, (columns,), np.dtype(np.float32), 4 * columns)
        else:
            width = _bytes_per_row(columns, kind)
            writer.add_tensor_info(name, (rows, width), np.dtype(np.uint8), rows * width, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(seed)
    for _, rows, columns, kind in tensors(shape):
        writer.write_tensor_data(
            np.ones(columns, np.float32) if kind == F32 else _random_matrix(random, rows, columns, kind)
        )
    writer.close()
    partial.rename(path)

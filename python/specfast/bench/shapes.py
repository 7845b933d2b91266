"""Decoder shapes to measure, by name or read from a model directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import embedded
from ..architecture import read_config
from ..errors import ConfigurationError


@dataclass(frozen=True)
class Shape:
    """Sizes of one decoder."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    qkv_bias: bool = False


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.2-1b", 2048, 16, 32, 8, 64, 8192, 128256, True),
        Shape("llama-3.2-3b", 3072, 28, 24, 8, 128, 8192, 128256, True),
        Shape("llama-3.1-8b", 4096, 32, 32, 8, 128, 14336, 128256, False),
        Shape("qwen-2.5-0.5b", 896, 24, 14, 2, 64, 4864, 151936, True, True),
        Shape("qwen-2.5-1.5b", 1536, 28, 12, 2, 128, 8960, 151936, True, True),
        Shape("qwen-2.5-7b", 3584, 28, 28, 4, 128, 18944, 152064, False, True),
        # Drafts over the same vocabulary: 81 and 149 million parameters, most of them embeddings.
        Shape("draft-128k", 512, 4, 8, 2, 64, 1536, 128256, True),
        Shape("draft-150m", 768, 8, 12, 4, 64, 2048, 128256, True),
    )
}


_EMBEDDED: dict[str, Literal["target", "draft"]] = {"demo": "target", "demo-draft": "draft"}


def find_shape(name: str) -> Shape:
    """A shape by name; `demo` and `demo-draft` are the embedded pair's; anything else is a model directory.

    Raises:
        ConfigurationError: neither a known name nor a directory.
    """
    if name in SHAPES:
        return SHAPES[name]
    directory = embedded.path(_EMBEDDED[name]) if name in _EMBEDDED else Path(name)
    if not directory.is_dir():
        known = ", ".join((*SHAPES, *_EMBEDDED))
        raise ConfigurationError(f"shape {name!r} is unknown; choose {known}, or a model directory")
    c = read_config(directory)
    return Shape(
        name, c.hidden, c.layers, c.heads, c.kv_heads, c.head_dim, c.intermediate, c.vocab, bool(c.tied), c.model_type == "qwen2"
    )  # fmt: skip

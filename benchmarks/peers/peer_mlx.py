"""MLX's CPU backend as it comes: mlx-lm's Llama, 4 bits in groups of 64.

Scales and activations are float32, its fastest type on x86, which has no vector code for 16-bit ones: bfloat16 takes ten times as long.
"""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from engines import check_logits, random_tokens
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import KVCache
from mlx_lm.models.llama import Model, ModelArgs
from specfast.bench.shapes import Shape, find_shape

GROUP, BITS, DTYPE = 64, 4, mx.float32


def _model(s: Shape) -> Model:
    """A quantised Llama of random words and scales; the arrays its constructors describe are never computed."""
    model = Model(
        ModelArgs(
            model_type="llama", hidden_size=s.hidden, num_hidden_layers=s.layers, intermediate_size=s.intermediate,
            num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim, vocab_size=s.vocab,
            rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=s.tied,
        )
    )  # fmt: skip
    nn.quantize(model, GROUP, BITS)
    random = np.random.default_rng(0)

    def fill(name: str, x: mx.array) -> mx.array:
        if x.dtype == mx.uint32:
            return mx.array(random.integers(0, 2**32, x.shape, dtype=np.uint32))
        if name.endswith("norm.weight"):
            return mx.ones(x.shape, DTYPE)
        # Words are 0 to 15 with deviation 4.6 about 7.5.
        scale = (x.shape[-1] * GROUP) ** -0.5 / 4.6
        return mx.full(x.shape, -7.5 * scale if name.endswith("biases") else scale, DTYPE)

    filled: list[tuple[str, Any]] = [(name, fill(name, x)) for name, x in tree_flatten(model.parameters())]
    model.update(tree_unflatten(filled))
    mx.eval(model.parameters())
    return model


class Mlx:
    """A model and one cache per layer, filled with random keys and values: computing them takes minutes."""

    def __init__(self, shape: str, context: int) -> None:
        sizes = find_shape(shape)
        mx.set_default_device(mx.cpu)
        self.vocab, self.random = sizes.vocab, np.random.default_rng(1)
        self.model = _model(sizes)
        self.caches = [KVCache() for _ in range(sizes.layers)]
        for cache in self.caches:
            one = (1, sizes.kv_heads, context, sizes.head_dim)
            cache.update_and_fetch(*(mx.random.normal(one, DTYPE) for _ in range(2)))
        check_logits(np.array(self._forward(2)[1].astype(mx.float32))[0], 2, self.vocab)
        self.about = {
            "version": f"mlx {mx.__version__}, mlx-lm {importlib.metadata.version('mlx-lm')}",
            "weights": f"{BITS} bit group {GROUP}, float32 scales and activations, one thread",
            "weight_bytes": sum(x.nbytes for _, x in tree_flatten(self.model.parameters())),
        }

    def _forward(self, M: int) -> tuple[float, mx.array]:
        tokens = mx.array(random_tokens(self.random, M, self.vocab))[None]
        mx.eval(tokens)
        start = time.perf_counter()
        logits = self.model(tokens, self.caches)
        mx.eval(logits)
        seconds = time.perf_counter() - start
        for cache in self.caches:
            cache.trim(M)
        return seconds, logits

    def rows(self, M: int) -> float:
        return self._forward(M)[0]


def prepare(shape: str, cache: Path) -> None:
    """Nothing: the weights are made in memory."""


def start(shape: str, context: int, threads: int, cache: Path) -> Mlx:
    return Mlx(shape, context)

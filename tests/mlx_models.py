"""Tiny random mlx-lm models, built without files, in every weight format."""

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models import llama, qwen2
from random_checkpoints import LLAMA3
from specfast.mlx import KVCache, graph, primitives

try:
    from mlx_lm.generate import generate_step, speculative_generate_step
    from mlx_lm.models import qwen3
except ImportError:  # an mlx-lm of 2024
    from mlx_lm.utils import generate_step, speculative_generate_step

    qwen3 = None

__all__ = [
    "ARCHITECTURES",
    "CACHE",
    "FORMATS",
    "PATH",
    "generate_step",
    "logits_of",
    "random_model",
    "reference_logits",
    "speculative_generate_step",
]

# What accelerated models run on in this installation, and the caches they make.
PATH, CACHE = ("native", KVCache) if primitives.why_not() else ("primitives", graph.KVCache)
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "max_position_embeddings": 512,
}
ARCHITECTURES = {
    "llama": (llama, {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True, "head_dim": 32}),
    "llama-untied": (llama, {"rope_theta": 10000.0, "tie_word_embeddings": False}),
    "llama-linear": (llama, {"rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True}),
    "mistral": (llama, {"rope_theta": 1000000.0, "tie_word_embeddings": False, "head_dim": 64}),
    "qwen2": (qwen2, {"rope_theta": 1000000.0, "tie_word_embeddings": False}),
    "qwen3": (qwen3, {"rope_theta": 1000000.0, "tie_word_embeddings": True, "head_dim": 32}),
}
if qwen3 is None:
    del ARCHITECTURES["qwen3"]
FORMATS = ("q4g32", "q4g64", "q4g128", "q8g32", "q8g64", "q8g128", "bf16", "f16", "f32")
_DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}


def random_model(name="llama", weights="q4g64", seed=0, **overrides):
    """An mlx-lm model; quantised ones have bfloat16 scales."""
    module, options = ARCHITECTURES[name]
    values = {"model_type": name.partition("-")[0], **SIZES, **options, **overrides}
    model = module.Model(module.ModelArgs.from_dict(values))
    rng = np.random.default_rng(seed)

    def draw(array):
        if array.ndim == 1:
            return mx.array(1 + 0.1 * rng.standard_normal(array.shape).astype(np.float32))
        spread = 2 / np.sqrt(array.shape[1])
        return mx.array(spread * rng.standard_normal(array.shape).astype(np.float32))

    model.update(tree_map(draw, model.parameters()))
    if weights.startswith("q"):
        bits, _, group = weights[1:].partition("g")
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, group_size=int(group), bits=int(bits))
    else:
        model.set_dtype(_DTYPES[weights])
    mx.eval(model.parameters())
    return model


def logits_of(model, tokens, cache=None):
    """(M, vocab) float32."""
    return np.asarray(model(mx.array(np.asarray(tokens, np.uint32))[None], cache=cache)[0].astype(mx.float32))


def reference_logits(name, weights, tokens, seed=0, **overrides):
    """Logits of mlx-lm's own layers in float32, with the very same weights."""
    model = random_model(name, weights, seed, **overrides)
    model.set_dtype(mx.float32)
    return logits_of(model, tokens)

"""Tiny random mlx-lm models whose architecture has no native path, one for each way their caches behave."""

import importlib.util

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path

VOCAB = 64
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
}
WINDOW = 12
HOSTS = {
    "gemma2": ("gemma2", {}),
    "phi3": ("phi3", {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma3_text": ("gemma3_text", {"num_hidden_layers": 3, "sliding_window": WINDOW, "sliding_window_pattern": 3}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        },
    ),
    "mamba": (
        "mamba",
        {
            "state_size": 8,
            "conv_kernel": 4,
            "use_bias": False,
            "use_conv_bias": True,
            "time_step_rank": 4,
            "tie_word_embeddings": True,
        },
    ),
    "jamba": (
        "jamba",
        {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 8,
            "mamba_expand": 2,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "max_position_embeddings": 512,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            "mamba_d_ssm": 64,
            "mamba_d_head": 16,
            "mamba_n_heads": 4,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
            "lm_head_multiplier": 1.0,
        },
    ),
}
HOSTS = {name: made for name, made in HOSTS.items() if importlib.util.find_spec(f"mlx_lm.models.{made[0]}")}
ROTATING = ("gemma3_text", "gpt_oss")


def host_model(name, seed=0):
    """A float32 model."""
    module, options = HOSTS[name]
    lm = importlib.import_module(f"mlx_lm.models.{module}")
    model = lm.Model(lm.ModelArgs.from_dict({"model_type": module, **SMALL, **options}))
    rng = np.random.default_rng(seed)

    def draw(path, array):
        noise = rng.standard_normal(array.shape).astype(np.float32)
        if array.ndim == 1:
            return mx.array(1 + 0.1 * noise)
        return mx.array((0.6 if "embed" in path else 2.0) * noise / np.sqrt(array.shape[-1]))

    model.update(tree_map_with_path(draw, model.parameters()))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model

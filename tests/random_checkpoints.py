"""Random checkpoints of every supported architecture in Hugging Face layout, in any float type, single or sharded."""

import json

import numpy as np
from specfast.convert import to_bf16
from specfast.safetensors_file import TensorView, write_safetensors
from tiny_directories import _MODULES
from tiny_models import MATRICES, random_decoder

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama-untied": ("LlamaForCausalLM", {"rope_theta": 10000.0}),
    "mistral": ("MistralForCausalLM", {"rope_theta": 1000000.0, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {"rope_theta": 1000000.0}),
    "qwen3": ("Qwen3ForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
}


def stored(values, dtype):
    """A tensor in one of the float types."""
    values = np.ascontiguousarray(values, np.float32)
    raw = {"F32": lambda x: x, "F16": lambda x: x.astype(np.float16), "BF16": to_bf16}[dtype](values)
    return TensorView(dtype, values.shape, np.ascontiguousarray(raw).view(np.uint8).reshape(-1))


def write_checkpoint(directory, name, *, dtype="F32", shards=1, seed=0, **overrides):
    """A checkpoint of architecture `name`: config.json and weights; returns the directory."""
    architecture, config = ARCHITECTURES[name]
    kind = name.partition("-")[0]
    decoder = random_decoder(
        seed, V=96, hidden=128, heads=4, kv_heads=2, head_dim=32, architecture=kind, tied=name in ("llama", "qwen3")
    )
    tensors = {"model.embed_tokens.weight": decoder.embed, "model.norm.weight": decoder.norm}
    if decoder.head is not None:
        tensors["lm_head.weight"] = decoder.head
    for i, layer in enumerate(decoder.layers):
        at = f"model.layers.{i}."
        tensors |= {f"{at}{_MODULES[m]}.weight": getattr(layer, m) for m in MATRICES}
        tensors |= {
            f"{at}input_layernorm.weight": layer.input_norm,
            f"{at}post_attention_layernorm.weight": layer.post_norm,
        }
        if kind == "qwen2":
            tensors |= {f"{at}self_attn.{m}_proj.bias": getattr(layer, f"{m}_bias") for m in "qkv"}
        if kind == "qwen3":
            tensors |= {f"{at}self_attn.{m}_norm.weight": getattr(layer, f"{m}_norm") for m in "qk"}
    views = {key: stored(value, dtype) for key, value in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", views)
    else:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        placed = {key: names[i % shards] for i, key in enumerate(sorted(views))}
        for file in names:
            write_safetensors(directory / file, {key: views[key] for key in views if placed[key] == file})
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    values = {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": 128,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": len(decoder.layers[0].gate),
        "vocab_size": 96,
        "max_position_embeddings": 512,
        "rms_norm_eps": decoder.rms_eps,
        "tie_word_embeddings": decoder.head is None,
        **config,
        **overrides,
    }
    (directory / "config.json").write_text(json.dumps(values))
    return directory

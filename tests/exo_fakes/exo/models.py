"""A registry of models."""

from exo.inference.shard import Shard

MLX, TINYGRAD = "MLXDynamicShardInferenceEngine", "TinygradDynamicShardInferenceEngine"


def _card(name, layers, *, tinygrad=True):
    repositories = {MLX: f"mlx-community/{name}-4bit"}
    return {"layers": layers, "repo": repositories | ({TINYGRAD: f"plain/{name}"} if tinygrad else {})}


model_cards = {
    "llama-3.1-8b": _card("Llama-3.1-8B", 2),
    "llama-3.1-70b": _card("Llama-3.1-70B", 2),
    "llama-3.2-3b": _card("Llama-3.2-3B", 1),
    "llama-3.2-1b": _card("Llama-3.2-1B", 1),
    "qwen-2.5-7b": _card("Qwen2.5-7B", 2),
    "qwen-2.5-1.5b": _card("Qwen2.5-1.5B", 1),
    "qwen-2.5-0.5b": _card("Qwen2.5-0.5B", 1),
    "deepseek-v3": _card("DeepSeek-V3", 2, tinygrad=False),
    "llava-1.5-7b-hf": _card("llava-1.5-7b", 2, tinygrad=False),
    "stable-diffusion-2-1-base": _card("stable-diffusion", 2, tinygrad=False),
    "dummy": {"layers": 8, "repo": {"DummyInferenceEngine": "dummy"}},
}


def get_repo(model_id, inference_engine_classname):
    return model_cards.get(model_id, {}).get("repo", {}).get(inference_engine_classname)


def build_base_shard(model_id, inference_engine_classname):
    known = get_repo(model_id, inference_engine_classname)
    return Shard(model_id, 0, 0, model_cards[model_id]["layers"]) if known else None


def build_full_shard(model_id, inference_engine_classname):
    base = build_base_shard(model_id, inference_engine_classname)
    return Shard(model_id, 0, base.n_layers - 1, base.n_layers) if base else None

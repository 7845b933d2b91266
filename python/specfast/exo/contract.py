"""What specfast relies on in exo's modules: a table of signatures and attributes, and the probe that compares.

An addition to exo is made only where its part of the table holds; otherwise exo stays as it is there, and one line says
which. A signature is the names of the parameters in order; defaults and annotations are exo's business.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

CLASS_NAME: Final = "SpeculativeInferenceEngine"

SIGNATURES: Final[Mapping[str, Mapping[str, str]]] = {
    "exo.inference.inference_engine": {
        "get_inference_engine": "inference_engine_name shard_downloader",
        "InferenceEngine.encode": "self shard prompt",
        "InferenceEngine.sample": "self x",
        "InferenceEngine.decode": "self shard tokens",
        "InferenceEngine.infer_prompt": "self request_id shard prompt inference_state",
        "InferenceEngine.infer_tensor": "self request_id shard input_data inference_state",
        "InferenceEngine.load_checkpoint": "self shard path",
        "InferenceEngine.save_checkpoint": "self shard path",
    },
    "exo.orchestration.node": {
        "Node.process_inference_result": "self shard result request_id inference_state",
        "Node.select_best_inference_engine": "self",
        "Node.get_supported_inference_engines": "self",
        "Node.broadcast_supported_engines": "self supported_engines_names",
        "Node.trigger_on_token_callbacks": "self request_id tokens is_finished",
        "Node.broadcast_result": "self request_id result is_finished",
        "Node.process_tensor": "self base_shard tensor request_id inference_state",
        "Node.process_prompt": "self base_shard prompt request_id inference_state",
        "Node.forward_prompt": "self base_shard prompt request_id target_index inference_state",
        "Node.get_current_shard": "self base_shard index",
        "Node.broadcast_opaque_status": "self request_id status",
    },
    "exo.networking.grpc.grpc_peer_handle": {
        "GRPCPeerHandle.send_tensor": "self shard tensor inference_state request_id",
        "GRPCPeerHandle.serialize_inference_state": "self inference_state",
        "GRPCPeerHandle.id": "self",
    },
    "exo.api.chatgpt_api": {
        "ChatGPTAPI.__init__": "self node inference_engine_classname response_timeout on_chat_completion_request default_model system_prompt",
        "ChatGPTAPI.handle_post_chat_completions": "self request",
    },
    "exo.main": {
        "run_model_cli": "node model_name prompt",
        "build_base_shard": "model_id inference_engine_classname",
        "get_repo": "model_id inference_engine_classname",
        "resolve_tokenizer": "repo_id",
    },
    "exo.models": {
        "get_repo": "model_id inference_engine_classname",
        "build_base_shard": "model_id inference_engine_classname",
        "build_full_shard": "model_id inference_engine_classname",
    },
    "exo.inference.tokenizers": {"resolve_tokenizer": "repo_id"},
    "exo.download.new_shard_download": {"ensure_downloads_dir": ""},
    "exo.inference.mlx.sharded_utils": {"load_model_shard": "model_path shard lazy model_config"},
    "exo.inference.shard": {"Shard.__init__": "self model_id start_layer end_layer n_layers"},
}

ATTRIBUTES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "exo.inference.inference_engine": {"": ("InferenceEngine", "inference_engine_classes")},
    "exo.orchestration.node": {
        "Node.__init__": (
            *("inference_engine", "buffered_token_output", "outstanding_requests", "max_generate_tokens"),
            *("device_capabilities", "partitioning_strategy", "peers", "topology", "shard_downloader"),
        ),
    },
    "exo.networking.grpc.grpc_peer_handle": {"": ("GRPCPeerHandle", "mx")},
    "exo.api.chatgpt_api": {"": ("ChatGPTAPI", "web"), "ChatGPTAPI.__init__": ("node", "app", "token_queues")},
    "exo.models": {"": ("model_cards",)},
}
"""By module and function: names the module has (function ""), or that the function's code sets or uses."""


def differences(module: ModuleType, name: str | None = None) -> list[str]:
    """How a module departs from the table; empty when it agrees.

    Args:
        module: one of exo's.
        name: what it is called, if not by its own name.
    """
    name = name or module.__name__
    found = compare(module, name, SIGNATURES.get(name, {}))
    for path, names in ATTRIBUTES.get(name, {}).items():
        function = _find(module, path) if path else None
        known = vars(module) if not path else getattr(getattr(function, "__code__", None), "co_names", ())
        found += [f"{name}{path and '.' + path} has no {needed}" for needed in names if needed not in known]
    return found


def compare(module: ModuleType, name: str, signatures: Mapping[str, str]) -> list[str]:
    """How a module's functions depart from signatures."""
    found: list[str] = []
    for path, expected in signatures.items():
        function = _find(module, path)
        if function is None:
            found.append(f"{name}.{path} is missing")
        elif (got := " ".join(inspect.signature(function).parameters)) != expected:
            found.append(f"{name}.{path} takes ({got}), not ({expected})")
    return found


def _find(module: ModuleType, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found

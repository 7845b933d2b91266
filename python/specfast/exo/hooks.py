"""What is added to exo when its modules are imported. Each addition is made only where exo is as `contract` says."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from ..config import SpeculativeConfig
from ..families import get_model_family_variants, suggest_speculative_config
from ..inference import options_of
from .api import add_speculation_route, honour_requests
from .contract import CLASS_NAME, differences
from .engine import SpeculativeEngine
from .models import model_cards
from .node import emit_many, join_rings, keep_engine, let_state_travel
from .options import CommandLine, command_line, watch_parser
from .run_command import replace_run_command
from .serving import say


def before(name: str) -> None:
    """Called before one of exo's modules runs."""
    if name == "exo.main":
        watch_parser(model_cards)


def after(module: ModuleType) -> None:
    """Called after one of exo's modules ran."""
    wrong = differences(module)
    for needed in _ALSO_NEEDED.get(module.__name__, ()):
        wrong += differences(importlib.import_module(needed))
    if not wrong:
        for add in _ADDITIONS[module.__name__]:
            add(module)
        return
    say(f"this exo differs from the one known ({'; '.join(wrong)}): {_WITHOUT[module.__name__]}")


def add_engine(module: Any) -> None:
    """'speculative' becomes an engine of exo's, with the functions that go with it."""
    original = module.get_inference_engine
    engine_class = type(CLASS_NAME, (SpeculativeEngine, module.InferenceEngine), {"__module__": module.__name__})

    def get_inference_engine(
        inference_engine_name: str, shard_downloader: Any, config: Mapping[str, Any] | SpeculativeConfig | None = None
    ) -> Any:
        """exo's engines by name, and 'speculative'.

        Args:
            config: what suggest_speculative_config returns, or a SpeculativeConfig; None is what was typed.

        Raises:
            ConfigurationError: an option outside its range.
        """
        if inference_engine_name != "speculative":
            return original(inference_engine_name, shard_downloader)
        typed = command_line() if config is None else CommandLine(options_of(config))
        return engine_class(
            shard_downloader,
            typed.resolve(),
            host_engine=lambda name: original(name, shard_downloader),
            max_tokens=typed.max_tokens,
        )

    module.get_inference_engine = get_inference_engine
    module.inference_engine_classes["speculative"] = CLASS_NAME
    module.suggest_speculative_config = suggest_speculative_config
    module.get_model_family_variants = get_model_family_variants
    setattr(module, CLASS_NAME, engine_class)


_ADDITIONS: Mapping[str, tuple[Callable[[ModuleType], None], ...]] = {
    "exo.inference.inference_engine": (add_engine,),
    "exo.orchestration.node": (keep_engine, emit_many, join_rings),
    "exo.networking.grpc.grpc_peer_handle": (let_state_travel,),
    "exo.api.chatgpt_api": (add_speculation_route, honour_requests),
    "exo.main": (replace_run_command,),
}
_ALSO_NEEDED: Mapping[str, tuple[str, ...]] = {
    "exo.inference.inference_engine": (
        *("exo.models", "exo.inference.shard", "exo.inference.tokenizers", "exo.download.new_shard_download"),
    ),
}
_WITHOUT: Mapping[str, str] = {
    "exo.inference.inference_engine": "there is no engine 'speculative'",
    "exo.orchestration.node": "one token a step, no rings, and a change of peers may swap the engine",
    "exo.networking.grpc.grpc_peer_handle": "no speculation over several machines",
    "exo.api.chatgpt_api": "requests are decoded with the options typed, and run on when their client goes",
    "exo.main": "`exo run` is exo's own, without --time",
}

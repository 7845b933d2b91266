"""Engines by name, with the functions and dictionaries that hosts such as exo use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import _core
from .config import SpeculativeConfig, resolve_config
from .engine import Engine
from .errors import ConfigurationError
from .families import family_options, get_model_family_variants, suggest_speculative_config

__all__ = ["get_inference_engine", "get_model_family_variants", "load", "suggest_speculative_config"]

_SUGGESTION_KEYS = {"target_model_id": "target_model", "draft_model_id": "draft_model", "top_k": "top_k_threshold"}


def load(
    target: str | Path | None = None,
    draft: str | Path | None = None,
    *,
    precision: str | None = None,
    max_context: int | None = None,
    isa: str | None = None,
    threads: int | None = None,
    **options: Any,
) -> Engine:
    """An engine over a target and a draft; the models are loaded with the first request.

    Args:
        target: directory, repo id or short name; None is the embedded pair.
        draft: the same for the draft; None takes the embedded draft with the embedded target, a suggestion with auto_config=True,
            and no draft otherwise.
        precision: of the activations: "int8", "bf16" or "f32"; None chooses by the weights.
        max_context: bounds the context below the model's own.
        isa: kernel table; None is the best this CPU runs.
        threads: of native calls, for the whole process.
        **options: the fields of SpeculativeConfig (gamma, temperature, top_k_threshold, lenience, auto_config, ...).

    Raises:
        ConfigurationError: an unknown option or a value outside its range.
    """
    if threads is not None:
        _core.set_num_threads(threads)
    typed = dict(options)
    if target is not None:
        typed["target_model"] = str(target)
    if draft is not None:
        typed["draft_model"] = str(draft)
    resolved = resolve_config(typed, family=family_options(str(target)) if target is not None else None)
    return Engine(resolved, precision, max_context, isa)


def get_inference_engine(name: str, shard_downloader: object, config: Mapping[str, Any] | SpeculativeConfig) -> Engine:
    """The engine a host asks for by name.

    Args:
        name: "speculative".
        shard_downloader: the host's; native models are resolved without it.
        config: what suggest_speculative_config returns, or a SpeculativeConfig.

    Raises:
        ConfigurationError: another name, or a configuration out of range.
    """
    del shard_downloader
    if name != "speculative":
        raise ConfigurationError(f"engine {name!r} is unknown here; specfast provides 'speculative'")
    if isinstance(config, SpeculativeConfig):
        config = {key: getattr(config, key) for key in SpeculativeConfig.__dataclass_fields__}
    return Engine(resolve_config({_SUGGESTION_KEYS.get(key, key): value for key, value in config.items()}))

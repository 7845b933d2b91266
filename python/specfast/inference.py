"""Engines by name, with the functions and dictionaries that hosts such as exo use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import _core
from .config import FIELDS, SpeculativeConfig, resolve_config
from .engine import Engine
from .errors import ConfigurationError
from .families import get_model_family_variants, suggest_speculative_config
from .models import Notify, print_notice

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
    kv_bits: int | None = None,
    notify: Notify = print_notice,
    **options: Any,
) -> Engine:
    """Loads a target and a draft; the engine that runs them.

    Args:
        target: directory, repo id or short name; None is the embedded pair.
        draft: the same for the draft, or "none" for no draft; None takes the embedded draft with the embedded target, a
            suggestion with auto_config=True, and no draft otherwise.
        precision: of the activations: "int8", "bf16" or "f32"; None chooses by the weights.
        max_context: bounds the context below the model's own.
        isa: kernel table; None is the best this CPU runs.
        threads: of native calls, for the whole process; at most the CPUs this process may use, which is said.
        kv_bits: of keys and values: 8 halves the memory they take and rounds them, which stats and results say
            ("int8, kv 8 bit"); None and 16 store bf16, or f32 with f32 activations.
        notify: told, once each, what people should know; prints to stderr.
        **options: the fields of SpeculativeConfig (gamma, temperature, top_k_threshold, lenience, auto_config, ...).

    Raises:
        ConfigurationError: an unknown option or a value outside its range.
        ModelFormatError, UnsupportedModelError, DownloadError: a model that cannot be had.
    """
    set_threads(threads, notify)
    typed = dict(options)
    if target is not None:
        typed["target_model"] = str(target)
    if draft is not None:
        typed["draft_model"] = str(draft)
    engine = Engine(resolve_config(typed), precision, max_context, isa, notify, kv_bits=kv_bits)
    _ = engine.pair
    return engine


def set_threads(threads: int | None, notify: Notify = print_notice) -> None:
    """Sets the threads of native calls; None leaves them.

    More than the CPUs this process may use are cut to those: threads that share one cost a scheduler's time slice
    at each of the many barriers of a pass.

    Args:
        threads: of native calls, for the whole process. Results do not depend on it.
        notify: told when they are cut.

    Raises:
        ConfigurationError: not 1 to 256.
    """
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 256:
        raise ConfigurationError(f"threads is {threads!r}, but must be in 1 to 256; leave it out for all cores")
    usable = _core.usable_cpus()
    if threads > usable:
        notify(f"{threads} threads were asked for, but this process may use {usable} CPUs: {usable} threads are used")
    _core.set_num_threads(min(threads, usable))


def get_inference_engine(
    name: str, shard_downloader: object, config: Mapping[str, Any] | SpeculativeConfig | None = None
) -> Engine:
    """The engine a host asks for by name. Models are loaded with the first request.

    Args:
        name: "speculative".
        shard_downloader: the host's; native models are found without it.
        config: what suggest_speculative_config returns, or a SpeculativeConfig; None is the embedded pair.

    Raises:
        ConfigurationError: another name, or a configuration out of range.
    """
    del shard_downloader
    if name != "speculative":
        raise ConfigurationError(f"engine {name!r} is unknown here; specfast provides 'speculative'")
    return Engine(resolve_config(options_of(config or {})))


def options_of(config: Mapping[str, Any] | SpeculativeConfig) -> dict[str, Any]:
    """A host's configuration under the names of SpeculativeConfig."""
    if isinstance(config, SpeculativeConfig):
        return {key: getattr(config, key) for key in FIELDS}
    if not isinstance(config, Mapping):
        raise ConfigurationError(f"a configuration is a dictionary or a SpeculativeConfig, not {config!r}")
    return {_SUGGESTION_KEYS.get(key, key): value for key, value in config.items()}

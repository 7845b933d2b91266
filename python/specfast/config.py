"""The configuration: names, defaults and ranges of the options, and where each effective value came from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from .errors import ConfigurationError

Gamma = int | Literal["auto"]
Source = Literal["request", "typed", "host", "family", "default"]
ENGINES = ("mlx", "tinygrad", "native")


class _Unset:
    """An option nobody gave; a typed 5 is not a default 5."""

    def __repr__(self) -> str:
        return "UNSET"

    def __bool__(self) -> bool:
        return False


UNSET: Final = _Unset()


def _number(name: str, low: float, high: float, also: float | None = None, hint: str = "") -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigurationError(f"{name} is {value!r}, but must be a number in {low:g} to {high:g}{hint}")
        if not low <= value <= high and value != also:
            allowed = f"{low:g} to {high:g}" + (f" (or {also:g})" if also is not None else "")
            raise ConfigurationError(f"{name} is {value:g}, outside {allowed}{hint}")
        return float(value)

    return check


def _gamma(value: Any) -> Gamma:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 20:
        raise ConfigurationError(f"gamma is {value!r}, but must be an integer in 1 to 20, or 'auto'")
    return value


def _layer(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"early_exit is {value!r}, but must be the number of a layer, from 1 on")
    raise ConfigurationError(
        f"early_exit={value}: drafting by early exit is not available in this version; give a draft model"
    )


def _engine(value: Any) -> str | None:
    if value is None or value == "native":
        return None if value is None else str(value)
    if value in ENGINES:
        raise ConfigurationError(
            f"engine {value!r} is not available in this version; use 'native', which reads the same checkpoints"
        )
    raise ConfigurationError(f"engine {value!r} is unknown; choose one of {', '.join(ENGINES)}")


def _name(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ConfigurationError(f"a model is named by a directory, a repo id or a short name, not by {value!r}")
    return None if value is None else str(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(f"expected true or false, not {value!r}")
    return value


_TOP_K_HINT = "; it is the share of the vocabulary that is cut (to keep a number of tokens, use --top-k)"
_CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "target_model": _name,
    "draft_model": _name,
    "auto_config": _flag,
    "target_engine": _engine,
    "draft_engine": _engine,
    "gamma": _gamma,
    "temperature": _number("temperature", 0.1, 2.0, also=0.0, hint="; 0 is greedy"),
    "top_k_threshold": _number("top_k_threshold", 0.1, 1.0, hint=_TOP_K_HINT),
    "lenience": _number("lenience", 0.5, 2.0),
    "early_exit": _layer,
    "disabled": _flag,
}


@dataclass(frozen=True)
class SpeculativeConfig:
    """What is decoded with what, and how.

    Attributes:
        target_model: directory, repo id or short name; None is the embedded pair's target.
        draft_model: the same for the draft; None means a suggestion (auto_config) or plain decoding.
        auto_config: take draft and options from the target's family.
        target_engine, draft_engine: "native"; None chooses (draft: as the target).
        gamma: tokens drafted per round, 1 to 20, or "auto".
        temperature: 0.1 to 2.0; 0 is greedy.
        top_k_threshold: 0.1 to 1.0; keeps the max(1, ceil((1 - t) V)) largest logits, so 1.0 is greedy.
        lenience: 0.5 to 2.0; a drafted token is accepted with min(1, lenience p / q). Above 1 the law changes.
        early_exit: reserved for drafting with the target's first layers.
        disabled: plain decoding; no draft is fetched or loaded.

    Raises:
        ConfigurationError: a value outside its range, with the limit and the remedy.
    """

    target_model: str | None = None
    draft_model: str | None = None
    auto_config: bool = False
    target_engine: str | None = None
    draft_engine: str | None = None
    gamma: Gamma = 5
    temperature: float = 1.0
    top_k_threshold: float = 0.9
    lenience: float = 1.0
    early_exit: int | None = None
    disabled: bool = False

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(getattr(self, name)))

    @property
    def lossless(self) -> bool:
        """Whether the output law is the target's: always, except for a lenience above 1 when sampling."""
        return self.lenience <= 1.0 or self.temperature == 0.0 or self.disabled


FIELDS = tuple(field.name for field in dataclasses.fields(SpeculativeConfig))


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration with the source of each of its values."""

    config: SpeculativeConfig
    sources: Mapping[str, Source]

    def describe(self) -> str:
        """One line: every effective value and where it came from."""
        shown = (
            f"{name}={getattr(self.config, name)}"
            + ("" if self.sources[name] == "default" else f" ({self.sources[name]})")
            for name in FIELDS
            if not (self.sources[name] == "default" and getattr(self.config, name) in (None, False))
        )
        return ", ".join(shown)


def resolve_config(
    typed: Mapping[str, Any] | None = None,
    *,
    request: Mapping[str, Any] | None = None,
    host: Mapping[str, Any] | None = None,
    family: Mapping[str, Any] | None = None,
) -> ResolvedConfig:
    """Merges options: request > typed > host > family (only with auto_config) > default. UNSET entries do not count.

    Raises:
        ConfigurationError: an unknown option, or a value outside its range.
    """
    layers: list[tuple[Source, Mapping[str, Any]]] = [
        ("request", request or {}),
        ("typed", typed or {}),
        ("host", host or {}),
    ]
    for _, values in layers:
        unknown = sorted(set(values) - set(FIELDS))
        if unknown:
            raise ConfigurationError(f"unknown option {unknown[0]!r}; the options are {', '.join(FIELDS)}")
    if any(values.get("auto_config", UNSET) is True for _, values in layers):
        layers.append(("family", family or {}))
    merged: dict[str, Any] = {}
    sources: dict[str, Source] = dict.fromkeys(FIELDS, "default")
    for name in FIELDS:
        for source, values in layers:
            if values.get(name, UNSET) is not UNSET:
                merged[name], sources[name] = values[name], source
                break
    return ResolvedConfig(SpeculativeConfig(**merged), sources)


def kept_by_threshold(threshold: float, vocab: int) -> int:
    """Tokens a top-k threshold keeps of a vocabulary: max(1, ceil((1 - t) V)), computed without float surprises."""
    return max(1, math.ceil(round((1.0 - threshold) * vocab, 6)))


assert set(_CHECKS) == set(FIELDS)

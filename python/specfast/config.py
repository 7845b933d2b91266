"""The configuration: names, defaults and ranges of the options, and where each effective value came from."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from .errors import ConfigurationError
from .families import family_options

Gamma = int | Literal["auto"]
EarlyExit = int | Literal["auto"] | None
Source = Literal["request", "typed", "host", "family", "default"]
ENGINES = ("mlx", "tinygrad", "native")
RULES = ("token", "block", "coupled")
DRAFTERS = ("model", "suffix", "prompt-lookup", "combined", "none")
NO_DRAFT: Final = "none"


class _Unset:
    """An option nobody gave; a typed 5 is not a default 5."""

    def __repr__(self) -> str:
        return "UNSET"

    def __bool__(self) -> bool:
        return False


UNSET: Final = _Unset()


def _number(name: str, low: float, high: float, also: float | None = None, hint: str = "") -> Callable[[Any], float]:
    allowed = f"{low:g} to {high:g}" + (f" (or {also:g})" if also is not None else "")

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise ConfigurationError(f"{name} is {value!r}, but must be a number in {allowed}{hint}")
        if not low <= value <= high and value != also:
            raise ConfigurationError(f"{name} is {value:g}, outside {allowed}{hint}")
        return float(value)

    return check


def _threshold(value: Any) -> float:
    above = isinstance(value, int | float) and not isinstance(value, bool) and value > 1
    hint = "; it is the share of the vocabulary that is cut, and 1.0 is greedy"
    return _number(
        "top_k_threshold", 0.1, 1.0, hint=hint + ("; to keep a number of tokens use --top-k" if above else "")
    )(value)


def _gamma(value: Any) -> Gamma:
    if isinstance(value, str) and value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 20:
        raise ConfigurationError(
            f"gamma is {value!r}, but must be an integer in 1 to 20, or 'auto'; disable speculation for plain decoding"
        )
    return value


def _layer(value: Any) -> EarlyExit:
    if value is None or (isinstance(value, str) and value == "auto"):
        return None if value is None else "auto"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(
            f"early_exit is {value!r}, but must be a number of layers from 1 to one less than the target has, or 'auto'"
        )
    return value


def _choice(name: str, choices: tuple[str, ...]) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if value is not None and (not isinstance(value, str) or value not in choices):
            raise ConfigurationError(f"{name} is {value!r}, which is unknown; choose one of {', '.join(choices)}")
        return None if value is None else str(value)

    return check


def _name(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ConfigurationError(f"a model is named by a directory, a repo id or a short name, not by {value!r}")
    return value


def _draft_name(value: Any) -> str | None:
    name = _name(value)
    return NO_DRAFT if name is not None and name.lower() == NO_DRAFT else name


def _flag(name: str) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ConfigurationError(f"{name} is {value!r}, but must be true or false")
        return value

    return check


_CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "target_model": _name,
    "draft_model": _draft_name,
    "auto_config": _flag("auto_config"),
    "target_engine": _choice("target_engine", ENGINES),
    "draft_engine": _choice("draft_engine", ENGINES),
    "gamma": _gamma,
    "temperature": _number("temperature", 0.1, 2.0, also=0.0, hint="; 0 is greedy"),
    "top_k_threshold": _threshold,
    "lenience": _number("lenience", 0.5, 2.0),
    "early_exit": _layer,
    "disabled": _flag("disabled"),
    "rule": _choice("rule", RULES),
    "drafter": _choice("drafter", DRAFTERS),
}


def require_whole(name: str, value: Any, least: int, most: int | None = None, hint: str = "") -> None:
    """Checks that a value is an integer of a range; 2.0 and True are none.

    Raises:
        ConfigurationError: names value, range and hint.
    """
    known = isinstance(value, int) and not isinstance(value, bool)
    if not known or value < least or (most is not None and value > most):
        allowed = f"in {least} to {most}" if most is not None else f"at least {least}"
        what = "" if known else "a whole number " if most is not None else "a whole number, "
        raise ConfigurationError(f"{name} is {value!r:.100}, but must be {what}{allowed}{hint}")


def check_option(name: str, value: Any) -> Any:
    """The value an option takes.

    Raises:
        ConfigurationError: a value outside its range, with the limit and the remedy.
    """
    return _CHECKS[name](value)


@dataclass(frozen=True)
class SpeculativeConfig:
    """What is decoded with what, and how.

    Attributes:
        target_model: directory, GGUF file, repo id or short name; None is the embedded pair's target.
        draft_model: the same for the draft; "none" is no draft, whatever else is given. None means the embedded draft for
            the embedded target, else a suggestion (auto_config) or plain decoding.
        auto_config: take draft and options from the target's family.
        target_engine, draft_engine: "mlx", "tinygrad" or "native"; None chooses (draft: as the target).
        gamma: tokens drafted per round, 1 to 20, or "auto".
        temperature: 0.1 to 2.0; 0 is greedy.
        top_k_threshold: 0.1 to 1.0; keeps the max(1, ceil((1 - t) V)) largest logits, so 1.0 is greedy.
        lenience: 0.5 to 2.0; a drafted token is accepted with min(1, lenience p / q). Above 1 the law changes.
        early_exit: draft with this many of the target's first layers, or "auto"; None does not. There is no other draft then.
        disabled: plain decoding; no draft is fetched or loaded.
        drafter: "model", "suffix" (the longest suffix seen before, in prompt or output), "prompt-lookup" (the last 3
            tokens), "combined" (suffix and model) or "none"; None is combined where there is a draft, else suffix.
        rule: how drafted tokens are accepted, "token", "block" or "coupled" (see docs/lossless.md); None is block, or token
            where lenience is not 1. Block and coupled need lenience 1, unless greedy.

    Raises:
        ConfigurationError: a value outside its range, with the limit and the remedy; early_exit and a draft_model, or a drafter other
            than "none".
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
    early_exit: EarlyExit = None
    disabled: bool = False
    rule: str | None = None
    drafter: str | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(getattr(self, name)))
        if self.early_exit is not None and self.draft_model not in (None, NO_DRAFT):
            raise ConfigurationError(
                f"early_exit {self.early_exit} and draft_model {self.draft_model} are two ways to draft; give one of them"
            )
        if self.early_exit is not None and self.drafter not in (None, "none"):
            raise ConfigurationError(
                f"early_exit {self.early_exit} and drafter {self.drafter} are two ways to draft; give one of them"
            )
        if self.rule in ("block", "coupled") and self.lenience != 1.0 and not self.greedy:
            raise ConfigurationError(
                f"the {self.rule} rule takes lenience 1, not {self.lenience:g}; give lenience 1, or the token rule"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token always follows."""
        return self.temperature == 0.0 or self.top_k_threshold == 1.0

    @property
    def effective_rule(self) -> str:
        """The rule that accepts drafted tokens: "greedy", or the one asked for, or the one chosen."""
        if self.greedy:
            return "greedy"
        return self.rule or ("block" if self.lenience == 1.0 else "token")

    @property
    def lossless(self) -> bool:
        """Whether the output law is the target's: always, except for a lenience above 1 when sampling."""
        return self.lenience <= 1.0 or self.greedy or self.disabled or self.drafter == "none"

    def require_available(self) -> None:
        """Refuses what this version cannot do yet.

        Raises:
            ConfigurationError: names the option, what is available, and what to do.
        """
        for name in ("target_engine", "draft_engine"):
            if getattr(self, name) not in (None, "native"):
                raise ConfigurationError(
                    f"{name} {getattr(self, name)!r} is not available in this version; leave it out or use 'native', "
                    "which reads the same checkpoints"
                )


FIELDS = tuple(field.name for field in dataclasses.fields(SpeculativeConfig))
assert set(_CHECKS) == set(FIELDS)
_SHOWN = {
    "target_model": "target",
    "draft_model": "draft",
    "drafter": "drafter",
    "target_engine": "engine",
    "gamma": "gamma",
    "temperature": "temperature",
    "top_k_threshold": "top-k threshold",
    "lenience": "lenience",
    "rule": "rule",
}
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration with the source of each of its values.

    Attributes:
        config: the effective values.
        sources: where each came from.
        typed, host: the options it was resolved from.
    """

    config: SpeculativeConfig
    sources: Mapping[str, Source]
    typed: Mapping[str, Any] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)

    def describe(self, **values: object) -> str:
        """One line with every effective value and where it came from.

        Args:
            **values: what a value became, such as target_model="embedded target" where none was given.
        """
        shown: list[str] = []
        for name, label in _SHOWN.items():
            value = values.get(name, getattr(self.config, name))
            text = f"{value:g}" if isinstance(value, float) else str(value)
            drafting = name == "draft_model" and self.config.early_exit is not None
            shown.append(f"{label} {text} ({self.sources['early_exit' if drafting else name]})")
        shown += [
            f"{name} ({self.sources[name]})" for name in ("auto_config", "disabled") if getattr(self.config, name)
        ]
        return ", ".join(shown)

    def with_request(self, request: Mapping[str, Any]) -> ResolvedConfig:
        """The same with a request's own options, which come first."""
        return resolve_config(self.typed, request=request, host=self.host)

    def with_models(self, target: str | None, draft: str | None) -> ResolvedConfig:
        """The same for other models."""
        return resolve_config({**self.typed, "target_model": target, "draft_model": draft}, host=self.host)


def resolve_config(
    typed: Mapping[str, Any] = _NOTHING, *, request: Mapping[str, Any] = _NOTHING, host: Mapping[str, Any] = _NOTHING
) -> ResolvedConfig:
    """Merges options: request > typed > host > the target's family (only with auto_config) > default.

    Args:
        typed: options someone gave, by the names of SpeculativeConfig; UNSET entries do not count.
        request: options of one request.
        host: the host's own defaults.

    Raises:
        ConfigurationError: an unknown option, or a value outside its range.
    """
    layers: list[tuple[Source, Mapping[str, Any]]] = [("request", request), ("typed", typed), ("host", host)]
    for _, values in layers:
        unknown = sorted(set(values) - set(FIELDS))
        if unknown:
            raise ConfigurationError(f"unknown option {unknown[0]!r}; the options are {', '.join(FIELDS)}")

    def first(name: str) -> tuple[Any, Source] | None:
        given = ((values[name], source) for source, values in layers if values.get(name, UNSET) is not UNSET)
        return next(given, None)

    target, automatic = first("target_model"), first("auto_config")
    if automatic and automatic[0] is True:
        layers.append(("family", family_options(target[0] if target and isinstance(target[0], str) else "")))
    merged: dict[str, Any] = {}
    sources: dict[str, Source] = dict.fromkeys(FIELDS, "default")
    for name in FIELDS:
        if found := first(name):
            merged[name], sources[name] = found
    return ResolvedConfig(SpeculativeConfig(**merged), sources, dict(typed), dict(host))


def kept_by_threshold(threshold: float, vocab: int) -> int:
    """Tokens a top-k threshold keeps of a vocabulary: max(1, ceil((1 - t) V)), exact for decimal thresholds."""
    return max(1, math.ceil(round((1.0 - threshold) * vocab, 6)))

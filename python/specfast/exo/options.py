"""exo's command line with speculation: the flags, their checks, and what was typed."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import hub
from ..cli.options import add_speculation, typed_options
from ..config import NO_DRAFT, UNSET, ResolvedConfig, resolve_config
from ..early_exit import require_exit
from ..errors import ConfigurationError

__all__ = ["CommandLine", "add_options", "command_line", "typed_options", "watch_parser"]

Registry = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class CommandLine:
    """What was typed on exo's command line.

    Attributes:
        typed: speculation's options, by the names of SpeculativeConfig.
        host: exo's own typed defaults (`--default-temp`), under the same names.
        max_tokens: exo's `--max-generate-tokens`.
        time: whether `--time` was given.
    """

    typed: Mapping[str, Any] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    time: bool = False

    def resolve(self) -> ResolvedConfig:
        """The configuration, with the source of each value."""
        return resolve_config(self.typed, host=self.host)


_command_line = CommandLine()


def command_line() -> CommandLine:
    """What this process was started with; nothing typed when exo is used as a library."""
    return _command_line


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--speculative-*`, `--disable-speculative` and `--time`; values out of range are usage errors."""
    group = parser.add_argument_group(
        "speculative decoding (specfast)",
        "with --inference-engine speculative: a draft model proposes, the target checks",
    )
    add_speculation(group, short=False)
    parser.add_argument(
        "--time",
        action="store_true",
        help="with run, and any engine: prompt tok/s, time to first token, tok/s; acceptance when speculative",
    )


def watch_parser(registry: Callable[[], Registry]) -> None:
    """Extends exo's parser when it parses; parsers without `--inference-engine` are not exo's and parse as ever.

    Args:
        registry: gives exo's models by id.
    """
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        if "--inference-engine" not in self._option_string_actions:
            return original(self, args, namespace)
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
        return parse(self, args, namespace, registry())

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]


def parse(
    parser: argparse.ArgumentParser, args: Sequence[str] | None, namespace: Any, registry: Registry
) -> argparse.Namespace:
    """Parses exo's command line with speculation's flags added, checks them together, and remembers what was typed."""
    global _command_line  # noqa: PLW0603 - one command line a process
    add_options(parser)
    parser._option_string_actions["--inference-engine"].help = "Inference engine (mlx, tinygrad, dummy, or speculative)"
    temperature = parser.get_default("default_temp")
    parser.set_defaults(default_temp=UNSET)
    found: argparse.Namespace = parser.parse_args(args, namespace)
    host = {}
    if found.default_temp is UNSET:
        found.default_temp = temperature
    else:
        host["temperature"] = found.default_temp
    typed = typed_options(found)
    if found.inference_engine == "speculative" and (asked := found.model_name or found.run_model):
        typed.setdefault("target_model", asked)
    _command_line = CommandLine(typed, host, found.max_generate_tokens, found.time)
    if found.inference_engine == "speculative":
        _check(parser, found, registry)
        found.default_model = found.default_model or typed.get("target_model")
    elif typed:
        print(
            "specfast: --speculative-* options have no effect without --inference-engine speculative", file=sys.stderr
        )
    return found


def _check(parser: argparse.ArgumentParser, found: argparse.Namespace, registry: Registry) -> None:
    typed = _command_line.typed
    if found.command in ("train", "eval"):
        parser.error(f"{found.command} does not speculate; use --inference-engine mlx or tinygrad")
    target, asked = typed.get("target_model"), found.model_name or found.run_model
    if target is not None and asked is not None and asked != target:
        parser.error(
            f"run {asked} and --speculative-target-model {target} name different models; give one, or the same twice"
        )
    if wrong := unknown_model(registry, target, typed.get("draft_model")):
        parser.error(wrong)
    if found.max_generate_tokens < 1:
        parser.error(f"--max-generate-tokens is {found.max_generate_tokens}, but must be at least 1")
    try:
        config = without_engines(_command_line.resolve()).config
        config.require_available()
        if target is not None and config.early_exit is not None and not config.disabled:
            require_exit(config.early_exit, registry[target]["layers"], target)
    except ConfigurationError as error:
        parser.error(str(error))


def unknown_model(registry: Registry, target: str | None, draft: str | None) -> str | None:
    """What is wrong with the names of a pair: exo must know a target; a draft may also be a repo id or a directory."""
    if target is not None and target not in registry:
        return f"the target {_unknown(target, registry)}"
    if (
        draft is None
        or draft.lower() == NO_DRAFT
        or draft in registry
        or hub.repository(draft) is not None
        or Path(draft).is_dir()
    ):
        return None
    return f"the draft {_unknown(draft, registry)}, nor a repo id (org/name) or a directory"


def _unknown(name: str, registry: Registry) -> str:
    close = difflib.get_close_matches(name, registry, n=3) or sorted(registry)[:4]
    return f"{name!r} is no model of exo's ({', '.join(close)}, ...)"


def without_engines(resolved: ResolvedConfig) -> ResolvedConfig:
    """The same options for the native decoder, which runs the checkpoints of either engine."""
    typed = {name: value for name, value in resolved.typed.items() if not name.endswith("_engine")}
    return resolve_config(typed, host=resolved.host)

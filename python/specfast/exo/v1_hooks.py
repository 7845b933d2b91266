"""What is added to exo's second generation when its modules are imported: only on demand, and where it is as known."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ..cli.options import add_speculation, typed_options
from .contract import compare
from .detection import SWITCH
from .serving import say
from .v1 import MODULES, OPTIONS, speculate

BUILDER = "exo.worker.engines.mlx.builder"


def before(name: str) -> None:
    """Called before one of exo's modules runs."""
    if name == "exo.main":
        watch_parser()


def after(module: ModuleType) -> None:
    """Called after one of exo's modules ran."""
    if module.__name__ != BUILDER or os.environ.get(SWITCH) != "1":
        return
    wrong = [each for name in MODULES for each in compare(importlib.import_module(name), name, MODULES[name])]
    if wrong:
        say(f"this exo differs from the one known ({'; '.join(wrong)}): it decodes plainly")
    else:
        speculate(module)


def watch_parser() -> None:
    """Extends exo's parser when it parses; parsers without `--no-batch` are not exo's and parse as ever."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        if "--no-batch" not in self._option_string_actions:
            return original(self, args, namespace)
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
        return parse(self, sys.argv[1:] if args is None else args, namespace)

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]


def parse(parser: argparse.ArgumentParser, args: Sequence[str], namespace: Any) -> argparse.Namespace:
    """Parses exo's command line with speculation's flags, and hands those on to the processes that run models."""
    if args and args[0] in ("run", "eval", "train"):
        model = args[1] if len(args) > 1 and not args[1].startswith("-") else "MODEL"
        parser.error(
            f"this exo has no `{args[0]}`: start `exo` with the same --speculative-* options, place {model} in its dashboard "
            "or with POST /place_instance, and send the prompt to POST /v1/chat/completions"
        )
    known = {action.dest for action in parser._actions}
    group = parser.add_argument_group(
        "speculative decoding (specfast)", f"on a single node; the same as {SWITCH}=1 with these options"
    )
    add_speculation(group, short=False)
    group.add_argument("--inference-engine", default=None, metavar="ENGINE", help="speculative, or exo's own (mlx)")
    found: argparse.Namespace = parser.parse_args(args, namespace)
    if found.inference_engine not in (None, "speculative", "mlx"):
        parser.error(f"--inference-engine {found.inference_engine}: this exo has mlx, and speculative on top of it")
    typed = typed_options(found)
    if found.inference_engine == "speculative" or (typed and found.inference_engine is None):
        os.environ[SWITCH], os.environ[OPTIONS] = "1", json.dumps(typed)
    for name in set(vars(found)) - known:
        delattr(found, name)  # exo checks that it knows every one
    return found

"""The `specfast` command: errors go to stderr, exit code 2 for usage, 1 for failures, 130 after Ctrl-C."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..errors import ConfigurationError, SpecfastError

COMMANDS = ("generate", "bench", "suggest", "convert", "doctor")
EXAMPLES = """examples:
  specfast generate                                     the embedded pair on a built-in prompt
  specfast generate --compare --temperature 0           plain against speculative, and whether the tokens are the same
  specfast generate --model llama-3.1-8b --draft-model llama-3.2-1b --prompt "Explain quantum computing"
  specfast bench --shape llama-3.2-1b --quant q4g64     what checking M tokens costs on this machine
  specfast suggest llama-3.1-8b                         drafts and options of a model's family
  specfast convert ./Qwen2.5-7B ./qwen-q4 --bits 4      quantise a Hugging Face directory
  specfast doctor                                       kernels and hosts found, and why not

`specfast COMMAND --help` tells more.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each module of COMMANDS has add_parser(subparsers) and run(options)."""
    parser = argparse.ArgumentParser(
        prog="specfast",
        description="Speculative decoding with compiled kernels: faster tokens, the same words.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"specfast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f".{name}", __name__).add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return guarded("specfast", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = build_parser().parse_args(arguments)
    return guarded(f"specfast {options.command}", lambda: int(options.run(options)))


def guarded(command: str, run: Callable[[], int]) -> int:
    """Runs a command; errors become one line on stderr that begins with its name, and an exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: what is printed has nowhere to go
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no failure
    try:
        code = run()
        sys.stdout.flush()
        return code
    except SpecfastError as error:
        return _fail(command, str(error), 2 if isinstance(error, ConfigurationError) else 1)
    except MemoryError:
        return _fail(command, "not enough memory; use a smaller model, or less context (--context)", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has nowhere to go
        return 1
    except OSError as error:  # a full disk, a file that went away
        return _fail(command, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except KeyboardInterrupt:
        return _fail(command, "interrupted", 130)


def _fail(command: str, message: str, code: int) -> int:
    print(f"{command}: {message}", file=sys.stderr)
    return code

"""The `specfast` command: errors go to stderr, exit code 2 for usage, 1 for failures, 130 after Ctrl-C."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

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
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    from .. import __version__  # noqa: PLC0415 - the package imports this module's siblings

    parser = argparse.ArgumentParser(
        prog="specfast",
        description="Speculative decoding with compiled kernels: faster tokens, the same words.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"specfast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f".{name}", __name__).add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except ConfigurationError as error:
        print(f"specfast {options.command}: {error}", file=sys.stderr)
        return 2
    except SpecfastError as error:
        print(f"specfast {options.command}: {error}", file=sys.stderr)
        return 1
    except MemoryError:
        print(f"specfast {options.command}: not enough memory; use a smaller model or --context", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print(f"\nspecfast {options.command}: interrupted", file=sys.stderr)
        return 130

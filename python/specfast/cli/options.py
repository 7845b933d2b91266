"""The options of `specfast generate`: one option may have a short and a documented long name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import DRAFTERS, ENGINES, FIELDS, RULES, UNSET, check_option
from ..errors import ConfigurationError
from ..sampling import TRUNCATIONS

EPILOG = """examples:
  specfast generate --prompt "def fibonacci(n):" --max-tokens 64 --temperature 0
  specfast generate --model ./llama-8b --draft-model ./llama-1b --prompt-file question.txt --time
  specfast generate --speculative-target-model llama-3.1-8b --speculative-auto-config --prompt "Write a story"
  echo "class Stack:" | specfast generate --json | tail -n 1
  specfast generate --compare --temperature 0

A model is a directory (Hugging Face or MLX layout), a GGUF file, a short name (llama-3.2-1b), a repo id (org/name) or a
GGUF file of a repository (org/name:Q4_K_M or org/name/file.gguf), which are downloaded. Exit codes: 0, 2 for usage, 1 for
failures and for --compare when greedy tokens differ, 130 after Ctrl-C.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds all options of generate."""
    prompt = parser.add_argument_group("prompt (default: stdin; on a terminal, or when stdin is empty, a built-in one)")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the text itself")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file; - is stdin")
    prompt.add_argument("--system", metavar="TEXT", help="system message, with a chat template")
    prompt.add_argument("--raw", action="store_true", help="the prompt as it is, without the model's chat template")
    add_speculation(parser.add_argument_group("speculation (the names of one line are one option)"))
    _add_sampling(parser)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--precision", choices=("int8", "bf16", "f32"), help="of activations (int8 for quantised weights, else theirs)"
    )
    machine.add_argument("--kv-bits", type=int, choices=(8, 16), help="of keys and values: 8 halves their memory (16)")
    machine.add_argument("--threads", type=int, metavar="N", help="of native calls (one per core; at most one per CPU)")
    machine.add_argument("--context", type=int, metavar="N", help="bound the context below the model's")
    output = parser.add_argument_group("output")
    output.add_argument("--time", action="store_true", help="prompt tok/s, time to first token, split of the time")
    output.add_argument(
        "--compare",
        action="store_true",
        help="run plain and speculative by turns, three times (a long text once); both figures, and whether tokens are identical",
    )
    output.add_argument("--json", action="store_true", help="the last line is a JSON object")
    output.add_argument("--no-stream", action="store_true", help="print the text when it is complete")
    output.add_argument("--quiet", action="store_true", help="nothing on stderr but warnings and errors")


def typed_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of SpeculativeConfig that were typed."""
    return {name: value for name in FIELDS if (value := getattr(options, name, UNSET)) is not UNSET}


def logit_biases(options: argparse.Namespace) -> dict[int, float]:
    """The biases that were typed, by token id.

    Raises:
        ConfigurationError: two of one token.
    """
    biases: dict[int, float] = {}
    for token, bias in options.logit_bias:
        if token in biases:
            raise ConfigurationError(
                f"--logit-bias of {token} is given twice, {biases[token]:g} and {bias:g}; give one"
            )
        biases[token] = bias
    return biases


def add_speculation(group: Any, *, short: bool = True) -> None:
    """Adds the options of SpeculativeConfig; where none is typed the namespace holds UNSET.

    Args:
        group: a parser or one of its groups.
        short: with their short names too; False for a host's command line, where only the documented long ones fit.
    """

    def add(*names: str, **options: Any) -> None:
        group.add_argument(*(names if short else names[1:]), default=UNSET, **options)

    add(
        *("--model", "--speculative-target-model"),
        **{"dest": "target_model", "type": _model, "metavar": "MODEL"},
        help="target (the embedded pair)" if short else "target (the model that is asked for)",
    )
    add(
        *("--draft-model", "--speculative-draft-model"),
        **{"dest": "draft_model", "metavar": "MODEL"},
        help="draft, of the same tokens; none for plain decoding",
    )
    add(
        *("--auto-config", "--speculative-auto-config"),
        **{"dest": "auto_config", "action": "store_const", "const": True},
        help="draft and options of the target's family; gamma follows measurements",
    )
    engine = {"type": _engine, "metavar": "ENGINE"}
    add(
        *("--target-engine", "--speculative-target-engine"),
        **{"dest": "target_engine", **engine},
        help="native in this version" if short else "mlx (the MLX host), or tinygrad (its checkpoints, natively)",
    )
    add(
        *("--draft-engine", "--speculative-draft-engine"),
        **{"dest": "draft_engine", **engine},
        help="mlx, tinygrad or none (as the target's)",
    )
    add(
        *("--gamma", "--speculative-gamma"),
        **{"dest": "gamma", "type": parse_gamma, "metavar": "1-20|auto"},
        help="tokens drafted per round (5); auto measures what pays",
    )
    add(
        *("--temperature", "--speculative-temperature"),
        **{"dest": "temperature", "type": parse_number("temperature"), "metavar": "0|0.1-2.0"},
        help="sampling temperature (1.0); 0 is greedy",
    )
    add(
        *("--top-k-threshold", "--speculative-top-k"),
        **{"dest": "top_k_threshold", "type": parse_number("top_k_threshold"), "metavar": "0.1-1.0"},
        help="share of the vocabulary that is cut (0.9); 1.0 is greedy",
    )
    add(
        *("--lenience", "--speculative-lenience"),
        **{"dest": "lenience", "type": parse_number("lenience"), "metavar": "0.5-2.0"},
        help="above 1.0 accepts more, and changes the output law (1.0)",
    )
    add(
        *("--rule", "--speculative-rule"),
        **{"dest": "rule", "choices": RULES, "metavar": "RULE"},
        help="token, block or coupled (block; with --seed and an automatic gamma coupled; token where lenience is not 1)",
    )
    add(
        *("--drafter", "--speculative-drafter"),
        **{"dest": "drafter", "choices": DRAFTERS, "metavar": "DRAFTER"},
        help="model, suffix, prompt-lookup, combined or none (combined where there is a draft, else suffix)",
    )
    add(
        *("--early-exit", "--speculative-early-exit"),
        **{"dest": "early_exit", "type": parse_early_exit, "metavar": "LAYER|auto"},
        help="draft with the target's first layers instead of a draft model; auto measures which",
    )
    add(
        *("--plain", "--disable-speculative"),
        **{"dest": "disabled", "action": "store_const", "const": True},
        help="plain decoding; no draft is fetched or loaded",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens to generate (256)")
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    group.add_argument(
        "--top-k", type=int, metavar="N", help="keep the N likeliest tokens, 0 for all; replaces an untyped threshold"
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the fewest tokens with mass P")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P times the likeliest")
    group.add_argument(
        "--truncation",
        choices=TRUNCATIONS,
        default="hf",
        help="hf tempers, then truncates (hf); mlx the other way round",
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="on tokens of prompt and text; 1.0 is none"
    )
    group.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="A", help="on generated tokens, -2 to 2; 0 is none"
    )
    group.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="A", help="the same, times their number; 0 is none"
    )
    group.add_argument(
        "--penalty-window", type=int, default=0, metavar="N", help="penalties look at the last N tokens (0, all)"
    )
    group.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        default=[],
        metavar="ID=B",
        help="added to a logit; may be repeated",
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on after an end token")


def parse_number(name: str) -> Callable[[str], float]:
    """A number that SpeculativeConfig accepts for one of its options; argparse tells what is wrong with others."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        return float(_in_range(name, value))

    return parse


def _in_range(name: str, value: Any) -> Any:
    try:
        return check_option(name, value)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_gamma(text: str) -> int | str:
    """A number of tokens to draft, or auto."""
    try:
        value = text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.100} is neither an integer in 1 to 20 nor 'auto'") from None
    return value if value == "auto" else int(_in_range("gamma", value))


def parse_early_exit(text: str) -> int | str:
    """A number of layers, or auto."""
    try:
        value = text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.100} is neither the number of a layer nor 'auto'") from None
    return value if value == "auto" else int(_in_range("early_exit", value))


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a token id, =, and a number, such as 13=-1.5") from None


def _model(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _engine(text: str) -> str | None:
    if text.lower() == "none":
        return None
    if text not in ENGINES:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; choose one of {', '.join(ENGINES)}, none")
    return text

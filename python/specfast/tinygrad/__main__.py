"""`python -m specfast.tinygrad`: streams text from a GGUF file that tinygrad loads, with a draft from another."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..chat import chat_template, render_chat
from ..checkpoint import PRECISIONS
from ..cli import guarded
from ..cli.generate import print_figures, read_prompt
from ..cli.options import parse_early_exit, parse_gamma, parse_number
from ..compatibility import compare_models
from ..config import DRAFTERS, require_whole
from ..early_exit import require_exit
from ..errors import ConfigurationError, IncompatibleDraftError, SpecfastError
from ..generation import Generation, Result
from ..gguf_file import is_gguf, open_gguf
from ..gguf_model import gguf_config
from ..inference import set_threads
from ..sampling import SamplingParams
from ..text import StopStrings, StreamDecoder, TextStream
from ..tokenizer import Tokenizer
from . import require_host

COMMAND = "python -m specfast.tinygrad"
EXAMPLES = """examples:
  python -m specfast.tinygrad --model llama-8b-Q4_0.gguf --draft-model llama-1b-Q4_0.gguf --prompt "Tell a story"
  python -m specfast.tinygrad --model F.gguf --early-exit auto --gamma 4 --temperature 0.8 --seed 1 --prompt "def main():"
  echo "class Stack:" | python -m specfast.tinygrad --model F.gguf --drafter suffix --raw --time

A draft never changes the law of the text, unless --lenience is above 1. The first line on stderr says what runs, and how.
Exit codes: 0, 2 for usage, 1 for failures, 130 after Ctrl-C.

environment: DEV (tinygrad's device: CPU, or METAL on a Mac), CC (the clang that its CPU device compiles with),
XDG_CACHE_HOME (where it keeps what it compiled), SPECFAST_ISA (kernels to use in place of the best)
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options; needs no tinygrad."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Generates text from a GGUF model in tinygrad, with specfast's kernels and speculative decoding.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, type=_file, metavar="F.gguf", help="the target")
    prompt = parser.add_argument_group("prompt (default: stdin; on a terminal, or when stdin is empty, a built-in one)")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", metavar="TEXT", help="the text; goes through the model's chat template if it has one"
    )
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file; - is stdin")
    prompt.add_argument("--raw", action="store_true", help="leave the chat template out")
    _add_speculation(parser.add_argument_group("speculation"))
    text = parser.add_argument_group("text")
    text.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens to generate (256)")
    text.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 to 100; 0 is greedy (0)")
    text.add_argument("--top-k", type=int, default=0, metavar="N", help="keep the N likeliest tokens; 0 keeps all (0)")
    text.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the fewest tokens with mass P (1)")
    text.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P times the likeliest (0)"
    )
    text.add_argument(
        "--seed", type=int, metavar="N", help="makes sampling repeatable: with an automatic gamma by the coupled rule"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--precision", choices=PRECISIONS, help="of activations (int8 for quantised weights, else theirs)"
    )
    machine.add_argument("--threads", type=int, metavar="N", help="of native calls (one per core)")
    machine.add_argument("--context", type=int, metavar="N", help="bound the context below the model's")
    output = parser.add_argument_group("output")
    output.add_argument("--time", action="store_true", help="where the time went, and who drafted what, on stderr")
    output.add_argument("--json", action="store_true", help="one JSON object in place of the text")
    output.add_argument("--quiet", action="store_true", help="nothing on stderr but warnings and errors")
    return parser


def _add_speculation(group: Any) -> None:
    group.add_argument("--draft-model", type=_file, metavar="G.gguf", help="a smaller model of the same tokens")
    group.add_argument(
        "--drafter",
        choices=(*DRAFTERS, "early-exit"),
        metavar="DRAFTER",
        help="model or combined (with suffix) with --draft-model, early-exit with --early-exit, suffix, prompt-lookup or none "
        "(model with a draft, early-exit with an exit, else suffix, which copies from the text so far)",
    )
    group.add_argument(
        "--early-exit",
        type=parse_early_exit,
        metavar="LAYERS|auto",
        help="draft with the target's first layers; auto measures how many",
    )
    group.add_argument(
        "--gamma", type=parse_gamma, metavar="1-20|auto", help="tokens drafted a round; auto measures what pays (auto)"
    )
    group.add_argument(
        "--lenience",
        type=parse_number("lenience"),
        default=1.0,
        metavar="0.5-2",
        help="above 1 accepts more drafts, and changes the law of the text (1)",
    )


def _file(text: str) -> Path:
    path = Path(text)
    if not is_gguf(path):
        kind = "a directory" if text and path.is_dir() else "no name of one, NAME.gguf" if text else "empty"
        raise argparse.ArgumentTypeError(f"a GGUF file is needed, and {text!r:.100} is {kind}")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"{COMMAND}: {message}", file=sys.stderr)

    def run() -> int:
        options = build_parser().parse_args(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = tell
            return _run(options)

    return guarded(COMMAND, run)


def _run(options: argparse.Namespace) -> int:
    if options.time and options.quiet:
        raise ConfigurationError("--time prints to stderr, where --quiet allows nothing; give one of them")
    _check(options)
    try:
        require_host()
    except ImportError as error:
        raise SpecfastError(str(error)) from None
    from .generate import drafter_name  # noqa: PLC0415 - tinygrad is needed from here on

    drafter_name(options.drafter, options.early_exit, draft=options.draft_model is not None)
    config = gguf_config(open_gguf(options.model))
    if options.early_exit is not None:
        require_exit(options.early_exit, config.layers, options.model.name)
    if options.draft_model is not None and not compare_models(options.model, options.draft_model).tokens_match:
        raise IncompatibleDraftError(
            f"the tokens of {options.draft_model} are not those of {options.model}; take a draft of its family, or --drafter suffix"
        )
    generation, capacity = _begin(options, config.eos_ids)
    try:
        for chunk in generation:
            if not options.json:
                print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        pass  # the result says so
    finally:
        generation.close()
    return _end(generation.result(), capacity, options)


def _check(options: argparse.Namespace) -> None:
    """What no model is needed for."""
    require_whole("--max-tokens", options.max_tokens, 1)
    if options.context is not None:
        require_whole("--context", options.context, 1, hint="; leave it out for the model's own")
    names = ("temperature", "top_k", "top_p", "min_p")
    SamplingParams(**{name: getattr(options, name) for name in names}, seed=0 if options.seed is None else options.seed)
    set_threads(options.threads)


def _tokens(options: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    prompt = read_prompt(options)
    template = None if options.raw else chat_template(options.model, tokenizer)
    if template is None:
        return tokenizer.encode(prompt)
    tokens = tokenizer.encode(render_chat(template, [{"role": "user", "content": prompt}], tokenizer), special=False)
    if not tokens:
        raise ConfigurationError(
            f"the chat template of {options.model} makes no text of the prompt; --raw passes the prompt as it is"
        )
    return tokens


def _begin(options: argparse.Namespace, eos_ids: Sequence[int]) -> tuple[Generation, int]:
    """Loads the models; the generation, and what its context holds. Says what runs."""
    from .accelerate import accelerate, report  # noqa: PLC0415
    from .generate import load_gguf, stream_generate  # noqa: PLC0415

    tokenizer = Tokenizer(options.model)
    tokens = _tokens(options, tokenizer)
    model = accelerate(load_gguf(options.model, options.context), options.precision)
    draft = None if options.draft_model is None else load_gguf(options.draft_model, options.context)
    generation = stream_generate(
        model, tokens, options.max_tokens, draft,
        drafter=options.drafter, early_exit=options.early_exit, num_draft_tokens=options.gamma,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
        lenience=options.lenience, seed=options.seed, eos_ids=eos_ids,
        text=TextStream(StreamDecoder(tokenizer, continues=True), StopStrings(())),
    )  # fmt: skip
    options.report = report(model)
    if not options.quiet:
        terms, drafts = generation.terms, "none" if draft is None else options.draft_model.name
        law = "lossless" if terms.lossless else f"lenience {options.lenience:g}"
        print(
            f"specfast: target {options.model.name} ({_path(options.report)}), draft {drafts}, drafter {terms.drafter}, gamma "
            f"{terms.gamma}, rule {terms.rule}, {law}, seed {terms.seed}",
            file=sys.stderr,
        )
    return generation, int(model.max_context)


def _path(found: Any) -> str:
    if found.path == "stock":
        return f"tinygrad's own layers: {found.reason}"
    return f"path {found.path}, precision {found.precision}, {found.isa}{found.reason and f': {found.reason}'}"


def _end(result: Result, capacity: int, options: argparse.Namespace) -> int:
    stats = result.stats
    if options.json:
        terms = {name: getattr(result.terms, name) for name in ("seed", "drafter", "gamma", "rule", "precision")}
        found = options.report
        about = {"path": found.path, "reason": found.reason, "weights": dict(found.weights), "notice": found.notice}
        print(
            json.dumps(
                {"text": result.text, "token_ids": result.token_ids, "finish_reason": result.finish_reason,
                 "lossless": result.lossless, **terms, "report": about, "stats": stats.as_dict()}
            )
        )  # fmt: skip
    else:
        print(flush=True)
    if result.finish_reason == "context":
        print(f"{COMMAND}: the context of {capacity} tokens is full; the text may go on", file=sys.stderr)
    if not options.quiet:
        print(f"drafted {stats.drafted} tokens, {stats.accepted} accepted", file=sys.stderr)
        print_figures(stats, "", options, sys.stderr)
    return 130 if result.finish_reason == "interrupted" else 0


if __name__ == "__main__":
    sys.exit(main())

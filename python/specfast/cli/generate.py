"""`specfast generate`: streams text from a target and its draft, and says what it took."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import UNSET, resolve_config
from ..drafters import Progress
from ..engine import Engine, Result
from ..errors import ConfigurationError
from ..families import family_options
from ..stats import SpeculationStats

BUILT_IN_PROMPT = '''import os


def count_lines(path):
    """Return the number of lines in the file at path."""
'''
EPILOG = """examples:
  specfast generate --prompt "def fibonacci(n):" --max-tokens 64 --temperature 0
  specfast generate --model ./llama-8b --draft-model ./llama-1b --prompt-file question.txt --time
  echo "class Stack:" | specfast generate --json | tail -n 1
  specfast generate --compare --temperature 0

A model is a directory (Hugging Face or MLX layout), a short name (llama-3.2-1b) or a repo id (org/name), which is downloaded.
"""


def add_speculative_options(parser: argparse.ArgumentParser) -> None:
    """The options of the documented table; every name on one line means the same."""
    group = parser.add_argument_group("speculation (the names on one line are the same option)")
    group.add_argument("--model", "--speculative-target-model", dest="target_model", default=UNSET, metavar="MODEL", help="target model (default: the embedded pair)")
    group.add_argument("--draft-model", "--speculative-draft-model", dest="draft_model", default=UNSET, metavar="MODEL", help="draft model; its tokens must be the target's")
    group.add_argument("--auto-config", "--speculative-auto-config", dest="auto_config", action="store_const", const=True, default=UNSET, help="draft and options from the target's family")
    group.add_argument("--target-engine", "--speculative-target-engine", dest="target_engine", default=UNSET, choices=("mlx", "tinygrad", "native"), help="host of the target (native in this version)")
    group.add_argument("--draft-engine", "--speculative-draft-engine", dest="draft_engine", default=UNSET, choices=("mlx", "tinygrad", "native"), help="host of the draft (as the target)")
    group.add_argument("--gamma", "--speculative-gamma", dest="gamma", type=_gamma, default=UNSET, metavar="1-20|auto", help="tokens drafted per round (5); auto measures")
    group.add_argument("--temperature", "--speculative-temperature", dest="temperature", type=float, default=UNSET, metavar="0|0.1-2.0", help="sampling temperature (1.0); 0 is greedy")
    group.add_argument("--top-k-threshold", "--speculative-top-k", dest="top_k_threshold", type=float, default=UNSET, metavar="0.1-1.0", help="share of the vocabulary that is cut (0.9)")
    group.add_argument("--lenience", "--speculative-lenience", dest="lenience", type=float, default=UNSET, metavar="0.5-2.0", help="above 1 accepts more and changes the law (1.0)")
    group.add_argument("--early-exit", "--speculative-early-exit", dest="early_exit", type=int, default=UNSET, metavar="LAYER", help="not available in this version")
    group.add_argument("--plain", "--disable-speculative", dest="disabled", action="store_const", const=True, default=UNSET, help="plain decoding; no draft is loaded")  # fmt: skip


def add_parser(commands: Any) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "generate",
        help="generate text",
        description="Generates text with a target model, sped up by a draft where one fits.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    source = parser.add_argument_group("prompt (default: stdin, or a built-in one when nothing is piped)").add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text itself")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file")
    add_speculative_options(parser)
    text = parser.add_argument_group("text")
    text.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens to generate (256)")
    text.add_argument("--top-k", type=int, default=0, metavar="N", help="keep the N likeliest tokens")
    text.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the smallest set of tokens with mass P")
    text.add_argument("--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P times the likeliest")
    text.add_argument("--seed", type=int, help="makes sampling repeatable")
    text.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")
    text.add_argument("--raw", action="store_true", help="no chat template")
    text.add_argument("--system", metavar="TEXT", help="system message for the chat template")
    text.add_argument("--ignore-eos", action="store_true", help="go on after the end token")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--precision", choices=("int8", "bf16", "f32"), help="of activations (by the weights)")
    machine.add_argument("--threads", type=int, metavar="N", help="of native calls (all cores)")
    machine.add_argument("--context", type=int, metavar="N", help="bound the context below the model's")
    output = parser.add_argument_group("output")
    output.add_argument("--time", action="store_true", help="prompt tok/s, time to first token, split of the time")
    output.add_argument("--compare", action="store_true", help="run plain and speculative; exit 1 if greedy tokens differ")
    output.add_argument("--json", action="store_true", help="the last line is a JSON object")
    output.add_argument("--quiet", action="store_true", help="text only")


def _gamma(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer in 1 to 20 nor 'auto'") from None


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt from the option, the file, stdin, or the built-in one."""
    if options.prompt is not None:
        return str(options.prompt)
    try:
        if options.prompt_file is not None:
            return str(options.prompt_file.read_text(encoding="utf-8"))
        piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
        return piped or BUILT_IN_PROMPT
    except OSError as error:
        raise ConfigurationError(f"{options.prompt_file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the prompt is not UTF-8 text (byte {error.start}); convert it first") from None


def build_engine(options: argparse.Namespace) -> Engine:
    """The engine the options describe."""
    names = ("target_model", "draft_model", "auto_config", "target_engine", "draft_engine", "gamma", "temperature",
             "top_k_threshold", "lenience", "early_exit", "disabled")  # fmt: skip
    typed = {name: getattr(options, name) for name in names if getattr(options, name) is not UNSET}
    target = typed.get("target_model")
    resolved = resolve_config(typed, family=family_options(target) if target else None)
    if options.threads is not None:
        if not 1 <= options.threads <= 256:
            raise ConfigurationError(f"--threads is {options.threads}, but must be in 1 to 256")
        from .. import _core  # noqa: PLC0415

        _core.set_num_threads(options.threads)
    return Engine(resolved, options.precision, options.context)


@contextmanager
def _prompt_progress(length: int) -> Iterator[Progress | None]:
    """A bar on stderr while a long prompt is read, on a terminal."""
    if not sys.stderr.isatty() or length < 2000:
        yield None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the prompt", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _generate(engine: Engine, prompt: str, options: argparse.Namespace, *, speculate: bool, show: bool) -> tuple[Result, bool]:
    """One run; the flag says whether it was interrupted."""
    text: list[str] = []
    tokens: list[int] = []
    interrupted = False
    with _prompt_progress(len(prompt)) as progress:
        stream = engine.stream(
            prompt, max_tokens=options.max_tokens, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
            seed=options.seed, stop=options.stop, raw=options.raw, system=options.system, speculate=speculate,
            ignore_eos=options.ignore_eos, progress=progress,
        )  # fmt: skip
        try:
            for chunk in stream:
                text.append(chunk.text)
                tokens += chunk.token_ids
                if show:
                    sys.stdout.write(chunk.text)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            stream.close()
    if show:
        sys.stdout.write("\n")
        sys.stdout.flush()
    request = stream.request
    result = Result("".join(text), tokens, request.prompt_length, request.finish_reason, stream.stats, engine.config.lossless, engine.pair.target.precision)
    return result, interrupted


def time_lines(stats: SpeculationStats) -> list[str]:
    """Where the time went."""
    rest = stats.total_seconds - stats.prefill_seconds - stats.draft_seconds - stats.verify_seconds
    return [
        f"prompt {stats.prompt_tokens} tokens at {stats.prompt_tok_s:.1f} tok/s, first token after {stats.first_token_seconds * 1e3:.1f} ms",
        f"prefill {stats.prefill_seconds * 1e3:.1f} ms, draft {stats.draft_seconds * 1e3:.1f} ms, "
        f"verify {stats.verify_seconds * 1e3:.1f} ms, text and loop {rest * 1e3:.1f} ms",
    ]


def as_json(result: Result, engine: Engine) -> dict[str, Any]:
    """The machine-readable form of a result."""
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "lossless": result.lossless,
        "precision": result.precision,
        "model_family_compatibility": engine.pair.compatibility,
        "config": {name: {"value": getattr(engine.config, name), "from": source} for name, source in engine.resolved.sources.items()},
        **result.stats.as_dict(),
    }


def run(options: argparse.Namespace) -> int:
    """Generates; with --compare twice."""
    engine = build_engine(options)
    prompt = read_prompt(options)
    pair = engine.pair
    if not options.quiet:
        draft = pair.draft.name if pair.draft else "none (plain decoding)"
        print(f"target {pair.target.name} ({pair.target.precision}), draft {draft}, host native; {engine.resolved.describe()}", file=sys.stderr)
    if options.compare:
        return _compare(engine, prompt, options)
    result, interrupted = _generate(engine, prompt, options, speculate=True, show=True)
    if not options.quiet:
        for line in [*(time_lines(result.stats) if options.time else []), result.stats.summary()]:
            print(line, file=sys.stderr)
    if options.json:
        print(json.dumps(as_json(result, engine)))
    return 130 if interrupted else 0


def _compare(engine: Engine, prompt: str, options: argparse.Namespace) -> int:
    if engine.pair.draft is None:
        raise ConfigurationError("--compare needs a draft; give --draft-model, or --auto-config")
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(4), "little")
    _generate(engine, prompt, argparse.Namespace(**{**vars(options), "max_tokens": 8}), speculate=True, show=False)  # warm-up
    plain, stopped = _generate(engine, prompt, options, speculate=False, show=False)
    speculative, stopped_too = (plain, True) if stopped else _generate(engine, prompt, options, speculate=True, show=True)
    if stopped or stopped_too:
        return 130
    identical = plain.token_ids == speculative.token_ids
    greedy = engine.config.temperature == 0
    for name, result in (("plain", plain), ("speculative", speculative)):
        for line in [*(time_lines(result.stats) if options.time else []), result.stats.summary()]:
            print(f"{name + ':':13}{line}", file=sys.stderr)
    passes = plain.stats.target_passes / max(1, speculative.stats.target_passes)
    note = "" if greedy or identical else " (sampled: the laws are equal, the draws are not)"
    print(f"identical: {'yes' if identical else 'no'}{note}; {passes:.2f} times fewer target passes", file=sys.stderr)
    if options.json:
        both = {"plain": as_json(plain, engine), "speculative": as_json(speculative, engine), "identical": identical}
        print(json.dumps({**both["speculative"], **both}))
    return 0 if identical or not greedy else 1

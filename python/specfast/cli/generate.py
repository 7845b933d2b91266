"""`specfast generate`: streams text from a target and its draft, and says what it took."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..config import NO_DRAFT, SpeculativeConfig, resolve_config
from ..engine import Engine
from ..errors import ConfigurationError
from ..generation import Result
from ..inference import set_threads
from ..stats import SpeculationStats
from ..targets import Progress
from .options import EPILOG, add_options, logit_biases, typed_options

BUILT_IN_PROMPT = '''import os


def count_lines(path):
    """Return the number of lines in the file at path."""
'''
LONG_PROMPT_CHARACTERS = 8000
_PAIRS, _LONG_SECONDS = 3, 10.0  # of --compare: runs of each kind, and from when on one of each must do
_NEEDS_DRAFT = "needs a draft that fits; give --draft-model, --auto-config, --early-exit or --drafter suffix"


def add_parser(commands: Any) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "generate",
        help="generate text",
        description="Generates text with a target model, sped up by a draft where one fits.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Generates; with --compare plainly and with speculation, by turns."""
    if options.time and options.quiet and not options.compare:
        raise ConfigurationError("--time prints to stderr, where --quiet allows nothing; give one of them")
    set_threads(options.threads)
    engine = Engine(resolve_config(typed_options(options)), options.precision, options.context, kv_bits=options.kv_bits)
    if options.compare:
        _require_draft_named(engine.config)
    prompt = read_prompt(options)
    if options.compare:
        return _compare(engine, prompt, options)
    result = _generate(engine, prompt, options, announce=True)
    if not options.quiet:
        print_figures(result.stats, "", options, sys.stderr)
    if options.json:
        print(json.dumps(_as_json(result, engine)))
    return 130 if result.finish_reason == "interrupted" else 0


def _require_draft_named(config: SpeculativeConfig) -> None:
    """Refuses to compare where no draft can come of the options, before anything is loaded."""
    if config.disabled:
        raise ConfigurationError("--compare runs with and without the draft, and --plain has none; give one of them")
    if config.drafter in ("suffix", "prompt-lookup"):
        return
    named = config.target_model is None or config.draft_model is not None or config.auto_config
    without = config.draft_model == NO_DRAFT or not named
    if config.drafter == "none" or (config.early_exit is None and without):
        raise ConfigurationError(f"--compare {_NEEDS_DRAFT}")


def _compare(engine: Engine, prompt: str, options: argparse.Namespace) -> int:
    """Runs plain and speculative by turns, after a run of the same length that pays for cold weights and a slow clock.

    The figures are those of the pair with the median ratio; long texts are compared once.
    """
    options.seed = secrets.randbits(32) if options.seed is None else options.seed
    warm = _generate(engine, prompt, options, announce=True, show=False)
    if warm.finish_reason == "interrupted":
        return 130
    pair = engine.pair
    if engine.drafter == "none" or (pair.draft is None and pair.early_exit is None and engine.config.drafter is None):
        raise ConfigurationError(f"--compare {_NEEDS_DRAFT}")
    pairs: list[tuple[float, Result, Result]] = []
    for number in range(1 if warm.stats.total_seconds > _LONG_SECONDS else _PAIRS):
        plain = _generate(engine, prompt, options, show=False, disabled=True)
        if plain.finish_reason == "interrupted":
            return 130
        speculative = _generate(engine, prompt, options, show=number == 0)
        if speculative.finish_reason == "interrupted":
            return 130
        ratio = speculative.stats.tok_s / plain.stats.tok_s if plain.stats.tok_s else 0.0
        pairs.append((ratio, plain, speculative))
    identical = all(plain.token_ids == speculative.token_ids for _, plain, speculative in pairs)
    pairs.sort(key=lambda one: one[0])
    speedup, plain, speculative = pairs[len(pairs) // 2]
    greedy = engine.config.greedy
    print_figures(plain.stats, "plain:       ", options, sys.stdout)
    print_figures(speculative.stats, "speculative: ", options, sys.stdout)
    spread = f" (median of {len(pairs)} pairs, {pairs[0][0]:.2f} to {pairs[-1][0]:.2f})" if len(pairs) > 1 else ""
    print(f"speed-up: {speedup:.2f}x{spread}")
    print(f"identical: {'yes' if identical else 'no'}{_why_different(identical, greedy, engine)}")
    if options.json:
        figures = {name: _as_json(result, engine) for name, result in (("plain", plain), ("speculative", speculative))}
        print(json.dumps({**figures["speculative"], **figures, "identical": identical, "speedup": speedup}))
    return 1 if greedy and not identical else 0


def _why_different(identical: bool, greedy: bool, engine: Engine) -> str:
    if identical or greedy:
        return ""
    return " (sampled: the law is the same, the draws are not)" if engine.config.lossless else " (lenience above 1)"


def _generate(
    engine: Engine,
    prompt: str,
    options: argparse.Namespace,
    *,
    announce: bool = False,
    show: bool = True,
    **request: Any,
) -> Result:
    """One run; after Ctrl-C what there is by then. The engine checks the options before it loads the models."""
    with _prompt_progress(len(prompt)) as progress:
        names = (
            *("max_tokens", "seed", "stop", "top_k", "top_p", "min_p", "truncation", "raw", "system", "ignore_eos"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "penalty_window"),
        )
        typed = {name: getattr(options, name) for name in names} | {"logit_bias": logit_biases(options)}
        generation = engine.stream(prompt, progress=progress, **{**typed, **request})
        if announce and not options.quiet:
            print(f"specfast: {engine.describe(seeded=options.seed is not None)}", file=sys.stderr)
        try:
            for chunk in generation:
                if show and not options.no_stream:
                    print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            pass  # the result says so
        finally:
            generation.close()
    result = generation.result()
    if show:
        print(result.text if options.no_stream else "", flush=True)
    return result


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt from its option, a file, stdin, or the built-in one."""
    if options.prompt is not None:
        if any("\ud800" <= character <= "\udfff" for character in options.prompt):
            raise ConfigurationError("the prompt is not UTF-8 text; convert it first")
        return str(options.prompt)
    try:
        if options.prompt_file is not None and str(options.prompt_file) != "-":
            return str(options.prompt_file.read_text(encoding="utf-8"))
        if options.prompt_file is not None:
            return _read_stdin()
        piped = "" if sys.stdin is None or sys.stdin.isatty() else _read_stdin()
    except OSError as error:
        raise ConfigurationError(f"the prompt {options.prompt_file or ''} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"the prompt is not UTF-8 text (byte {error.start}); convert it first") from None
    if piped:
        return piped
    if not options.quiet:
        print(f"no prompt was given, this is continued:\n\n{BUILT_IN_PROMPT}", file=sys.stderr)
    return BUILT_IN_PROMPT


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ConfigurationError("the prompt cannot be read (stdin is closed)")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # whatever the locale says
    return sys.stdin.read()


@contextmanager
def _prompt_progress(characters: int) -> Iterator[Progress | None]:
    """A bar on stderr while a long prompt is read, on a terminal; it is gone before text comes."""
    if characters < LONG_PROMPT_CHARACTERS or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import
    from rich.progress import Progress as Bar  # noqa: PLC0415

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the prompt", total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if done >= total:
                bar.stop()

        yield update


def print_figures(stats: SpeculationStats, label: str, options: argparse.Namespace, file: Any) -> None:
    """The last lines: tokens and rates, and with --time where the time went."""
    if options.time:
        print(
            f"{label}prompt {stats.prompt_tokens} tokens at {stats.prompt_tok_s:.1f} tok/s, "
            f"first token after {stats.first_token_seconds * 1e3:.1f} ms",
            file=file,
        )
        print(
            f"{label}time {stats.total_seconds * 1e3:.1f} ms: prompt {stats.prefill_seconds * 1e3:.1f}, "
            f"draft {stats.draft_seconds * 1e3:.1f}, verify {stats.verify_seconds * 1e3:.1f}, "
            f"rest {stats.overhead_seconds * 1e3:.1f}",
            file=file,
        )
        for line in stats.decision_lines():
            print(f"{label}{line}", file=file)
    print(f"{label}{stats.summary()}", file=file)


def _as_json(result: Result, engine: Engine) -> dict[str, Any]:
    config = engine.resolved.config
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "seed": result.terms.seed,
        "drafter": result.terms.drafter,
        "gamma": result.terms.gamma,
        "lossless": result.terms.lossless,
        "rule": result.terms.rule,
        "precision": result.terms.precision,
        "model_family_compatibility": engine.pair.compatibility,
        "config": {
            name: {"value": getattr(config, name), "source": source} for name, source in engine.resolved.sources.items()
        },
        **result.stats.as_dict(),
    }

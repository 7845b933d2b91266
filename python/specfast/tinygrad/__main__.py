"""`python -m specfast.tinygrad`: streams text from a GGUF file that tinygrad loads, with a draft from another."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..chat import chat_template, render_chat
from ..compatibility import compare_models
from ..errors import ConfigurationError, IncompatibleDraftError, SpecfastError
from ..gguf_file import open_gguf
from ..gguf_model import gguf_config
from ..inference import set_threads
from ..text import StopStrings, StreamDecoder, TextStream
from ..tokenizer import Tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specfast.tinygrad",
        description="Generates text from a GGUF model in tinygrad, with specfast's kernels and speculative decoding.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, type=Path, metavar="F.gguf", help="the target")
    parser.add_argument("--draft-model", type=Path, metavar="G.gguf", help="a smaller model of the same tokens")
    parser.add_argument("--prompt", required=True, help="text; goes through the model's chat template if it has one")
    parser.add_argument("--raw", action="store_true", help="leave the chat template out")
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="most tokens to generate (default 256)"
    )
    parser.add_argument(
        "--drafter", help="model, suffix, prompt-lookup, combined, early-exit or none (default: what there is)"
    )
    parser.add_argument("--early-exit", metavar="LAYERS", help="draft with the target's first layers; a number or auto")
    parser.add_argument("--gamma", type=int, metavar="N", help="tokens drafted per round, 1 to 20 (default: measured)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="keep this many tokens; 0 keeps all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the smallest set of this mass (default 1)")
    parser.add_argument("--min-p", type=float, default=0.0, help="drop tokens below this fraction of the likeliest")
    parser.add_argument("--lenience", type=float, default=1.0, help="above 1 accepts more, not exactly (default 1)")
    parser.add_argument("--seed", type=int, help="of the random streams")
    parser.add_argument("--precision", help="of the activations: int8, bf16 or f32 (default: by the weights)")
    parser.add_argument("--threads", type=int, metavar="N", help="of native calls (default: all cores)")
    parser.add_argument("--context", type=int, metavar="N", help="bounds the context below the model's own")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the text")
    return parser


def _exit(layers: str | None) -> int | str | None:
    if layers is None or layers == "auto":
        return layers
    if not layers.isdigit():
        raise ConfigurationError(f"--early-exit is {layers!r}, but must be a number of layers, or auto")
    return int(layers)


def _run(options: argparse.Namespace) -> int:
    from .accelerate import accelerate, report  # noqa: PLC0415 - tinygrad is needed from here on
    from .generate import load_gguf, stream_generate  # noqa: PLC0415

    set_threads(options.threads)
    config = gguf_config(open_gguf(options.model))
    tokenizer = Tokenizer(options.model)
    if options.draft_model is not None:
        verdict = compare_models(options.model, options.draft_model)
        if verdict.status == "incompatible":
            raise IncompatibleDraftError(verdict.warning(str(options.model), str(options.draft_model)))
    template = None if options.raw else chat_template(options.model, tokenizer)
    if template is None:
        tokens = tokenizer.encode(options.prompt)
    else:
        message = render_chat(template, [{"role": "user", "content": options.prompt}], tokenizer)
        tokens = tokenizer.encode(message, special=False)
    model = accelerate(load_gguf(options.model, options.context), options.precision)
    draft = None if options.draft_model is None else load_gguf(options.draft_model, options.context)
    generation = stream_generate(
        model, tokens, options.max_tokens, draft,
        drafter=options.drafter, early_exit=_exit(options.early_exit), num_draft_tokens=options.gamma,  # type: ignore[arg-type]
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
        lenience=options.lenience, seed=options.seed, eos_ids=config.eos_ids,
        text=TextStream(StreamDecoder(tokenizer, continues=True), StopStrings(())),
    )  # fmt: skip
    if not options.quiet:
        found = report(model)
        print(f"specfast.tinygrad: {found.path} {found.precision or ''} {found.reason}".rstrip(), file=sys.stderr)
    try:
        for chunk in generation:
            if not options.json:
                print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        pass  # the result says so
    finally:
        generation.close()
    result = generation.result()
    if options.json:
        terms = {name: getattr(result.terms, name) for name in ("seed", "drafter", "gamma", "rule", "precision")}
        found = report(model)
        about = {"path": found.path, "reason": found.reason, "weights": dict(found.weights)}
        print(
            json.dumps(
                {"text": result.text, "token_ids": result.token_ids, "finish_reason": result.finish_reason,
                 "lossless": result.lossless, **terms, "report": about, "stats": result.stats.as_dict()}
            )
        )  # fmt: skip
    else:
        print(flush=True)
    if not options.quiet:
        print(result.stats.summary(), file=sys.stderr)
    return 130 if result.finish_reason == "interrupted" else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; errors are one line."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (SpecfastError, ImportError) as error:
        print(f"specfast.tinygrad: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""mlx_lm.generate's command line on specfast's engine loop: the same flags, and specfast's."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx_lm
from mlx import nn
from mlx_lm.models.cache import load_prompt_cache
from mlx_lm.sample_utils import make_sampler

from .. import embedded, hub
from ..checkpoint import PRECISIONS
from ..cli import guarded
from ..compatibility import compare_models
from ..config import RULES
from ..errors import ConfigurationError, ModelFormatError
from .accelerate import accelerate, report
from .options import DRAFTERS, Options
from .requests import dtype_name
from .stream import GenerationResponse, Stream, require_max_tokens, stream_generate, summary

COMMAND = "specfast.mlx.generate"
EXAMPLES = """examples:
  python -m specfast.mlx.generate --model embedded --draft-model embedded --prompt "import os\\n" --temp 0.8
  python -m specfast.mlx.generate --model mlx-community/Llama-3.2-3B-Instruct-4bit \\
      --draft-model mlx-community/Llama-3.2-1B-Instruct-4bit --prompt "Tell a story" --gamma auto --time
  python -m specfast.mlx.generate --model ./gemma-3 --drafter suffix --prompt - < question.txt
  python -m specfast.mlx.generate --model ./llama --early-exit auto --json | tail -n 1

A model is a directory, a repo id (org/name; downloaded, and resumed where a download stopped), a short name
(llama-3.2-1b) or "embedded". Llama, Mistral, Qwen2 and Qwen3 run on specfast's kernels where MLX runs on the CPU, every
other model in mlx-lm's own layers: the first line on stderr says which, and at what precision. Drafts never change the
law of the text (unless --lenience is above 1). Exit codes: 0, 2 for usage, 1 for failures, 130 after Ctrl-C.
"""
_OURS = ("gamma", "drafter", "early_exit", "lenience", "rule", "precision", "json", "time")
_THEIRS = (
    *("model", "trust_remote_code", "adapter_path", "extra_eos_token", "system_prompt", "prompt", "prefill_response"),
    *(
        "max_tokens",
        "temp",
        "top_p",
        "min_p",
        "top_k",
        "xtc_probability",
        "xtc_threshold",
        "min_tokens_to_keep",
        "seed",
    ),
    *("ignore_chat_template", "use_default_chat_template", "chat_template_config", "verbose", "max_kv_size"),
    *(
        "prefill_step_size",
        "prompt_cache_file",
        "quantize_activations",
        "kv_bits",
        "kv_group_size",
        "quantized_kv_start",
    ),
    *("draft_model", "num_draft_tokens"),
)
_TOKENIZER_FILES = ("*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return guarded(f"python -m {COMMAND}", lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """mlx-lm's parser, of the version that is installed, with specfast's options."""
    parser: argparse.ArgumentParser = importlib.import_module("mlx_lm.generate").setup_arg_parser()
    parser.prog = f"python -m {COMMAND}"
    parser.description = (
        "Generates text with an mlx-lm model, sped up by a drafter. Takes mlx_lm.generate's options too."
    )
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    group = parser.add_argument_group("specfast")
    group.add_argument(
        "--gamma",
        type=_gamma,
        metavar="1-20|auto",
        help="tokens drafted a round, as --num-draft-tokens; auto measures what pays, down to none",
    )
    group.add_argument(
        "--drafter",
        choices=DRAFTERS,
        metavar="DRAFTER",
        help=f"one of {', '.join(DRAFTERS)} (model with --draft-model, else none)",
    )
    group.add_argument(
        "--early-exit",
        type=_early_exit,
        metavar="LAYER|auto",
        help="draft with the model's own first layers; auto measures which",
    )
    group.add_argument(
        "--lenience", type=float, default=1.0, help="0.5 to 2; above 1 accepts more, and changes the law (default: 1)"
    )
    group.add_argument("--rule", choices=RULES, metavar="RULE", help=f"how drafts are accepted: {', '.join(RULES)}")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of activations on specfast's kernels (int8 for quantised weights, else bf16)",
    )
    group.add_argument("--json", action="store_true", help="the last line is a JSON object: text, tokens, counters")
    group.add_argument("--time", action="store_true", help="where the time went, and who drafted what, on stderr")
    return parser


@dataclass(frozen=True)
class Models:
    """What was loaded, ready for any number of requests.

    Attributes:
        model, draft: mlx-lm models, accelerated where that is possible.
        names: what people call them; "none" for no draft.
        tokenizer: mlx-lm's.
    """

    model: nn.Module
    draft: nn.Module | None
    names: tuple[str, str]
    tokenizer: Any

    def describe(self) -> str:
        """Which path and precision each runs at."""
        parts = [f"model {self.names[0]} ({_path(self.model)})"]
        parts.append(f"draft {self.names[1]}" + (f" ({_path(self.draft)})" if self.draft is not None else ""))
        return ", ".join(parts)


def run(options: argparse.Namespace) -> int:
    """Loads, generates and prints.

    Raises:
        SpecfastError: in one line what is wrong and what to do.
    """
    _check(options)
    caches, metadata = _prompt_cache(options)
    models = load(options, metadata)
    tokens = _prompt_tokens(options, models.tokenizer, cached=caches is not None)
    stream = stream_generate(
        models.model, models.tokenizer, tokens, options.max_tokens, models.draft, **_request(options, models, caches)
    )
    if options.verbose:
        terms = stream.terms
        gamma = f", gamma {terms.gamma}" if terms.drafter != "none" else ""
        law = "lossless" if terms.lossless else f"lenience {options.lenience:g}"
        line = f"{models.describe()}, drafter {terms.drafter}{gamma}, rule {terms.rule}, {law}, seed {terms.seed}"
        print(f"specfast: {line}", file=sys.stderr, flush=True)
    return _print(stream, options)


def load(options: argparse.Namespace, metadata: dict[str, str]) -> Models:
    """The models an options' namespace names, downloaded where they are not there.

    Raises:
        ModelFormatError, DownloadError: one cannot be had.
    """
    name = options.model or metadata.get("model") or importlib.import_module("mlx_lm.generate").DEFAULT_MODEL
    directory = _directory(name, "target", options)
    model, tokenizer = _load(directory, options, json.loads(metadata.get("tokenizer_config", "{}")))
    for token in getattr(options, "extra_eos_token", ()):
        try:
            tokenizer.add_eos_token(token)
        except (ValueError, KeyError):
            raise ConfigurationError(
                f"--extra-eos-token is {token!r}, which is no token of the model's; give one of its vocabulary"
            ) from None
    draft, draft_name = None, "none"
    if options.draft_model is not None:
        draft_directory = _directory(options.draft_model, "draft", options)
        draft_model, draft_tokenizer = _load(draft_directory, options)
        verdict = compare_models(directory, draft_directory)
        alike = verdict.status == "unknown" and draft_tokenizer.vocab_size == tokenizer.vocab_size
        if verdict.status == "compatible" or alike:
            draft, draft_name = accelerate(draft_model, options.precision), options.draft_model
        else:
            print(verdict.warning(name, options.draft_model), file=sys.stderr)
    return Models(accelerate(model, options.precision), draft, (name, draft_name), tokenizer)


def _directory(name: str, role: Literal["target", "draft"], options: argparse.Namespace) -> Path:
    if name == "embedded":
        return embedded.path(role)
    code = ("*.py",) if getattr(options, "trust_remote_code", False) else ()
    path = hub.resolve(name, also=(*_TOKENIZER_FILES, *code))
    if not path.is_dir():
        raise ModelFormatError(f"{path} is a GGUF file, which mlx-lm does not read; `specfast generate --model` does")
    return path


def _load(
    directory: Path, options: argparse.Namespace, tokenizer_config: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    trusted = bool(getattr(options, "trust_remote_code", False))
    known = inspect.signature(mlx_lm.load).parameters
    more: dict[str, Any] = {"trust_remote_code": trusted} if "trust_remote_code" in known else {}
    if getattr(options, "quantize_activations", False):
        more["model_config"] = {"quantize_activations": True}
    if tokenizer_config is not None:
        more |= {"tokenizer_config": {**tokenizer_config, "trust_remote_code": trusted}}
        more |= {"adapter_path": options.adapter_path}
    try:
        model, tokenizer = mlx_lm.load(str(directory), **more)
    except (ValueError, KeyError, FileNotFoundError, RuntimeError) as error:
        raise ModelFormatError(
            f"{directory}: mlx-lm cannot load it ({str(error).strip() or type(error).__name__})"
        ) from None
    return model, tokenizer


def _path(model: nn.Module) -> str:
    found = report(model)
    if found.path == "stock":
        return f"path host, mlx-lm's layers in {dtype_name(model)}: {found.reason}"
    return f"path {found.path}, precision {found.precision}, {found.isa}"


def _prompt_cache(options: argparse.Namespace) -> tuple[list[Any] | None, dict[str, str]]:
    """Caches from a file, and the model they belong to."""
    if options.prompt_cache_file is None:
        return None, {}
    try:
        caches, metadata = load_prompt_cache(options.prompt_cache_file, return_metadata=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelFormatError(f"{options.prompt_cache_file} cannot be read as a prompt cache ({error})") from None
    made = metadata.get("model")
    if options.model not in (None, made):
        raise ConfigurationError(
            f"--model is {options.model}, but the prompt cache was made with {made}; leave --model out"
        )
    for name, flag in (("bits", "kv_bits"), ("group_size", "kv_group_size")):
        held, asked = getattr(caches[0], name, None), getattr(options, flag)
        if held is not None and asked not in (None, held):
            raise ConfigurationError(
                f"--{flag.replace('_', '-')} is {asked}, but the prompt cache has {held}; give {held}"
            )
    return caches, metadata


def _prompt_tokens(options: argparse.Namespace, tokenizer: Any, *, cached: bool) -> list[int]:
    """The prompt as mlx-lm encodes it: through the chat template where there is one; after a cached prefix only the rest."""
    prompt = options.prompt.replace("\\n", "\n").replace("\\t", "\t")
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if getattr(options, "use_default_chat_template", False) and getattr(tokenizer, "chat_template", None) is None:
        tokenizer.chat_template = getattr(tokenizer, "default_chat_template", None)
    templated = not options.ignore_chat_template and getattr(tokenizer, "chat_template", None) is not None
    if not templated:
        return list(tokenizer.encode(prompt))
    system, prefill = getattr(options, "system_prompt", None), getattr(options, "prefill_response", None)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    if prefill is not None:
        messages.append({"role": "assistant", "content": prefill})
    template = {"continue_final_message": True} if prefill is not None else {"add_generation_prompt": True}
    template = {"tokenize": False, **template}
    config = getattr(options, "chat_template_config", None)
    try:
        more = json.loads(config) if config else {}
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"--chat-template-config is not JSON ({error}); give an object such as {{}}") from None
    text = tokenizer.apply_chat_template(messages, **template, **more)
    if cached:
        messages[-1]["content"] = "<query>"
        text = text[tokenizer.apply_chat_template(messages, **template, **more).index("<query>") :]
    return list(tokenizer.encode(text, add_special_tokens=False))


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """The options of stream_generate that need no model."""
    caches = ("max_kv_size", "kv_bits", "kv_group_size", "quantized_kv_start", "prefill_step_size")
    names = (*caches, "lenience", "rule", "seed", "early_exit")
    request = {name: getattr(options, name) for name in names if hasattr(options, name)}
    gamma = getattr(options, "num_draft_tokens", 3) if options.gamma is None else options.gamma
    return {**request, "drafter": options.drafter, "num_draft_tokens": gamma}


def _request(options: argparse.Namespace, models: Models, caches: list[Any] | None) -> dict[str, Any]:
    """The options of stream_generate."""
    request = {**_asked(options), "prompt_cache": caches}
    drafts = options.drafter in ("model", "combined") and options.draft_model is not None and models.draft is None
    if drafts:
        request["drafter"] = "none"  # a refused draft means plain decoding
    xtc, least = getattr(options, "xtc_probability", 0.0), options.min_tokens_to_keep
    if options.temp > 0 and (xtc > 0 or (options.min_p > 0 and least > 1)):
        known = inspect.signature(make_sampler).parameters
        special = models.tokenizer.encode("\n") + list(models.tokenizer.eos_token_ids)
        asked = {
            "xtc_probability": xtc,
            "xtc_threshold": getattr(options, "xtc_threshold", 0.0),
            "xtc_special_tokens": special,
        }
        asked |= {"min_tokens_to_keep": least, "top_k": getattr(options, "top_k", 0)}
        kept = {name: value for name, value in asked.items() if name in known}
        return request | {"sampler": make_sampler(options.temp, options.top_p, options.min_p, **kept)}
    return request | {
        name: getattr(options, name) for name in ("temp", "top_p", "min_p", "top_k") if hasattr(options, name)
    }


def _print(stream: Stream, options: argparse.Namespace) -> int:
    """mlx-lm's output, with specfast's figures; after Ctrl-C what there is by then."""
    responses: list[GenerationResponse] = []
    interrupted = False
    if options.verbose:
        print("=" * 10)
    try:
        for response in stream:
            responses.append(response)
            if options.verbose:
                print(response.text, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stream.close()
    text = "".join(response.text for response in responses)
    stats = stream.stats
    if options.verbose:
        print("\n" + "=" * 10)
        print(summary(stream, responses[-1]) if responses else "No text generated for this prompt")
    else:
        print(text)
    if options.time:
        parts = {name: 1e3 * stats[f"{name}_seconds"] for name in ("prefill", "draft", "verify", "overhead")}
        print("specfast: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in parts.items()), file=sys.stderr)
        for line in stream.decisions:
            print(f"specfast: {line}", file=sys.stderr)
    if options.json:
        end = "interrupted" if interrupted else responses[-1].finish_reason if responses else None
        figures = {"text": text, "token_ids": [response.token for response in responses], "finish_reason": end}
        print(json.dumps({**figures, **stats}))
    return 130 if interrupted else 0


def _check(options: argparse.Namespace) -> None:
    """Checks what was typed before anything is loaded; also refuses an option of a newer mlx-lm, or one not supported."""
    defaults = vars(build_parser().parse_args([]))
    for name, value in vars(options).items():
        if name not in (*_THEIRS, *_OURS) and value != defaults.get(name):
            raise ConfigurationError(f"--{name.replace('_', '-')} is not supported here; `mlx_lm.generate` has it")
    gamma, theirs = options.gamma, getattr(options, "num_draft_tokens", None)
    if gamma is not None and theirs not in (gamma, defaults.get("num_draft_tokens")):
        raise ConfigurationError(f"--gamma {gamma} and --num-draft-tokens {theirs} are one option; give one of them")
    if options.early_exit is not None and options.draft_model is not None:
        raise ConfigurationError(
            f"--early-exit {options.early_exit} and --draft-model {options.draft_model} are two ways to draft; give one "
            "of them"
        )
    if options.drafter in ("model", "combined") and options.draft_model is None:
        raise ConfigurationError(
            f"--drafter {options.drafter} needs a draft model; give --draft-model, or use --drafter suffix"
        )
    if options.drafter == "early-exit" and options.early_exit is None:
        raise ConfigurationError("--drafter early-exit needs a layer; give --early-exit N, or auto to measure which")
    require_max_tokens(options.max_tokens)
    Options(**_asked(options))


def _gamma(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or not 1 <= int(text) <= 20:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer in 1 to 20 nor 'auto'")
    return int(text)


def _early_exit(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a layer nor 'auto'")
    return int(text)

"""Chat templates, rendered in a sandbox: a model's template is data from the internet."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from .errors import ModelFormatError
from .tokenizer import Tokenizer

MAX_TEMPLATE_CHARACTERS = 1_000_000
MAX_PROMPT_CHARACTERS = 16_000_000


def chat_template(directory: Path, tokenizer: Tokenizer) -> str | None:
    """The model's chat template: chat_template.jinja, or the entry of tokenizer_config.json; None without one."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = tokenizer.config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """No attribute tricks, no mutation, no long loops."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        for a, b in ((left, right), (right, left)):
            if isinstance(a, str | list | tuple) and isinstance(b, int) and len(a) * b > 100_000:
                _raise("a repetition makes the text too long")
        if operator == "**":
            _raise("powers are not available")
        return super().call_binop(context, operator, left, right)


def render_chat(template: str, messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> str:
    """The prompt text of a conversation, ready for the assistant's turn.

    Args:
        template: Jinja source as model directories carry it.
        messages: dictionaries with role and content.

    Raises:
        ModelFormatError: the template is damaged, too large, or tries what the sandbox forbids.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise ModelFormatError(
            f"the chat template has {len(template)} characters, more than {MAX_TEMPLATE_CHARACTERS}; use --raw"
        )
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    try:
        pieces, size = [], 0
        for piece in environment.from_string(template).generate(
            messages=[dict(message) for message in messages],
            add_generation_prompt=True,
            bos_token=tokenizer.special_text("bos_token"),
            eos_token=tokenizer.special_text("eos_token"),
            tools=None,
        ):
            size += len(piece)
            if size > MAX_PROMPT_CHARACTERS:
                raise ModelFormatError(
                    f"the chat template produced more than {MAX_PROMPT_CHARACTERS} characters; use --raw"
                )
            pieces.append(piece)
    except (
        jinja2.TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ModelFormatError(
            f"the model's chat template cannot be rendered ({error}); use --raw to pass the prompt as it is"
        ) from None
    return "".join(pieces)

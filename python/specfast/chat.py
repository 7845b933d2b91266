"""Chat templates, rendered in a sandbox: a model's template is a program from the internet.

It gets no attribute tricks, no mutation, no files, and bounds on time, memory and the length of every string it makes.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from .errors import ModelFormatError
from .tokenizer import Tokenizer

MAX_TEMPLATE_CHARACTERS = 1_000_000
MAX_TEXT_CHARACTERS = 16_000_000
MAX_SECONDS = 5.0
MAX_GROWTH_BYTES = 512 << 20
_WIDE = re.compile(r"\d{4}|\*|\{[^{}]*\{")  # a wide number format, or one whose width comes from elsewhere
_UNAVAILABLE_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "translate"})
_UNAVAILABLE_FILTERS = ("center", "indent", "wordwrap", "format", "urlize", "filesizeformat", "pprint", "xmlattr")


def chat_template(directory: Path, tokenizer: Tokenizer) -> str | None:
    """The model's chat template: chat_template.jinja, or the entry of tokenizer_config.json; None without one.

    Raises:
        ModelFormatError: the file cannot be read as text.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFormatError(f"{file}: cannot be read ({error}); use --raw or download it again") from None
    value = tokenizer.config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


class _TemplateLimitError(jinja2.TemplateError):
    """A template asked for more than it may have."""


def _refuse(what: str) -> NoReturn:
    raise _TemplateLimitError(what)


def _check_length(characters: int) -> None:
    if characters > MAX_TEXT_CHARACTERS:
        _refuse(f"a text of {characters} characters is longer than {MAX_TEXT_CHARACTERS}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if indent is not None and not 0 <= indent <= 16:
        _refuse(f"an indent of {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or _WIDE.search(pattern):
        _refuse("a long date pattern")
    return datetime.datetime.now().strftime(pattern)


def _replaced(text: str, old: str, new: str, *rest: Any) -> str:
    _check_length(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    return text.replace(old, new, *rest)


def _joined(separator: str, items: Any) -> str:
    texts = [str(item) for item in items]
    _check_length(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _check_format(obj: Any, attribute: Any) -> None:
    if isinstance(obj, str) and attribute in ("format", "format_map") and _WIDE.search(obj):
        _refuse("a wide number format")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, without what makes long strings out of short ones."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        for name in _UNAVAILABLE_FILTERS:
            self.filters[name] = functools.partial(_refuse, f"the filter {name}")
        self.filters["tojson"] = _to_json
        self.filters["replace"] = lambda text, old, new, *rest: _replaced(str(text), str(old), str(new), *rest)
        join = self.filters["join"]

        @jinja2.pass_eval_context
        def bounded_join(context: Any, items: Any, separator: str = "", attribute: Any = None) -> str:
            texts = list(items)
            _check_length(sum(len(str(text)) for text in texts) + len(separator) * len(texts))
            return str(join(context, texts, separator, attribute))

        self.filters["join"] = bounded_join
        self.globals = {
            name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")
        } | {"raise_exception": _raise_exception, "strftime_now": _strftime_now}  # fmt: skip

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for a, b in ((left, right), (right, left)):
                if isinstance(a, str | list | tuple) and isinstance(b, int):
                    _check_length(len(a) * b)
        if operator == "**" and not (abs(left) <= 1000 and abs(right) <= 10):
            _refuse("a large power")
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            _refuse("a wide number format")
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            _check_length(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _check_format(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _check_format(obj, argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - Jinja's own names
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name in _UNAVAILABLE_METHODS:
                _refuse(f"the method {name}")
            if name == "replace":
                return _replaced(owner, *args)
            if name == "join" and len(args) == 1:
                return _joined(owner, args[0])
        return super().call(__context, __obj, *args, **kwargs)


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, which marks the assistant's words for training: its contents."""

    tags = {"generation"}  # noqa: RUF012 - the name and type Jinja wants

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@contextmanager
def _bounds() -> Iterator[None]:
    """Ends a template's code, line by line, when it has run too long or the process has grown too much."""
    unit = 1 if sys.platform == "darwin" else 1024

    def peak_bytes() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    deadline, most = time.monotonic() + MAX_SECONDS, peak_bytes() + MAX_GROWTH_BYTES

    def watch(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        del frame, event, argument
        if time.monotonic() > deadline:
            _refuse(f"more than {MAX_SECONDS:g} s")
        if peak_bytes() > most:
            _refuse(f"more than {MAX_GROWTH_BYTES >> 20} MB")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    """The prompt text of a conversation, ready for the assistant's turn.

    Args:
        template: Jinja source as model directories carry it.
        messages: mappings with role and content.
        tokenizer: for the texts of the start and end tokens.

    Raises:
        ModelFormatError: the template is damaged, too large, too slow, or tries what the sandbox forbids.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise ModelFormatError(
            f"the chat template has {len(template)} characters, more than {MAX_TEMPLATE_CHARACTERS}; use --raw"
        )
    variables = {
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": True,
        "bos_token": tokenizer.special_text("bos_token"),
        "eos_token": tokenizer.special_text("eos_token"),
        "tools": None,
        "documents": None,
    }
    try:
        with _bounds():
            return _render(template, variables)
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        cause: Exception = error
    except (RecursionError, MemoryError, SyntaxError) as error:
        cause = error
    raise ModelFormatError(
        f"the model's chat template cannot be rendered ({type(cause).__name__}: {cause}); use --raw to pass the prompt as it is"
    )


def _render(template: str, variables: Mapping[str, Any]) -> str:
    pieces: list[str] = []
    size = 0
    for piece in _Environment().from_string(template).generate(**variables):
        size += len(piece)
        _check_length(size)
        pieces.append(piece)
    return "".join(pieces)

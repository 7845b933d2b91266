"""Chat templates: what Hugging Face renders, and nothing else a template may try."""

import sys
import time

import pytest
import specfast
from specfast import chat
from specfast.chat import chat_template, render_chat
from specfast.errors import ConfigurationError, ModelFormatError
from specfast.tokenizer import Tokenizer
from tiny_directories import byte_level, write_pair, write_tokenizer

TURNS = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": " hello "}]


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path, byte_level())
    return Tokenizer(tmp_path)


def test_turns_are_rendered(tokenizer):
    assert render_chat(TURNS, HELLO, tokenizer) == "<|bos|><user>hello<|eos|><assistant>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}\n  {% if loop.first %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}", "user\n"),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": " hello "}]'),
        ("{{ 'é<&>' | tojson }}", '"é<&>"'),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", " hello "),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ 'xax'.replace('a', 'b') }}{{ ' '.join(['p', 'q']) }}", "a+bxbxp q"),
        ("{{ '%s!' % 'a' }}{{ 'ab' * 2 }}{{ 'a' + 'b' }}{{ 7 % 2 }}{{ 2 ** 3 }}", "a!ababab18"),
        ("{% if tools %}tools{% else %}none{% endif %}", "none"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('y') }}", "[y]"),
    ],
)
def test_what_templates_use(tokenizer, template, text):
    assert render_chat(template, HELLO, tokenizer) == text


HOSTILE = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "format": "{{ '{0.__class__}'.format(messages) }}{{ messages.append(1) }}",
    "mutation": "{{ messages.append({'role': 'x'}) }}",
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "range": "{{ range(10**9) | list }}",
    "repetition": "{{ 'a' * 10**10 }}",
    "list repetition": "{{ ([0] * 10**10) | length }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "doubling": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s|length }}",
    "adding": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "replace": "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "replace filter": "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
    "join": "{{ ('b' * 9999).join(('a' * 9999) | list) }}",
    "join filter": "{{ ('a' * 9999) | list | join('b' * 9999) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "width": "{{ '%9999999999d' % 1 }}{{ '{:>9999999999}'.format(1) }}",
    "format width": "{{ '{:>9999999999}'.format(1) }}",
    "indent": "{{ [1] | tojson(indent=10**9) }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "syntax": "{% for %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "unknown": "{{ nothing.there }}",
    "division": "{{ 1 / 0 }}",
    "exception": "{{ raise_exception('only one system message') }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_templates_end_in_a_typed_error(tokenizer, template, monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 1.0)
    before, start = sys.gettrace(), time.monotonic()
    with pytest.raises(ModelFormatError, match="--raw"):
        render_chat(template, HELLO, tokenizer)
    assert time.monotonic() - start < 60  # bounded by time or memory, also on a busy machine
    assert sys.gettrace() is before


def test_a_template_may_explain_itself(tokenizer):
    with pytest.raises(ModelFormatError, match="only one system message"):
        render_chat(HOSTILE["exception"], HELLO, tokenizer)


def test_an_enormous_template_is_refused(tokenizer):
    with pytest.raises(ModelFormatError, match="1000001 characters"):
        render_chat("a" * 1_000_001, HELLO, tokenizer)


def test_where_templates_are_found(tmp_path):
    write_tokenizer(tmp_path, byte_level())
    assert chat_template(tmp_path, Tokenizer(tmp_path)) is None
    write_tokenizer(tmp_path, byte_level(), chat_template="one")
    assert chat_template(tmp_path, Tokenizer(tmp_path)) == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    write_tokenizer(tmp_path, byte_level(), chat_template=named)
    assert chat_template(tmp_path, Tokenizer(tmp_path)) == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert chat_template(tmp_path, Tokenizer(tmp_path)) == "four"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ModelFormatError, match=r"chat_template\.jinja"):
        chat_template(tmp_path, Tokenizer(tmp_path))


def test_an_engine_uses_the_template_unless_raw(tmp_path):
    target, _ = write_pair(tmp_path)
    write_tokenizer(target, byte_level(), chat_template=TURNS)
    pair = specfast.load(target, disabled=True).pair
    expected = pair.tokenizer.encode("<|bos|><user>hi<|eos|><assistant>", special=False)
    assert pair.encode("hi") == pair.encode([{"role": "user", "content": "hi"}]) == expected
    assert expected.count(0) == 1  # one start token, not two
    assert pair.encode("hi", raw=True) == pair.tokenizer.encode("hi")
    with_system = pair.tokenizer.decode(pair.encode("hi", system="be brief"))
    assert with_system == "<system>be brief<user>hi<assistant>"


def test_messages_need_a_template(tmp_path):
    target, _ = write_pair(tmp_path)
    with pytest.raises(ConfigurationError, match="no chat template"):
        specfast.load(target, disabled=True).generate([{"role": "user", "content": "hi"}])

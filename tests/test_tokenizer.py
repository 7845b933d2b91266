"""Tokenizers and growing text: every split of the tokens gives the whole text, and stop strings cut it exactly."""

import itertools
import json

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from specfast.errors import ConfigurationError, ModelFormatError
from specfast.text import StopStrings, StreamDecoder, TextStream
from specfast.tokenizer import Tokenizer
from tiny_directories import TEXT, byte_fallback, byte_level, metaspace, word_piece, write_tokenizer

KINDS = {
    "byte-level": byte_level("<think>", "a tool"),
    "byte fallback": byte_fallback(),
    "byte fallback without strip": byte_fallback(strip=False),
    "metaspace": metaspace(),
    "word piece": word_piece(),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    cache = {}

    def tokenizer(kind):
        if kind not in cache:
            directory = tmp_path_factory.mktemp("tokenizer")
            write_tokenizer(directory, KINDS[kind])
            cache[kind] = Tokenizer(directory)
        return cache[kind]

    return tokenizer


def streamed(tokenizer, tokens, cuts=(), **options):
    """The pieces of a stream whose tokens come in groups cut at `cuts`, checked to be final when they come."""
    decoder = StreamDecoder(tokenizer, **options)
    edges = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    pieces = [decoder.push(tokens[a:b]) for a, b in itertools.pairwise(edges)]
    return [*pieces, decoder.flush()]


SPELLINGS = {
    "byte-level": ("byte-level", "keep"),
    "byte fallback": ("pieces and bytes", "strip one"),
    "byte fallback without strip": ("pieces and bytes", "keep"),
    "metaspace": ("pieces", "strip first token"),
    "word piece": ("other", "keep"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_is_recognised(load, kind):
    assert (load(kind).spelling, load(kind).leading_space) == SPELLINGS[kind]


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "byte fallback without strip", "metaspace"])
@given(text=st.text(max_size=60) | st.sampled_from(TEXT), cuts=st.lists(st.integers(0, 400)))
@example(text="  two spaces, 👍🏽 and 日本", cuts=[1, 2, 3, 4, 5, 6, 7, 8])
def test_pieces_of_encoded_text_join_to_the_whole(load, kind, text, cuts):
    assume(not any(0xD800 <= ord(c) < 0xE000 for c in text))
    tokenizer = load(kind)
    tokens = tokenizer.encode(text, special=False)
    pieces = streamed(tokenizer, tokens, cuts)
    assert "".join(pieces) == tokenizer.decode(tokens)
    if kind == "byte-level":
        assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@given(tokens=st.lists(st.integers(0, 320), max_size=60), cuts=st.lists(st.integers(0, 60)))
def test_any_byte_level_tokens_give_what_the_library_gives(load, tokens, cuts):
    """Also incomplete and impossible characters, special and added tokens, and ids that mean nothing."""
    tokenizer = load("byte-level")
    assert "".join(streamed(tokenizer, tokens, cuts)) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", KINDS)
@given(tokens=st.lists(st.integers(0, 290), max_size=90), cuts=st.lists(st.integers(0, 90)))
def test_the_split_of_the_tokens_does_not_matter(load, kind, tokens, cuts):
    tokenizer = load(kind)
    whole = "".join(streamed(tokenizer, tokens))
    assert "".join(streamed(tokenizer, tokens, cuts)) == whole
    if kind == "word piece":
        assert whole == tokenizer.decode(tokens)


@given(tokens=st.lists(st.sampled_from([*range(40, 70), 200, 250, 280]), max_size=300))
def test_windows_do_not_lose_text(load, tokens):
    tokenizer = load("word piece")
    known = [token % 21 + 1 for token in tokens]
    assert "".join(streamed(tokenizer, known, range(300))) == tokenizer.decode(known)


def test_a_character_is_given_out_with_its_last_byte(load):
    tokenizer = load("byte fallback")
    tokens = tokenizer.encode("h👍", special=False)[-4:]
    assert [tokenizer.bytes_of(token) for token in tokens] == [b"\xf0", b"\x9f", b"\x91", b"\x8d"]
    assert streamed(tokenizer, tokens, range(5)) == ["", "", "", "👍", ""]
    assert streamed(tokenizer, tokens[:3], range(5)) == ["", "", "", "\ufffd"]


def test_text_that_continues_a_prompt_keeps_its_leading_space(load):
    tokenizer = load("byte fallback")
    tokens = tokenizer.encode("hello world", special=False)[:2]
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens) == "hel"
    assert "".join(streamed(tokenizer, tokens, continues=True)) == " hel"


def test_special_tokens_have_no_text_and_added_ones_do(load):
    tokenizer = load("byte-level")
    added = [tokenizer.token_id(text) for text in ("<|bos|>", "<think>", "<|eos|>", "a tool")]
    assert "".join(streamed(tokenizer, added)) == tokenizer.decode(added) == "<think>a tool"


def test_encoding_puts_the_start_token_in_front(load):
    tokenizer = load("byte-level")
    assert tokenizer.encode("ab")[0] == 0 == tokenizer.token_id(tokenizer.special_text("bos_token"))
    assert tokenizer.encode("ab", special=False) == tokenizer.encode("ab")[1:]
    assert tokenizer.vocab == max(KINDS["byte-level"].get_vocab().values()) + 1
    with pytest.raises(ConfigurationError, match="surrogates"):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"model": null}'])
def test_a_missing_or_damaged_tokenizer_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_padding_and_truncation_of_a_tokenizer_file_are_not_used(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    write_tokenizer(tmp_path, tokenizer)
    assert len(Tokenizer(tmp_path).encode("abcdefghij" * 2, special=False)) > 6


def test_special_tokens_may_be_objects(tmp_path):
    write_tokenizer(tmp_path, byte_level(), bos_token={"content": "<|bos|>", "lstrip": False}, eos_token=None)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.special_text("bos_token") == "<|bos|>"
    assert tokenizer.special_text("eos_token") == ""


def cut(text, stops):
    """The text before the stop string that ends first, the longest of those; by definition, one character at a time."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


short = st.text("abc", max_size=12)


@given(pieces=st.lists(short, max_size=12), stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4))
@example(pieces=["a", "b", "ab", "c"], stops=["abc"])
@example(pieces=["abc"], stops=["abc", "b"])
def test_stop_strings_cut_exactly_however_text_is_split(pieces, stops):
    machine = StopStrings(stops)
    shown = [machine.push(piece) for piece in pieces]
    whole = "".join(pieces)
    expected = cut(whole, stops)
    assert machine.stopped == any(stop in whole for stop in stops)
    assert expected.startswith("".join(shown))
    assert "".join(shown) + machine.flush() == expected
    if machine.stopped:
        assert machine.push("abc") + machine.flush() == ""


@given(text=short, stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3))
def test_only_what_may_become_a_stop_string_is_held_back(text, stops):
    machine = StopStrings(stops)
    shown = machine.push(text)
    assume(not machine.stopped)
    held = text[len(shown) :]
    assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize("stops", [[""], ["a"] * 17, ["a" * 1001], [7]])
def test_impossible_stop_strings_are_refused(stops):
    with pytest.raises(ConfigurationError, match="stop string"):
        StopStrings(stops)


def test_a_stop_string_may_begin_and_end_inside_tokens(load):
    tokenizer = load("byte-level")
    tokens = tokenizer.encode("return [len(line)]", special=False)
    stream = TextStream(StreamDecoder(tokenizer), StopStrings(["urn [l"]))
    shown = []
    for token in tokens:
        shown.append(stream.push(token))
        if stream.stopped:
            break
    assert "".join(shown) + stream.flush() == "ret"
    assert len(shown) < len(tokens)


def test_configuration_beside_the_tokenizer_is_optional_but_not_damaged(tmp_path):
    write_tokenizer(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer(tmp_path).config == {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(ModelFormatError, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)

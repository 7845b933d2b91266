"""GGUF files: exact weights against the oracle, the same text as a directory's, and files that are damaged or hostile."""

import os
import struct
import weakref
from dataclasses import replace

import numpy as np
import pytest
import specfast
from gguf_writer import BLOCK, decoder_metadata, decoder_tensors, encode, tokenizer_metadata, write_gguf
from oracle.model import dequantise, forward
from specfast import _core, gguf_blocks
from specfast.chat import chat_template
from specfast.checkpoint import load_model, model_config, open_weights
from specfast.compatibility import compare_models
from specfast.errors import ConfigurationError, ModelFormatError, SpecfastError, UnsupportedModelError
from specfast.gguf_blocks import affine, q6_k_as_f32
from specfast.gguf_file import open_gguf
from specfast.hub import resolve
from specfast.safetensors_file import TensorView
from specfast.tokenizer import Tokenizer
from tiny_directories import byte_fallback, byte_level, write_model, write_tokenizer
from tiny_models import random_decoder

MUTATIONS = int(os.environ.get("SPECFAST_FUZZ", "2000"))
QUANTISED = [kind for kind in BLOCK if BLOCK[kind] > 1]
TOKENS = np.arange(5, dtype=np.int32)


def decoder_of(architecture, seed=3, *, V=96, hidden=256, layers=2, tied=False):
    return random_decoder(
        seed, V=V, hidden=hidden, heads=4, kv_heads=2, head_dim=64, layers=layers, architecture=architecture, tied=tied
    )


def write_decoder(path, decoder, architecture="llama", kind="Q4_0", *, extra=None, kinds=None, **options):
    """The file of a decoder, and the decoder it holds."""
    tensors, exact = decoder_tensors(decoder, architecture, kind, kinds=kinds)
    write_gguf(path, decoder_metadata(decoder, architecture) | (extra or {}), tensors, **options)
    return exact


def logits_of(path, precision="f32"):
    native = load_model(path, precision=precision).model
    return native.forward(_core.Cache(native), TOKENS, len(TOKENS))


def assert_close(logits, expected, tolerance=1e-4):
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()


def values_of(tensor):
    """What a quantised tensor stands for once it is converted, as float32."""
    if tensor.dtype == "Q6_K":
        return q6_k_as_f32(tensor).as_float32()
    parts = affine(tensor)
    words = parts["weight"].data.view("<u4").reshape(tensor.shape[0], -1)
    bits = 32 * words.shape[1] // tensor.shape[1]
    exact = dequantise(words, parts["scales"].as_float32(), parts["biases"].as_float32(), bits, 32)
    return exact.astype(np.float32)


@pytest.mark.parametrize("kind", QUANTISED)
def test_blocks_are_their_values(kind):
    """Every value exactly, whatever the bits of the blocks; the writer says what they stand for."""
    w = np.random.default_rng(1).normal(0, 1, (6, 512))
    w[0] *= 65000 / np.abs(w[0]).max()  # f16 does not hold 8 times Q4_0's scale
    w[1] = 0
    raw, values = encode(w, kind)
    view = TensorView(kind, w.shape, np.frombuffer(raw, np.uint8))
    assert np.abs(values[2:] - w[2:]).max() < 0.5
    assert np.array_equal(values_of(view), values.astype(np.float32))


@pytest.mark.parametrize("kind", QUANTISED)
def test_random_blocks_are_what_the_formats_own_package_reads(kind):
    quants, gguf = pytest.importorskip("gguf.quants"), pytest.importorskip("gguf")
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = np.random.default_rng(2).integers(0, 256, (16, size), dtype=np.uint8)
    halves = {"Q6_K": (208,), "Q4_0": (0,), "Q8_0": (0,)}.get(kind, (0, 2))
    for at in halves:
        blocks[:, at + 1] = blocks[:, at + 1] & 0x83 | 0x20  # neither huge nor NaN
    expected = quants.dequantize(blocks.reshape(4, -1), gguf.GGMLQuantizationType[kind])
    view = TensorView(kind, (4, 4 * weights), blocks.reshape(-1))
    assert np.array_equal(values_of(view), expected)
    blocks[0, -3] ^= 16
    assert not np.array_equal(values_of(view), expected)


def test_scales_that_f16_holds_stay_f16():
    for factor, dtype in ((1, "F16"), (1e5, "F32")):
        raw, _ = encode(factor * np.random.default_rng(1).normal(0, 1, (2, 64)), "Q8_0")
        assert affine(TensorView("Q8_0", (2, 64), np.frombuffer(raw, np.uint8)))["biases"].dtype == dtype


@pytest.mark.parametrize("kind", list(BLOCK))
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logits_are_the_oracles(tmp_path, architecture, kind):
    decoder = decoder_of(architecture, tied=architecture == "qwen3")
    exact = write_decoder(tmp_path / "m.gguf", decoder, architecture, kind)
    assert_close(logits_of(tmp_path / "m.gguf"), forward(exact, TOKENS))
    with pytest.raises(AssertionError):  # the tolerance tells the weights of the file from those before rounding
        assert_close(
            logits_of(tmp_path / "m.gguf"),
            forward(decoder, TOKENS) if BLOCK[kind] > 1 else 1.01 * logits_of(tmp_path / "m.gguf"),
        )


def test_rows_of_llama_are_turned_and_those_of_qwen_not(tmp_path):
    decoder = decoder_of("llama")
    tensors, exact = decoder_tensors(decoder, "qwen2", "F32")
    write_gguf(tmp_path / "m.gguf", decoder_metadata(decoder, "llama"), tensors)
    with pytest.raises(AssertionError):
        assert_close(logits_of(tmp_path / "m.gguf"), forward(exact, TOKENS), 1e-2)


@pytest.mark.parametrize("precision", ["int8", "bf16", "f32"])
def test_mixed_types_at_every_precision(tmp_path, precision):
    """What Q4_K_M files are made of; the bits of a row do not depend on how many run with it."""
    kinds = {
        "output.weight": "Q6_K",
        "blk.0.attn_v.weight": "Q6_K",
        "blk.1.ffn_down.weight": "Q8_0",
        "blk.1.attn_q.weight": "F16",
    }
    exact = write_decoder(tmp_path / "m.gguf", decoder_of("llama"), kind="Q4_K", kinds=kinds)
    logits = logits_of(tmp_path / "m.gguf", precision)
    assert_close(logits, forward(exact, TOKENS), {"int8": 0.1, "bf16": 0.05, "f32": 1e-4}[precision])
    native = load_model(tmp_path / "m.gguf", precision=precision).model
    cache = _core.Cache(native)
    single = [native.forward(cache, TOKENS[i : i + 1], 1)[0] for i in range(len(TOKENS))]
    assert np.array_equal(logits, single)


def test_a_tied_and_packed_embedding_stays_readable(tmp_path):
    """The head's panels replace the converted rows, but the embedding is still read from them."""
    exact = write_decoder(tmp_path / "m.gguf", decoder_of("llama", tied=True), kind="Q8_0")
    assert_close(logits_of(tmp_path / "m.gguf", "int8"), forward(exact, TOKENS), 0.1)


def test_what_has_been_packed_is_let_go(tmp_path, monkeypatch):
    """Of converted matrices only the embedding stays beside its packed copy; without packing none is converted."""
    write_decoder(tmp_path / "m.gguf", decoder_of("llama"), kind="Q4_0")
    pages, made = gguf_blocks._pages, []

    def watched(*arguments):
        array = pages(*arguments)
        made.append(weakref.ref(array.base))
        return array

    monkeypatch.setattr(gguf_blocks, "_pages", watched)
    for pack in (True, False):
        made.clear()
        native = load_model(tmp_path / "m.gguf", precision="int8", pack=pack).model
        alive = sum(reference() is not None for reference in made)
        assert len(made) == (3 * 16 if pack else 0)
        assert alive == (3 if native.packed_bytes else len(made))


def test_the_same_weights_in_a_directory(tmp_path):
    decoder = decoder_of("llama")
    exact = write_decoder(tmp_path / "m.gguf", decoder, kind="Q4_0")
    write_model(tmp_path / "directory", exact)
    assert_close(logits_of(tmp_path / "m.gguf"), logits_of(tmp_path / "directory"))


@pytest.mark.parametrize(("version", "alignment"), [(2, 32), (3, 8), (3, 4096)])
def test_versions_and_alignments(tmp_path, version, alignment):
    exact = write_decoder(tmp_path / "m.gguf", decoder_of("llama"), version=version, alignment=alignment)
    assert_close(logits_of(tmp_path / "m.gguf"), forward(exact, TOKENS))


def test_rope_factors_and_linear_scaling(tmp_path):
    decoder = decoder_of("llama")
    tensors, exact = decoder_tensors(decoder, "llama", "Q8_0")
    factors = np.linspace(1, 8, 32).astype(np.float32)
    tensors["rope_freqs.weight"] = ("F32", (32,), factors.tobytes())
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    write_gguf(tmp_path / "m.gguf", decoder_metadata(decoder, "llama") | scaling, tensors)
    expected = forward(replace(exact, inv_freq=exact.inv_freq / factors / 2), TOKENS)
    assert_close(logits_of(tmp_path / "m.gguf"), expected)
    with pytest.raises(AssertionError):
        assert_close(logits_of(tmp_path / "m.gguf"), forward(exact, TOKENS))


@pytest.fixture
def pair(tmp_path):
    """Target and draft files with a tokenizer; the draft's weights are the target's first layer."""
    target = decoder_of("llama", 5, V=320)
    for layer in target.layers[1:]:
        layer.o, layer.down = 0.2 * layer.o, 0.2 * layer.down
    words = tokenizer_metadata(byte_level("<|end|>"), size=320) | {
        "tokenizer.chat_template": "{{ messages[0].content }}"
    }
    write_decoder(tmp_path / "target.gguf", target, kind="Q4_K", extra=words)
    write_decoder(tmp_path / "draft.gguf", replace(target, layers=target.layers[:1]), kind="Q4_0", extra=words)
    return tmp_path / "target.gguf", tmp_path / "draft.gguf"


@pytest.mark.parametrize("precision", ["int8", "f32"])
def test_greedy_text_with_a_draft_is_the_plain_text(pair, precision):
    target, draft = map(str, pair)
    plain = specfast.load(target, disabled=True, temperature=0.0, precision=precision)
    drafted = specfast.load(target, draft, temperature=0.0, gamma=4, precision=precision)
    for prompt in ("def main(path):", "  a  b"):
        expected = plain.generate(prompt, max_tokens=40)
        assert drafted.generate(prompt, max_tokens=40).token_ids == expected.token_ids
    assert 0 < drafted.stats.accepted < drafted.stats.drafted


def test_the_command_line(pair, capsys):
    from specfast.cli import main

    code = main(
        [
            "generate",
            "--model",
            str(pair[0]),
            "--draft-model",
            str(pair[1]),
            "--max-tokens",
            "8",
            "--temperature",
            "0",
            "--prompt",
            "a b",
        ]
    )
    assert code == 0
    assert capsys.readouterr().out


def test_a_path_is_a_name(pair, tmp_path):
    assert resolve(pair[0]) == pair[0]
    with pytest.raises(ModelFormatError, match=r"gguf"):
        resolve(str(tmp_path / "none.gguf"))
    with pytest.raises(UnsupportedModelError, match=r"named itself: .*draft\.gguf"):
        open_weights(tmp_path)


TEXTS = [
    "def main(path):\n    return [x]",
    "héllo wörld 日本語 😀",
    "  a  b\tc\n",
    "it's 12345 <|eos|> y",
    "",
    "<|end|>x<|bos|>",
]


def test_byte_level_tokens_are_the_directorys(pair, tmp_path):
    original = byte_level("<|end|>")
    write_tokenizer(tmp_path / "directory", original)
    mine, theirs = Tokenizer(pair[0]), Tokenizer(tmp_path / "directory")
    for text in TEXTS:
        assert mine.encode(text) == theirs.encode(text)
        assert mine.encode(text, special=False) == theirs.encode(text, special=False)
        assert mine.decode(mine.encode(text)) == theirs.decode(theirs.encode(text))
    assert mine.spelling == "byte-level"
    assert mine.vocab == theirs.vocab
    assert mine.special_text("bos_token") == "<|bos|>"
    assert chat_template(pair[0], mine) == "{{ messages[0].content }}"


def test_files_and_directories_compare(pair, tmp_path):
    target, draft = pair
    assert compare_models(target, draft).status == "compatible"
    write_model(tmp_path / "directory", decoder_of("llama", V=320))
    write_tokenizer(tmp_path / "directory", byte_level("<|end|>"))
    assert compare_models(target, tmp_path / "directory").status == "compatible"
    wider = tokenizer_metadata(byte_level("<|end|>"), size=330)
    wider["tokenizer.ggml.token_type"] = [min(kind, 4) for kind in wider["tokenizer.ggml.token_type"]]
    write_decoder(tmp_path / "wider.gguf", decoder_of("llama", V=330), kind="F32", extra=wider)
    assert compare_models(target, tmp_path / "wider.gguf").status == "compatible"
    write_tokenizer(tmp_path / "directory", byte_level())
    assert compare_models(target, tmp_path / "directory").status == "incompatible"
    write_decoder(tmp_path / "bare.gguf", decoder_of("llama"))
    assert compare_models(target, tmp_path / "bare.gguf").status == "unknown"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["It", "'S", " ", " ", "123", "45", "!?\n\n", "x"]),
        ("qwen2", ["It", "'S", " ", " ", "1", "2", "3", "4", "5", "!?\n\n", "x"]),
        ("gpt-2", ["It", "'", "S", " ", " 12345", "!?", "\n", "\n", "x"]),
        ("smollm", ["It", "'", "S", "  ", "1", "2", "3", "4", "5", "!?", "\n", "\n", "x"]),
    ],
)
def test_pre_tokenizers_split(tmp_path, pre, pieces):
    """The splits that the pre-tokenizers' patterns are published with."""
    write_decoder(tmp_path / "m.gguf", decoder_of("llama"), kind="F32", extra=tokenizer_metadata(byte_level(), pre=pre))
    inner = Tokenizer(tmp_path / "m.gguf")._tokenizer
    text = "It'S  12345!?\n\nx"
    found = [text[first:last] for _, (first, last) in inner.pre_tokenizer.pre_tokenize_str(text)]
    assert "".join(found) == text
    assert found == pieces


def sentencepiece_metadata():
    """The tokens of the byte-fallback tokenizer with scores in the order of its merges."""
    vocab = byte_fallback().get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.get)
    types = [2 if t == "<unk>" else 3 if t in ("<s>", "</s>") else 6 if t.startswith("<0x") else 1 for t in tokens]
    joined = {"▁h": -1.0, "▁w": -2.0, "el": -3.0}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [joined.get(token, -100.0) for token in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_tokens_are_the_directorys(tmp_path):
    write_tokenizer(tmp_path / "directory", byte_fallback())
    write_decoder(tmp_path / "m.gguf", decoder_of("llama", V=320), kind="F32", extra=sentencepiece_metadata())
    mine, theirs = Tokenizer(tmp_path / "m.gguf"), Tokenizer(tmp_path / "directory")
    for text in ["hello world", "hélle 日 x", "  h  w", "el</s>h"]:
        assert mine.encode(text, special=False) == theirs.encode(text, special=False)
        assert mine.encode(text) == [1, *theirs.encode(text, special=False)]
        assert mine.decode(mine.encode(text)) == theirs.decode(theirs.encode(text))
    assert (mine.spelling, mine.leading_space) == ("pieces and bytes", "strip one")


def test_a_tokenizer_beside_the_file(tmp_path):
    extra = tokenizer_metadata(byte_level(), pre="default")
    write_decoder(tmp_path / "m.gguf", decoder_of("llama", V=320), kind="F32", extra=extra)
    with pytest.raises(UnsupportedModelError, match=r"'default'.*qwen2.*tokenizer\.json beside"):
        Tokenizer(tmp_path / "m.gguf")
    write_tokenizer(tmp_path, byte_level("<|more|>"))
    with pytest.raises(ModelFormatError, match=r"not those of m\.gguf"):
        Tokenizer(tmp_path / "m.gguf")
    write_tokenizer(tmp_path, byte_level())
    assert Tokenizer(tmp_path / "m.gguf").encode("a b") == Tokenizer(tmp_path).encode("a b")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": ["a", "a"]}, ModelFormatError, "twice"),
        ({"tokens": [1, 2]}, ModelFormatError, "array of str"),
        ({"token_type": [1]}, ModelFormatError, "1 elements, but there are 300"),
        ({"merges": ["a"]}, ModelFormatError, "merge 'a'"),
        ({"merges": ["a nothing"]}, ModelFormatError, "merge 'a nothing'"),
        ({"bos_token_id": 300}, ModelFormatError, "0 to 299"),
        ({"add_bos_token": 1}, ModelFormatError, "true or false"),
        ({"model": "t5"}, UnsupportedModelError, "'t5'.*gpt2 and llama"),
    ],
)
def test_impossible_tokenizers(tmp_path, change, error, message):
    extra = tokenizer_metadata(byte_level()) | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    write_decoder(tmp_path / "m.gguf", decoder_of("llama", V=320), kind="F32", extra=extra)
    with pytest.raises(error, match=message):
        Tokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"llama.embedding_length": ...}, ModelFormatError, r"'llama\.embedding_length' is missing"),
        ({"llama.embedding_length": 128}, ModelFormatError, "shape"),
        ({"llama.attention.head_count": 5}, ModelFormatError, "cannot be shared"),
        ({"llama.attention.head_count": 8}, ModelFormatError, "256 rows, but 8 heads of 64 need 512"),
        ({"llama.attention.key_length": 7}, ModelFormatError, "even"),
        ({"llama.attention.value_length": 32}, UnsupportedModelError, "one length"),
        ({"llama.block_count": 3}, ModelFormatError, "layers.2.* is missing"),
        ({"llama.block_count": 1}, ModelFormatError, "have 2 layers"),
        ({"llama.context_length": "x"}, ModelFormatError, "must be an integer"),
        ({"llama.rope.dimension_count": 32}, UnsupportedModelError, "partial rotary"),
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedModelError, "yarn"),
        ({"llama.expert_count": 8}, UnsupportedModelError, "8 experts"),
        ({"llama.attention.sliding_window": 128}, UnsupportedModelError, "128"),
        ({"general.architecture": "gemma3"}, UnsupportedModelError, "gemma3.*qwen3"),
        ({"tokenizer.ggml.eos_token_id": 96}, ModelFormatError, "0 to 95"),
        ({"split.count": 2}, UnsupportedModelError, "one of 2 parts"),
        ({"general.alignment": 24}, ModelFormatError, "power of 2"),
    ],
)
def test_impossible_metadata(tmp_path, change, error, message):
    decoder = decoder_of("llama")
    metadata = decoder_metadata(decoder, "llama") | change
    tensors, _ = decoder_tensors(decoder, "llama", "F32")
    write_gguf(tmp_path / "m.gguf", {k: v for k, v in metadata.items() if v is not ...}, tensors)
    with pytest.raises(error, match=message):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (("Q4_0", (256,), bytes(144)), ModelFormatError, "only matrices"),
        (("Q4_0", (2, 33), bytes(36)), ModelFormatError, "33 inputs"),
        (("F32", (4,), bytes(16)), ModelFormatError, "no place in a llama"),
        (("F32", (2, 4), bytes(32)), ModelFormatError, "no place in a llama"),
        ((20, (32,), bytes(18)), UnsupportedModelError, "IQ4_NL.*supported: F32"),
        ((99, (32,), bytes(18)), ModelFormatError, "unknown type 99"),
        (("F32", (1, 1, 1, 1, 1), bytes(4)), ModelFormatError, "5 dimensions"),
        (("F32", (2**62, 2**62), bytes(4)), ModelFormatError, "impossible shape"),
        (("F32", (1000, 1000), bytes(4)), ModelFormatError, "lies at"),
    ],
)
def test_impossible_tensors(tmp_path, tensor, error, message):
    decoder = decoder_of("llama")
    tensors, _ = decoder_tensors(decoder, "llama", "F32")
    name = {(256,): "blk.0.attn_norm.weight", (2, 4): "blk.00.attn_q.weight"}.get(tensor[1], "x.weight")
    tensors.pop(name, None)
    write_gguf(tmp_path / "m.gguf", decoder_metadata(decoder, "llama"), tensors | {name: tensor})
    with pytest.raises(error, match=message):
        load_model(tmp_path / "m.gguf")


def start(*parts):
    return b"GGUF" + b"".join(parts)


def u64(*values):
    return struct.pack(f"<{len(values)}Q", *values)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", ModelFormatError, "empty"),
        (b"GG", ModelFormatError, "needs 4 bytes at 0, but 2 are left"),
        (b"GGML" + bytes(20), ModelFormatError, "starts with b'GGML'"),
        (start(struct.pack("<I", 1), bytes(16)), UnsupportedModelError, "version 1.*2 and 3"),
        (start(struct.pack(">I", 3), bytes(16)), UnsupportedModelError, "big endian"),
        (start(struct.pack("<I", 3), u64(2**60, 0)), ModelFormatError, "claims 1152921504606846976 tensors"),
        (start(struct.pack("<I", 3), u64(0, 2**60)), ModelFormatError, "metadata entries"),
        (start(struct.pack("<I", 3), u64(0, 1, 2**63), bytes(30)), ModelFormatError, "more than 65535"),
        (start(struct.pack("<I", 3), u64(0, 1, 1), b"\xff", bytes(30)), ModelFormatError, "not UTF-8"),
        (start(struct.pack("<I", 3), u64(0, 1, 1), b"a", struct.pack("<I", 13), bytes(9)), ModelFormatError, "unknown type 13"),
        (start(struct.pack("<I", 3), u64(0, 1, 1), b"a", struct.pack("<II", 9, 9), bytes(30)), ModelFormatError, "array of el"),
        (start(struct.pack("<I", 3), u64(0, 1, 1), b"a", struct.pack("<IIQ", 9, 0, 2**40)), ModelFormatError, "claims 1099511627776 el"),
        (start(struct.pack("<I", 3), u64(0, 1, 1), b"a", struct.pack("<IQ", 8, 2**62), bytes(9)), ModelFormatError, "bytes at"),
    ],
)  # fmt: skip
def test_bad_starts(tmp_path, content, error, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        open_gguf(path)


def test_overlaps_and_repeats(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf", {"a": 1, "b": 2}, {"x": ("F32", (8,), bytes(32)), "y": ("F32", (8,), bytes(32))}
    )
    content = path.read_bytes()
    assert set(open_gguf(path).tensors) == {"x", "y"}
    at = content.index(u64(1) + b"y") + 9
    offset = at + 4 + 8 + 4
    for replaced, message in (
        (content[:offset] + u64(0) + content[offset + 8 :], "the one before it ends at 32"),
        (content[:offset] + u64(4) + content[offset + 8 :], "no multiple of 32"),
        (content.replace(u64(1) + b"y", u64(1) + b"x"), "'x' occurs twice"),
        (content.replace(u64(1) + b"b", u64(1) + b"a"), "'a' occurs twice"),
        (content[:-1], "lies at 32..64, but 63 bytes"),
    ):
        path.unlink()
        path.write_bytes(replaced)
        with pytest.raises(ModelFormatError, match=message):
            open_gguf(path)


@pytest.mark.timeout(7200)
def test_mutated_files(tmp_path):
    """Every mutation either loads and runs, or ends in a typed error."""
    path = tmp_path / "m.gguf"
    decoder = random_decoder(3, V=300, hidden=32, heads=2, kv_heads=1, head_dim=16, tied=False)
    write_decoder(path, decoder, extra=tokenizer_metadata(byte_level(vocab=300)))
    original = path.read_bytes()
    header = len(original) - sum(tensor.data.nbytes for tensor in open_gguf(path).tensors.values())
    rng = np.random.default_rng(4)
    outcomes = {"loaded": 0, "refused": 0}
    for i in range(MUTATIONS // 4):
        content = bytearray(original)
        if i % 5 == 0:
            content = content[: rng.integers(len(content))]
        where = (len(content), 200, 1200, header, header)[i % 5]
        for _ in range(int(rng.integers(1, 4)) if len(content) else 0):
            content[int(rng.integers(min(where, len(content))))] ^= 1 << int(rng.integers(8))
        path.unlink()  # mapped pages of earlier rounds stay theirs
        path.write_bytes(content)
        try:
            native = load_model(path).model
            Tokenizer(path).encode("a b")
            compare_models(path, path)
            native.verify(_core.Cache(native), np.array([1], dtype=np.int32), None, _core.Law(0.0), 1.0, 0, 0)
            outcomes["loaded"] += 1
        except SpecfastError as error:
            assert str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > MUTATIONS // 12
    assert outcomes["loaded"] > 0


def test_a_file_written_in_place_is_seen(pair):
    loaded = load_model(pair[0])
    loaded.require_unchanged()
    os.utime(pair[0], ns=(1, 1))
    with pytest.raises(ModelFormatError, match="changed in place"):
        loaded.require_unchanged()


def test_end_tokens_and_conversion(pair, tmp_path):
    from specfast.convert import convert

    assert model_config(pair[0]).eos_ids == (1,)
    with pytest.raises(ConfigurationError, match="runs as it is"):
        convert(pair[0], tmp_path / "out")

"""Tiny GGUF models for tinygrad, and its own logits of all rows."""

import os

os.environ.setdefault("HALF", "0")  # tinygrad then keeps the weights of a file exactly

import numpy as np
import specfast.tinygrad as st
from gguf_writer import decoder_metadata, decoder_tensors, tokenizer_metadata, write_gguf
from tiny_directories import byte_level
from tiny_models import MATRICES, random_decoder
from tinygrad import Tensor


def write_model(path, architecture="llama", kind="Q4_0", *, seed=3, hidden=256, layers=2, tied=False, kinds=None):
    """A random decoder whose vocabulary is a byte-level tokenizer's; returns the decoder that the file holds."""
    tokenizer = byte_level()
    V = len(tokenizer.get_vocab(with_added_tokens=True))
    decoder = random_decoder(
        seed,
        V=V,
        hidden=hidden,
        heads=4,
        kv_heads=2,
        head_dim=hidden // 4,
        layers=layers,
        architecture=architecture,
        tied=tied,
    )
    for layer in decoder.layers:
        for name in MATRICES:  # of unit gain: rounding is then not amplified from layer to layer
            setattr(layer, name, 0.5 * getattr(layer, name))
    tensors, exact = decoder_tensors(decoder, architecture, kind, kinds=kinds)
    metadata = decoder_metadata(decoder, architecture, max_context=256) | tokenizer_metadata(tokenizer)
    write_gguf(path, metadata, tensors)
    return exact


def stock_logits(model, tokens, start_pos):
    """Logits (1, M, vocab) of tinygrad's own layers."""
    x = model.token_embd(tokens).float()
    for block in model.blk:
        x = block(x, start_pos)
    return model.output(model.output_norm(x))


def ids(count, vocab, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, count).astype(np.int32)


def tensor_of(tokens):
    return Tensor(np.asarray(tokens, np.int32)[None]).clone().realize()


def logits(model, tokens, start=0):
    """Logits (M, vocab) of an accelerated model, computed."""
    return st.logits(model, tensor_of(tokens), start).numpy()[0]

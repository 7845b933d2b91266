"""Model directories small enough to make in a test: Hugging Face layout, float32 weights, a trained tokenizer."""

import json

import numpy as np
import safetensors.numpy
import tokenizers
from tiny_models import MATRICES, random_decoder
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

TEXT = [
    "def main(path):\n    return [len(line) for line in open(path)]\n",
    "héllo wörld 日本語 😀👍🏽 naïve",
    "  a  b\tc\n",
] * 3
_MODULES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
_MODULES |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


def byte_level(*added, vocab=300, start="<|bos|>"):
    """A byte-level BPE tokenizer with start and end tokens (ids 0 and 1), as GPT-2, Llama 3 and Qwen have."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|bos|>", "<|eos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens(list(added))
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 0)])
    return tokenizer


def byte_fallback(*, strip=True):
    """A sentencepiece-like BPE tokenizer as Llama 2, Mistral and Gemma have: pieces, and bytes for the rest."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehlnorw", "▁h", "▁w", "el"]
    merges = [("▁", "h"), ("▁", "w"), ("e", "l")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [*([tokenizers.normalizers.Prepend("▁")] if strip else []), tokenizers.normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    return tokenizer


def metaspace():
    """A tokenizer whose decoder is the plain Metaspace one."""
    tokenizer = byte_fallback()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece():
    """A tokenizer with a decoder of another kind."""
    words = ["[UNK]", *"abcdehlorw", *(f"##{c}" for c in "abcdehlorw")]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def write_tokenizer(directory, tokenizer, **config):
    """tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    values = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


def decoder_weights(seed, *, vocab=320, layers=2):
    """A random decoder whose upper layers matter little: with fewer layers it is a draft that often agrees."""
    decoder = random_decoder(seed, V=vocab, layers=2, tied=False)
    for layer in decoder.layers[1:]:
        layer.o, layer.down = 0.2 * layer.o, 0.2 * layer.down
    decoder.layers = decoder.layers[:layers]
    return decoder


def write_model(directory, decoder, *, max_context=512, eos=1, **config):
    """config.json and model.safetensors of a random Llama decoder."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": decoder.embed.shape[1],
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": 2 * len(decoder.inv_freq),
        "intermediate_size": len(decoder.layers[0].gate),
        "vocab_size": len(decoder.embed),
        "max_position_embeddings": max_context,
        "rms_norm_eps": decoder.rms_eps,
        "rope_theta": 10000.0,
        "tie_word_embeddings": decoder.head is None,
        "eos_token_id": eos,
        **config,
    }
    (directory / "config.json").write_text(json.dumps(values))
    tensors = {"model.embed_tokens.weight": decoder.embed, "model.norm.weight": decoder.norm}
    if decoder.head is not None:
        tensors["lm_head.weight"] = decoder.head
    for i, layer in enumerate(decoder.layers):
        at = f"model.layers.{i}."
        tensors |= {f"{at}{_MODULES[name]}.weight": getattr(layer, name) for name in MATRICES}
        if layer.q_bias is not None:
            tensors |= {f"{at}self_attn.{m}_proj.bias": getattr(layer, f"{m}_bias") for m in "qkv"}
        tensors[f"{at}input_layernorm.weight"] = layer.input_norm
        tensors[f"{at}post_attention_layernorm.weight"] = layer.post_norm
    floats = {name: np.ascontiguousarray(values, np.float32) for name, values in tensors.items()}
    safetensors.numpy.save_file(floats, directory / "model.safetensors")


def write_pair(root, *, tokenizer=None, **options):
    """Directories target and draft under root: a draft that often agrees with its target."""
    tokenizer = tokenizer or byte_level()
    for role, layers in (("target", 2), ("draft", 1)):
        write_model(root / role, decoder_weights(5, layers=layers), **options)
        write_tokenizer(root / role, tokenizer)
    return root / "target", root / "draft"

"""Writes GGUF files from float64 weights: the format's rules as plain loops over blocks, apart from the reader's code."""

import struct

import numpy as np

TYPE_IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "BF16": 30}
BLOCK = {"F32": 1, "F16": 1, "BF16": 1, "Q4_0": 32, "Q4_1": 32, "Q8_0": 32, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256}


def _half(value):
    return struct.pack("<e", value)


def _put_nibbles(q):
    half = len(q) // 2
    return bytes(int(q[i]) | int(q[i + half]) << 4 for i in range(half))


def _q4_0(w):
    d = np.float16(np.abs(w).max() / 7)
    q = np.clip(np.rint(w / (float(d) or 1)) + 8, 0, 15).astype(int)
    return _half(d) + _put_nibbles(q), float(d) * (q - 8)


def _q4_1(w):
    d, m = np.float16((w.max() - w.min()) / 15), np.float16(w.min())
    q = np.clip(np.rint((w - float(m)) / (float(d) or 1)), 0, 15).astype(int)
    return _half(d) + _half(m) + _put_nibbles(q), float(d) * q + float(m)


def _q8_0(w):
    d = np.float16(np.abs(w).max() / 127)
    q = np.clip(np.rint(w / (float(d) or 1)), -128, 127).astype(int)
    return _half(d) + struct.pack("32b", *q), float(d) * q


def _k_quant(w, bits):
    """Q4_K and Q5_K: eight groups of 32 with factors of 6 bits."""
    groups = w.reshape(8, 32)
    least = np.maximum(-groups.min(1), 0)
    step = (groups.max(1) + least) / (2**bits - 1)
    d, dmin = np.float16(step.max() / 63), np.float16(least.max() / 63)
    s = np.clip(np.rint(step / (float(d) or 1)), 0, 63).astype(int)
    m = np.clip(np.rint(least / (float(dmin) or 1)), 0, 63).astype(int)
    scale, bias = float(d) * s, -float(dmin) * m
    q = np.rint((groups - bias[:, None]) / np.where(scale > 0, scale, 1)[:, None])
    q = np.clip(q, 0, 2**bits - 1).astype(int)
    factors = bytearray(12)
    for j in range(4):
        factors[j] = s[j] | (s[j + 4] >> 4) << 6
        factors[j + 4] = m[j] | (m[j + 4] >> 4) << 6
        factors[j + 8] = (s[j + 4] & 15) | (m[j + 4] & 15) << 4
    raw = _half(d) + _half(dmin) + bytes(factors)
    if bits == 5:
        raw += bytes(sum((int(q[g, i]) >> 4) << g for g in range(8)) for i in range(32))
    for pair in range(0, 8, 2):
        raw += _put_nibbles(np.concatenate([q[pair], q[pair + 1]]) & 15)
    return raw, (scale[:, None] * q + bias[:, None]).reshape(-1)


def _q6_k(w):
    groups = w.reshape(16, 16)
    step = np.abs(groups).max(1) / 31
    d = np.float16(step.max() / 127)
    s = np.clip(np.rint(step / (float(d) or 1)), 1, 127).astype(int)
    q = np.clip(np.rint(groups / np.where(s * float(d) > 0, s * float(d), 1)[:, None]), -32, 31).astype(int)
    u = (q + 32).reshape(2, 4, 32)
    low, high = b"", b""
    for half in u:
        first, second = np.concatenate(half[:2]), np.concatenate(half[2:])
        low += bytes(int(a & 15) | int(b & 15) << 4 for a, b in zip(first, second, strict=True))
        high += bytes(sum((int(half[k, i]) >> 4) << 2 * k for k in range(4)) for i in range(32))
    return low + high + struct.pack("16b", *s) + _half(d), (float(d) * s[:, None] * q).reshape(-1)


_ENCODERS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": lambda w: _k_quant(w, 4),
    "Q5_K": lambda w: _k_quant(w, 5),
    "Q6_K": _q6_k,
}


def encode(w, kind):
    """(bytes of a tensor, the values they stand for in float64)."""
    w = np.asarray(w, np.float64)
    if kind == "F32":
        return w.astype("<f4").tobytes(), w.astype(np.float32).astype(np.float64)
    if kind == "F16":
        return w.astype("<f2").tobytes(), w.astype(np.float16).astype(np.float64)
    if kind == "BF16":
        bits = w.astype(np.float32).view(np.uint32) >> 16  # rounded towards zero: any rounding serves
        return bits.astype("<u2").tobytes(), (bits << 16).view(np.float32).astype(np.float64)
    blocks = [_ENCODERS[kind](block) for block in w.reshape(-1, BLOCK[kind])]
    return b"".join(raw for raw, _ in blocks), np.concatenate([value for _, value in blocks]).reshape(w.shape)


def _text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value):
    """A metadata value with its type: bool, unsigned int, float, text, or a list of one of them."""
    if isinstance(value, list):
        kinds = {_value(item)[:4] for item in value}
        kind = kinds.pop() if kinds else struct.pack("<I", 8)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + b"".join(_value(v)[4:] for v in value)
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<Ii", 5, value) if value < 0 else struct.pack("<II", 4, value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<I", 8) + _text(value)


def write_gguf(path, metadata, tensors, *, version=3, alignment=32):
    """tensors: name to (type, shape as in NumPy, bytes)."""
    if alignment != 32:
        metadata = metadata | {"general.alignment": alignment}
    out = bytearray(b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)))
    for name, value in metadata.items():
        out += _text(name) + _value(value)
    offset = 0
    for name, (kind, shape, data) in tensors.items():
        out += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        out += struct.pack("<IQ", TYPE_IDS.get(kind, kind), offset)
        offset += -(-len(data) // alignment) * alignment
    out += bytes(-len(out) % alignment)
    for _, _, data in tensors.values():
        out += data + bytes(-len(data) % alignment)
    path.write_bytes(out)
    return path


_MATRICES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def _neighbours(w, heads):
    """Rows of Q or K in the order of a llama file: the rows that RoPE pairs (i, i + d / 2) as (2 i, 2 i + 1)."""
    d = len(w) // heads
    order = [head * d + i + half * d // 2 for head in range(heads) for i in range(d // 2) for half in (0, 1)]
    return w[order]


def _ordinary(w, heads):
    """The inverse of _neighbours."""
    out = np.empty_like(w)
    d = len(w) // heads
    for row in range(len(w)):
        head, i = divmod(row, d)
        out[head * d + i // 2 + i % 2 * d // 2] = w[row]
    return out


def decoder_tensors(decoder, architecture, kind, *, kinds=None):
    """Tensors of a GGUF file of type `kind` (`kinds`: other types by name), and the decoder that they hold exactly.

    Vectors are F32. Where a matrix has no whole number of blocks it is Q8_0's 32, or F32.
    """
    from copy import copy

    exact, tensors = copy(decoder), {}

    def put(name, w, heads=None):
        if w.ndim == 1:
            tensors[name] = ("F32", w.shape, encode(w, "F32")[0])
            return w
        this = (kinds or {}).get(name, kind)
        if w.shape[1] % BLOCK[this]:
            this = "Q8_0"
        raw, values = encode(_neighbours(w, heads) if heads else w, this)
        tensors[name] = (this, w.shape, raw)
        return _ordinary(values, heads) if heads else values

    exact.embed = put("token_embd.weight", decoder.embed)
    exact.layers = []
    for i, layer in enumerate(decoder.layers):
        w = copy(layer)
        for key, stem in _MATRICES.items():
            turned = {"q": decoder.heads, "k": decoder.kv_heads}.get(key) if architecture == "llama" else None
            setattr(w, key, put(f"blk.{i}.{stem}.weight", getattr(layer, key), turned))
        put(f"blk.{i}.attn_norm.weight", layer.input_norm)
        put(f"blk.{i}.ffn_norm.weight", layer.post_norm)
        for key in "qkv":
            if layer.q_bias is not None:
                put(f"blk.{i}.attn_{key}.bias", getattr(layer, f"{key}_bias"))
            if layer.q_norm is not None and key != "v":
                put(f"blk.{i}.attn_{key}_norm.weight", getattr(layer, f"{key}_norm"))
        exact.layers.append(w)
    put("output_norm.weight", decoder.norm)
    if decoder.head is not None:
        exact.head = put("output.weight", decoder.head)
    return tensors, exact


def decoder_metadata(decoder, architecture, *, max_context=512):
    """The sizes of a decoder."""
    hidden, head_dim = decoder.embed.shape[1], 2 * len(decoder.inv_freq)
    return {"general.architecture": architecture} | {
        f"{architecture}.{key}": value
        for key, value in {
            "context_length": max_context,
            "embedding_length": hidden,
            "block_count": len(decoder.layers),
            "feed_forward_length": len(decoder.layers[0].gate),
            "attention.head_count": decoder.heads,
            "attention.head_count_kv": decoder.kv_heads,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "attention.layer_norm_rms_epsilon": float(decoder.rms_eps),
            "rope.dimension_count": head_dim,
            "rope.freq_base": 10000.0,
        }.items()
    }


def tokenizer_metadata(tokenizer, *, pre="gpt-2", bos=0, eos=1, size=None):
    """A byte-level BPE tokenizer's tokens and merges; up to `size` tokens are padding, as converters add it."""
    import json

    state = json.loads(tokenizer.to_str())
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.get)
    added = {entry["id"]: entry["special"] for entry in state["added_tokens"]}
    types = [1 if i not in added else 3 if added[i] else 4 for i in range(len(tokens))]
    padding = [f"[PAD{i}]" for i in range(len(tokens), size or len(tokens))]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + padding,
        "tokenizer.ggml.token_type": types + [5] * len(padding),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.add_bos_token": True,
    }

"""Random decoders small enough to enumerate, as the oracle's weights and as native models."""

from dataclasses import replace

import numpy as np
from oracle.model import Decoder, Layer, dequantise
from specfast import _core

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def random_decoder(
    seed,
    *,
    V=8,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    architecture="llama",
    tied=True,
    windows=(None,),
):
    """Float32-exact weights; architecture "llama", "qwen2" (biases) or "qwen3" (QK-norm); windows of layers, in turn."""
    rng = np.random.default_rng(seed)

    def normal(*shape, spread=1.0):
        return rng.normal(0, spread, shape).astype(np.float32).astype(np.float64)

    def matrix(N, K):
        return normal(N, K, spread=2 / np.sqrt(K))

    def norm(n):
        return 1 + normal(n, spread=0.1)

    q, kv, wide = heads * head_dim, kv_heads * head_dim, 3 * hidden
    stack = []
    for i in range(layers):
        layer = Layer(
            input_norm=norm(hidden),
            q=matrix(q, hidden),
            k=matrix(kv, hidden),
            v=matrix(kv, hidden),
            o=matrix(hidden, q),
            post_norm=norm(hidden),
            gate=matrix(wide, hidden),
            up=matrix(wide, hidden),
            down=matrix(hidden, wide),
            window=windows[i % len(windows)],
        )
        if architecture == "qwen2":
            layer.q_bias, layer.k_bias, layer.v_bias = normal(q), normal(kv), normal(kv)
        if architecture == "qwen3":
            layer.q_norm, layer.k_norm = norm(head_dim), norm(head_dim)
        stack.append(layer)
    return Decoder(
        heads=heads,
        kv_heads=kv_heads,
        rms_eps=1e-5,
        inv_freq=(10_000.0 ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32).astype(np.float64),
        embed=normal(V, hidden, spread=0.3),
        norm=norm(hidden),
        layers=stack,
        head=None if tied else matrix(V, hidden),
    )


def native(decoder, *, precision="f32", isa=None, max_context=512, packs=None, kv_bits=16):
    """The same weights as a `_core.Model`: in float32, or as the matrices that `packs` has for the ids of arrays."""

    def floats(x):
        return np.ascontiguousarray(x, np.float32)

    def matrix(x):
        if packs and id(x) in packs:
            return packs[id(x)]
        return _core.Matrix("f32", *x.shape, floats(x).view(np.uint8).ravel())

    def layer(w):
        arrays = {name: x for name, x in vars(w).items() if isinstance(x, np.ndarray)}
        named = {name: matrix(x) if name in MATRICES else floats(x) for name, x in arrays.items()}
        return named | {"window": w.window}

    return _core.Model(
        hidden=decoder.embed.shape[1],
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_dim=2 * len(decoder.inv_freq),
        intermediate=len(decoder.layers[0].gate),
        vocab=len(decoder.embed),
        rms_eps=decoder.rms_eps,
        rope_inv_freq=floats(decoder.inv_freq),
        max_context=max_context,
        embed=matrix(decoder.embed),
        head=None if decoder.head is None else matrix(decoder.head),
        norm=floats(decoder.norm),
        layers=[layer(w) for w in decoder.layers],
        precision=precision,
        isa=isa,
        kv_bits=kv_bits,
    )


def quantised(decoder, bits, group):
    """`decoder` with its matrices rounded to MLX's affine groups, and the native model of a precision that holds them."""
    packs = {}

    def rounded(w):
        blocks = w.reshape(len(w), -1, group)
        low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
        scales = ((high - low) / (2**bits - 1)).astype(np.float32)
        biases = low.astype(np.float32)
        q = np.clip(np.rint((blocks - biases) / scales), 0, 2**bits - 1).astype(np.uint32).reshape(len(w), -1)
        words = (q.reshape(len(w), -1, 32 // bits) << np.arange(0, 32, bits, dtype=np.uint32)).sum(-1).astype(np.uint32)
        exact = dequantise(words, scales[..., 0], biases[..., 0], bits, group)
        packs[id(exact)] = _core.Matrix(
            f"q{bits}",
            *w.shape,
            words.view(np.uint8).ravel(),
            group=group,
            scales=scales.view(np.uint8).ravel(),
            biases=biases.view(np.uint8).ravel(),
            scale_format="f32",
        )
        return exact

    layers = [replace(w, **{name: rounded(getattr(w, name)) for name in MATRICES}) for w in decoder.layers]
    decoder = replace(decoder, layers=layers, embed=rounded(decoder.embed), head=rounded(decoder.head))
    return decoder, lambda precision, isa=None: native(decoder, precision=precision, isa=isa, packs=packs)

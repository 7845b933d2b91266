"""Random decoders small enough to enumerate, as the oracle's weights and as native models."""

import numpy as np
from oracle.model import Decoder, Layer
from specfast import _core

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def random_decoder(
    seed, *, V=8, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, architecture="llama", tied=True
):
    """Float32-exact weights; architecture "llama", "qwen2" (biases) or "qwen3" (QK-norm)."""
    rng = np.random.default_rng(seed)

    def normal(*shape, spread=1.0):
        return rng.normal(0, spread, shape).astype(np.float32).astype(np.float64)

    def matrix(N, K):
        return normal(N, K, spread=2 / np.sqrt(K))

    def norm(n):
        return 1 + normal(n, spread=0.1)

    q, kv, wide = heads * head_dim, kv_heads * head_dim, 3 * hidden
    stack = []
    for _ in range(layers):
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


def native(decoder, *, precision="f32", isa=None, max_context=512):
    """The same weights as a `_core.Model`, kept in float32."""

    def floats(x):
        return np.ascontiguousarray(x, np.float32)

    def matrix(x):
        return _core.Matrix("f32", *x.shape, floats(x).view(np.uint8).ravel())

    def layer(w):
        named = {name: x for name, x in vars(w).items() if x is not None}
        return {name: matrix(x) if name in MATRICES else floats(x) for name, x in named.items()}

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
    )

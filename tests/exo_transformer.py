"""A stand-in for exo's first-generation Transformer: the same attributes, weight order, RoPE table and call, final norm applied.

Run as a program it compares its own layers with the accelerated ones and prints what it found as JSON, so that one environment
can test another's tinygrad. SPECFAST_EXO_CHECKOUT, a checkout of exo's first generation, puts the real class in its place.
"""

import json
import os
import sys
import types

import numpy as np
from tinygrad import Tensor, Variable, nn

V, HIDDEN, HEADS, KV_HEADS, LAYERS, CONTEXT = 96, 64, 4, 2, 2, 128
DIM = HIDDEN // HEADS


class Attention:
    def __init__(self):
        self.n_heads, self.n_kv_heads, self.head_dim = HEADS, KV_HEADS, DIM
        self.wq = nn.Linear(HIDDEN, HEADS * DIM, bias=False)
        self.wk = nn.Linear(HIDDEN, KV_HEADS * DIM, bias=False)
        self.wv = nn.Linear(HIDDEN, KV_HEADS * DIM, bias=False)
        self.wo = nn.Linear(HEADS * DIM, HIDDEN, bias=False)

    def __call__(self, x, start, angles, cache):
        _, M, _ = x.shape
        q, k, v = (w(x).reshape(1, M, -1, DIM) for w in (self.wq, self.wk, self.wv))
        q, k = turned(q, angles), turned(k, angles)
        cache.shrink((None, None, (start, start + M), None, None)).assign(Tensor.stack(k, v)).realize()
        k, v = (
            cache[i].shrink((None, (0, start + M), None, None)).repeat_interleave(HEADS // KV_HEADS, 2).transpose(1, 2)
            for i in range(2)
        )
        mask = Tensor.full((1, 1, M, start + M), -1e8).triu(start + 1) if M > 1 else None
        out = q.transpose(1, 2).scaled_dot_product_attention(k, v, mask)
        return self.wo(out.transpose(1, 2).reshape(1, M, -1))


def turned(x, angles):
    """Neighbours (2 i, 2 i + 1) of every head as complex numbers times the angles'."""
    pairs = x.reshape(*x.shape[:3], -1, 2)
    a, b, cosine, sine = pairs[..., 0], pairs[..., 1], angles[..., 0], angles[..., 1]
    return Tensor.stack(a * cosine - b * sine, a * sine + b * cosine, dim=-1).flatten(3)


class FeedForward:
    def __init__(self):
        self.w1 = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.w2 = nn.Linear(3 * HIDDEN, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)

    def __call__(self, x):
        return self.w2(self.w1(x).silu() * self.w3(x))


class Block:
    def __init__(self):
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(HIDDEN, 1e-5), nn.RMSNorm(HIDDEN, 1e-5)

    def __call__(self, x, start, angles, cache):
        x = x + self.attention(self.attention_norm(x), start, angles, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer:
    def __init__(self):
        self.layers = [Block() for _ in range(LAYERS)]
        self.norm = nn.RMSNorm(HIDDEN, 1e-5)
        self.tok_embeddings = nn.Embedding(V, HIDDEN)
        self.output = nn.Linear(HIDDEN, V, bias=False)
        self.max_context = CONTEXT
        angle = np.arange(2 * CONTEXT)[:, None] * 500000.0 ** (-np.arange(0, DIM, 2) / DIM)
        table = np.stack([np.cos(angle), np.sin(angle)], -1).reshape(1, 2 * CONTEXT, 1, DIM // 2, 2)
        self.freqs_cis = Tensor(table.astype(np.float16)).realize()
        self.forward_jit = None

    def __call__(self, x, start_pos, cache=None):
        h = self.tok_embeddings(x)
        angles = self.freqs_cis.shrink((None, (start_pos, start_pos + x.shape[1]), None, None, None)).float()
        for layer, kept in zip(self.layers, cache, strict=True):
            h = layer(h, start_pos, angles, kept)
        return self.output(self.norm(h))


def real_transformer(checkout):
    """The class of a checkout, without the rest of exo, which it does not need."""
    for name in ("exo", "exo.inference", "exo.inference.tinygrad", "exo.inference.tinygrad.models"):
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(checkout, *name.split("."))]
        sys.modules[name] = package
    from exo.inference.shard import Shard
    from exo.inference.tinygrad.models.llama import Transformer as Real

    return Real(
        dim=HIDDEN, hidden_dim=3 * HIDDEN, n_heads=HEADS, n_layers=LAYERS, norm_eps=1e-5, vocab_size=V, n_kv_heads=KV_HEADS,
        rope_theta=500000, max_context=CONTEXT, shard=Shard("tiny", 0, LAYERS - 1, LAYERS), jit=False,
    )  # fmt: skip


def build(seed=0):
    checkout = os.environ.get("SPECFAST_EXO_CHECKOUT")
    model = real_transformer(checkout) if checkout else Transformer()
    rng = np.random.default_rng(seed)
    for name, tensor in sorted(nn.state.get_state_dict(model).items()):
        if name != "freqs_cis":
            spread = 2 / np.sqrt(tensor.shape[-1])
            values = rng.normal(0, spread, tensor.shape) if tensor.ndim == 2 else 1 + rng.normal(0, 0.1, tensor.shape)
            tensor.assign(Tensor(values.astype(np.float32))).realize()
    return model


def place(start, M):
    """A start position as the class's own loop gives it: a variable for single tokens, whose graph is then one for all."""
    return Variable("start_pos", 1, CONTEXT - 1).bind(start) if M == 1 else start


def caches():
    return [Tensor.zeros(2, 1, CONTEXT, KV_HEADS, DIM).contiguous().realize() for _ in range(LAYERS)]


def main():
    import specfast.tinygrad as st

    stock, fast = build(), build()
    st.accelerate(fast, "f32")
    ids = np.random.default_rng(1).integers(0, V, 64).astype(np.int32)
    own, ours, other = caches(), caches(), caches()
    fast(Tensor(ids[None, 20:27]), 0, other).numpy()  # another request between
    errors = []
    for start, M in ((0, 3), (3, 1), (4, 4), (6, 1), (7, 1)):
        x = Tensor(ids[None, start : start + M])
        at = place(start, M)
        expected, found = stock(x, at, own).numpy(), fast(x, at, ours).numpy()
        errors.append(float(np.abs(expected - found).max() / np.abs(expected).max()))
    tokens, pending, start, cache = [1, 2, 3], [1, 2, 3], 0, caches()
    for _ in range(24):
        row = stock(Tensor([pending], dtype="int32"), place(start, len(pending)), cache).numpy()[0, -1]
        start += len(pending)
        pending = [int(row.argmax())]
        tokens += pending
    texts = [
        st.generate(fast, [1, 2, 3], 24, drafter=name, num_draft_tokens=4).token_ids for name in ("none", "suffix")
    ]
    with_draft = st.generate(fast, [1, 2, 3], 24, build(seed=5), num_draft_tokens=4).token_ids
    report = st.report(fast)
    print(
        json.dumps(
            {"errors": errors, "stock": tokens[3:], "texts": [*texts, with_draft], "path": report.path,
             "weights": dict(report.weights), "version": list(st.private.version())}
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()

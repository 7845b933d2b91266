"""A decoding loop whose arithmetic is all done by Metal kernels: the host only enqueues launches, and reads nothing."""

import numpy as np
from metal_launch import empty
from specfast import metal


class MetalModel:
    """A random float32 decoder of tiny_models, its cache and its launches. run(launch, *buffers) executes one."""

    def __init__(self, decoder, matrices, run, capacity):
        """matrices: id of a matrix of the decoder to (Weights, its three buffers); those that are missing are floats."""
        self.decoder, self.run, self.capacity = decoder, run, capacity
        self.vocab, self.hidden = decoder.embed.shape
        self.head_dim = 2 * len(decoder.inv_freq)
        self.kv_heads = len(decoder.layers[0].k) // self.head_dim
        self.matrices = matrices
        self.norms = {}
        shape = (self.kv_heads, capacity, self.head_dim)
        self.caches = [(empty(shape, "f32"), empty(shape, "f32")) for _ in decoder.layers]
        self.inv_freq = decoder.inv_freq.astype(np.float32)
        self.unused = np.zeros(8, np.float32)

    def floats(self, x):
        return self.norms.setdefault(id(x), np.ascontiguousarray(x, np.float32))

    def matrix(self, x):
        if id(x) in self.matrices:
            return self.matrices[id(x)]
        floats = self.floats(x)
        return metal.Weights(), (floats.view(np.uint32), floats, floats)

    def forward(self, tokens, state, M, *, first, ahead, logits_rows):
        """Rows tokens[first : first + M] at state[0] + ahead; logits and best of the last rows."""
        d, K, eps = self.decoder, self.hidden, self.decoder.rms_eps
        weights, buffers = self.matrix(d.embed)
        x, normed = empty((M, K), "f32"), empty((M, K), "f32")
        self.run(metal.embed_rows(weights, "f32", M=M, V=self.vocab, K=K, first=first), *buffers, tokens, x)
        for layer, (keys, values) in zip(d.layers, self.caches, strict=True):
            self.attend(layer, keys, values, state, x, normed, ahead)
            self.run(metal.norm_rows("f32", M=M, K=K, eps=eps), x, self.floats(layer.post_norm), normed)
            (weights, gate), (_, up), (_, down) = (self.matrix(w) for w in (layer.gate, layer.up, layer.down))
            wide = len(layer.gate)
            h = empty((M, wide), "f32")
            self.run(metal.swiglu_rows(weights, "f32", M=M, N=wide, K=K), *gate, *up, normed, h)
            self.run(metal.matmul_rows(weights, "f32", M=M, N=K, K=wide, epilogue="residual"), *down, h, x, x)
        head = d.embed if d.head is None else d.head
        x, normed, M = x[M - logits_rows :], normed[M - logits_rows :], logits_rows
        self.run(metal.norm_rows("f32", M=M, K=K, eps=eps), x, self.floats(d.norm), normed)
        weights, buffers = self.matrix(head)
        logits, parts, best = (
            empty((M, self.vocab), "f32"),
            empty((M, -(-self.vocab // 256), 4), "f32"),
            empty((M + 1, 4), "f32"),
        )
        launch = metal.logits_rows(weights, "f32", M=M, V=self.vocab, K=K, limit=self.vocab)
        self.run(launch, *buffers, normed, logits, parts)
        self.run(metal.logits_best(M=M, V=self.vocab), parts, best)
        return logits, best

    def attend(self, layer, keys, values, state, x, normed, ahead):
        M, K, heads, dim, eps = len(x), self.hidden, self.decoder.heads, self.head_dim, self.decoder.rms_eps
        shape = {"M": M, "heads": heads, "kv_heads": self.kv_heads, "head_dim": dim, "capacity": self.capacity}
        bias = norms = self.unused
        between = "nothing"
        if layer.q_bias is not None:
            between, bias = "bias", np.concatenate([layer.q_bias, layer.k_bias, layer.v_bias]).astype(np.float32)
        if layer.q_norm is not None:
            between, norms = "qk_norm", np.concatenate([layer.q_norm, layer.k_norm]).astype(np.float32)
        self.run(metal.norm_rows("f32", M=M, K=K, eps=eps), x, self.floats(layer.input_norm), normed)
        parts = [self.matrix(w) for w in (layer.q, layer.k, layer.v)]
        q, out = empty((M, heads, dim), "f32"), empty((M, heads, dim), "f32")
        launch = metal.qkv_rope_append(parts[0][0], "f32", **shape, K=K, eps=eps, ahead=ahead, between=between)
        buffers = [b for _, three in parts for b in three]
        self.run(launch, *buffers, normed, self.inv_freq, bias, norms, state, q, keys, values)
        partial = empty((-(-self.capacity // metal.SPAN), M, heads, dim + 2), "f32")
        launch = metal.attend_rows("f32", **shape, positions=self.capacity, ahead=ahead)
        self.run(launch, q, keys, values, state, partial)
        self.run(metal.attend_spans("f32", M=M, heads=heads, head_dim=dim, ahead=ahead), partial, state, out)
        weights, buffers = self.matrix(layer.o)
        self.run(metal.matmul_rows(weights, "f32", M=M, N=K, K=heads * dim, epilogue="residual"), *buffers, out, x, x)


class MetalLoop:
    """Draft, verify and commit with lengths, tokens and verdicts in device memory.

    tokens: the last committed token, the pending one, the drafted ones. Every round the draft reads the last committed
    token again: it may not have read it when all drafted tokens were kept, and its keys have the same bits.
    """

    def __init__(self, target, draft, prompt, *, gamma, rule, temperature, seed):
        self.target, self.draft, self.run = target, draft, target.run
        self.gamma, self.rule, self.temperature, self.seed = gamma, rule, temperature, seed
        self.vocab = target.vocab
        self.tokens, self.state = np.zeros(32, np.int32), np.zeros(8, np.int32)
        self.text, self.verdict = np.full(512, -1, np.int32), np.zeros(8, np.int32)
        for model in (target, draft):
            for first in range(0, len(prompt) - 1, metal.MAX_ROWS):
                rows = prompt[first : min(first + metal.MAX_ROWS, len(prompt) - 1)]
                held = np.zeros(16, np.int32)
                held[: len(rows)] = rows
                self.state[:2] = first
                model.forward(held, self.state, len(rows), first=0, ahead=0, logits_rows=1)
        self.state[:3] = len(prompt) - 1, len(prompt) - 1, 0
        self.tokens[:2] = prompt[-2:]

    def settings(self, gamma, **kwargs):
        return metal.VerifySettings(gamma, self.vocab, rule=self.rule, seed=self.seed, **kwargs)

    def laws(self, logits, best):
        """The laws of rows of logits, and their weights."""
        M, V = logits.shape
        weights, masses = empty((M, V), "f32"), np.zeros(M * -(-V // 256) + 8, np.uint64)
        scales, p = np.zeros(M + 8, np.uint64), empty((M, V), "f32")
        self.run(metal.law_weights(M=M, V=V, limit=V, temperature=self.temperature), logits, best, weights, masses)
        self.run(metal.law_scales(M=M, V=V, limit=V), masses, scales)
        self.run(metal.law_rows(M=M, V=V), weights, scales, p)
        return p, weights

    def decide(self, logits, best, q, settings, out):
        packed = settings.array()
        if self.temperature == 0:
            return self.run(metal.verify_greedy(), best, self.tokens, packed, out)
        p, weights = self.laws(logits, best)
        M, V = p.shape
        if self.rule == "coupled":
            leaders = np.zeros(M * -(-V // 4096) * 3 + 8, np.uint32)
            self.run(metal.couple_rows(M=M, V=V), weights, self.state, packed, leaders)
            return self.run(metal.couple_pick(), leaders, self.tokens, packed, out)
        prefixes, masses = np.zeros(M + 8, np.uint64), np.zeros(M * -(-V // 256) + 8, np.uint64)
        self.run(metal.verify_scan(), p, q, self.tokens, packed, prefixes)
        self.run(metal.verify_masses(gamma=M - 1, V=V), p, q, self.tokens, packed, prefixes, masses)
        self.run(metal.verify_pick(), p, q, self.tokens, packed, prefixes, out, masses)
        return p

    def round(self, number):
        q = np.zeros((self.gamma, self.vocab), np.float32)
        for i in range(self.gamma):
            M = 2 if i == 0 else 1
            logits, best = self.draft.forward(
                self.tokens, self.state, M, first=1 + i - (M - 1), ahead=i - (M - 1), logits_rows=1
            )
            settings = self.settings(0, purpose="draft", round=number, position=i, first=2, slot=2 + i, with_tau=False)
            law = self.decide(logits, best, q, settings, self.tokens)
            if isinstance(law, np.ndarray):
                q[i] = law[0]
        logits, best = self.target.forward(
            self.tokens, self.state, self.gamma + 1, first=1, ahead=0, logits_rows=self.gamma + 1
        )
        settings = self.settings(self.gamma, round=number, draft_vocab=self.vocab, first=2)
        self.decide(logits, best, q, settings, self.verdict)
        self.run(metal.commit_round(), self.verdict, self.tokens, self.state, self.text)

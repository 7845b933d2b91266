"""Calls every function of the native module with random, mostly impossible arguments: `python fuzz_bindings.py SEED CALLS`.

A crash ends the process; an exception of another kind than those a caller can expect is raised.
"""

import sys

import numpy as np
from specfast import _core

EXPECTED = (_core.SpecfastError, TypeError, MemoryError)
INTEGERS = (-(2**31), -1, 0, 1, 2, 3, 6, 7, 32, 64, 100, 2**20, 2**31 - 1, 2**31, 2**63, 2**64 - 1)
REALS = (-1.0, 0.0, 1e-30, 0.5, 1.0, 2.0, 1e30, float("nan"), float("-inf"))
SIZES = (0, 1, 2, 3, 5, 16, 17, 32, 33, 64)


class Fuzzer:
    """Random arguments: one in `odds` is unusual."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.odds = self.pick((5, 40, 400))

    def pick(self, values):
        return values[int(self.rng.integers(len(values)))]

    def wild(self):
        return self.rng.integers(self.odds) == 0

    def integer(self, low, high):
        return self.pick(INTEGERS) if self.wild() else int(self.rng.integers(low, high + 1))

    def real(self, low, high):
        return self.pick(REALS) if self.wild() else float(self.rng.uniform(low, high))

    def name(self, *names):
        return self.pick(("", "x", "int8\0", None)) if self.wild() else self.pick(names)

    def isa(self):
        return self.name(*_core.build_info()["isas_supported"], None)

    def array(self, shape, dtype=np.float32, high=None):
        if self.wild():
            shape = tuple(self.pick(SIZES) for _ in range(self.rng.integers(1, 4)))
        if self.wild():
            dtype = self.pick((np.float32, np.float64, np.int32, np.int64, np.uint8, np.float16))
        values = self.rng.standard_normal(shape) if high is None else self.rng.integers(0, high, shape)
        if self.wild():
            values = values * 1e38
        if self.wild() and values.size:
            values.flat[0] = self.pick((np.nan, np.inf, -1, 2.0**31)) if values.dtype.kind == "f" else -1
        with np.errstate(all="ignore"):
            array = values.astype(dtype)
        if self.wild():
            array = self.pick((array.T, array[::-1], array[..., :0], np.asfortranarray(array), None))
        return array

    def bytes(self, size):
        size = self.pick(SIZES) if self.wild() else size
        return self.rng.integers(0, 50, size).astype(np.uint8)

    def matrix(self, N, K):
        sound = [group for group in (32, 64, 128) if K % group == 0]
        kind = self.name(*(("q4", "q8") if sound else ()), "bf16", "f16", "f32")
        N, K = (self.pick(INTEGERS) if self.wild() else size for size in (N, K))
        small = (N if 0 <= N < 1000 else 1), (K if 0 <= K < 1000 else 1)
        if kind not in ("q4", "q8"):
            return _core.Matrix(kind, N, K, self.bytes(small[0] * small[1] * (4 if kind == "f32" else 2)))
        group = self.pick(INTEGERS if self.wild() or not sound else sound)
        groups = small[0] * (small[1] // group if 0 < group < 1000 else 1)
        scales = self.name("f32", "bf16", "f16")
        size = groups * (4 if scales == "f32" else 2)
        weight = self.bytes(small[0] * small[1] // (2 if kind == "q4" else 1))
        return _core.Matrix(
            kind, N, K, weight, group=group, scales=self.bytes(size), biases=self.bytes(size), scale_format=scales
        )

    def law(self):
        return _core.Law(self.real(0, 2), self.integer(0, 100), self.real(0, 1), self.real(0, 1), self.integer(0, 100))

    def matmul_rows(self):
        K = self.pick((1, 7, 32, 64, 128, 192))
        matrix = self.matrix(self.pick(SIZES), K)
        return _core.matmul_rows(
            self.array((self.pick(SIZES), K)), matrix, self.name("int8", "bf16", "f32"), self.isa()
        )

    def attend_rows(self):
        kv_heads, group = self.integer(1, 4) % 100, self.integer(1, 3) % 100
        dim = self.pick((0, 1, 1026) if self.wild() else (2, 6, 64, 80, 1024))
        S = self.integer(1, 600) % 3000
        q = self.array((self.integer(1, min(S, 40) or 1) % 100, kv_heads * group, dim))
        return _core.attend_rows(
            q, self.array((S, kv_heads, dim)), self.array((S, kv_heads, dim)), self.pick((8, 16, 32, 4)), self.isa(),
            self.integer(0, 700),
        )  # fmt: skip

    def law_rows(self):
        return _core.law_rows(self.array((self.pick(SIZES), self.pick(SIZES))), self.law(), self.isa())

    def sample_token(self):
        return _core.sample_token(self.array((self.pick(SIZES),)), self.real(0, 1), self.isa())

    def _rule(self):
        gamma, V = self.pick((0, 1, 2, 5)), self.pick(SIZES)
        q = None if self.wild() else self.array((gamma, self.pick((V, max(V, 1) - 1, V + 3))))
        tokens = self.array((gamma,), np.int32, high=max(V, 1))
        return self.array((gamma + 1, V)), q, tokens, self.rng.random(gamma + (2 if self.wild() else 1))

    def verify_tokens(self):
        p, q, tokens, u = self._rule()
        rows = None if p is None else np.abs(p)
        return _core.verify_tokens(rows, q, tokens, u, self.real(0.5, 2), self.isa())

    def verify_logits(self):
        logits, q, tokens, u = self._rule()
        return _core.verify_logits(logits, q, tokens, u, self.law(), self.real(0.5, 2), self.isa())

    def uniform(self):
        return _core.uniform(*(self.integer(0, 2**32 - 1) for _ in range(4)))

    def read_bandwidth(self):
        return _core.read_bandwidth(self.array((self.pick(SIZES) * 100,), np.uint8, high=9), self.integer(-1, 3))

    def peak_dot(self):
        milliseconds = self.pick((-1.0, 0.0, 1e-3, float("nan"), float("inf"), 1e300))
        return _core.peak_dot(self.name("int8", "bf16", "f32"), self.isa(), milliseconds)

    def set_num_threads(self):
        return _core.set_num_threads(self.pick((-(2**31), -1, 0, 1, 2, 257, 2**31, 2**64)))

    def _layer(self, hidden, q, kv, intermediate):
        sizes = {
            "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q),
            "gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate),
        }  # fmt: skip
        layer = {key: self.matrix(*size) for key, size in sizes.items()}
        layer |= {"input_norm": self.array((hidden,)), "post_norm": self.array((hidden,))}
        if self.wild():
            key = self.pick((*layer, "q_bias", "k_norm"))
            layer[key] = self.pick((None, 1, "x", self.array((3, 3)), [1.0]))
        if self.wild():
            del layer[self.pick(tuple(layer))]
        return layer if not self.wild() else self.pick((layer, None, [], {}))

    def model(self):
        self.odds *= 10
        hidden, kv_heads, group, dim = (
            self.pick((1, 64, 128)),
            self.pick((1, 2)),
            self.pick((1, 3)),
            self.pick((2, 6, 64)),
        )
        intermediate, vocab = self.pick((1, 32, 100, 128)), self.pick((1, 7, 100))
        layers = [
            self._layer(hidden, kv_heads * group * dim, kv_heads * dim, intermediate)
            for _ in range(self.integer(0, 2) % 4)
        ]
        model = _core.Model(
            hidden=self.integer(hidden, hidden),
            heads=self.integer(kv_heads * group, kv_heads * group),
            kv_heads=self.integer(kv_heads, kv_heads),
            head_dim=self.integer(dim, dim),
            intermediate=self.integer(intermediate, intermediate),
            vocab=self.integer(vocab, vocab),
            rms_eps=self.real(1e-6, 1e-5),
            rope_inv_freq=self.array((dim // 2,)),
            max_context=self.integer(1, 600),
            embed=self.matrix(vocab, hidden),
            head=self.matrix(vocab, hidden) if self.rng.integers(2) else None,
            norm=self.array((hidden,)),
            layers=layers if not self.wild() else self.pick(([1], None, "x")),
            precision=self.name("int8", "bf16", "f32"),
            isa=self.isa(),
            pack=bool(self.rng.integers(2)),
        )
        self.odds = 6
        cache, proposal = _core.Cache(model, self.integer(0, 300)), _core.Proposal()
        for _ in range(10):
            try:
                self._step(model, cache, proposal)
            except EXPECTED as error:
                assert str(error) or isinstance(error, MemoryError)

    def _step(self, model, cache, proposal):
        tokens = self.array((self.pick((1, 2, 17, 40)),), np.int32, high=model.vocab)
        seed, round_ = self.integer(0, 9), self.integer(0, 9)
        match self.rng.integers(11):
            case 0:
                model.forward(cache, tokens, self.integer(0, 3))
            case 1:
                model.prefill(cache, tokens)
            case 2:
                model.draft(cache, tokens, self.integer(0, 8), self.law(), seed, round_, proposal)
            case 3:
                given = None if self.wild() else proposal
                model.verify(cache, tokens, given, self.law(), self.real(0.5, 2), seed, round_)
            case 4:
                proposal.set_tokens(tokens)
            case 5:
                cache.commit(self.integer(0, 3))
            case 6:
                cache.truncate(self.integer(0, 30))
            case 7:
                cache.rollback()
                _ = proposal.tokens, proposal.q, cache.nbytes
            case 8:
                model.forward_into(cache, tokens, self.array((self.pick((0, 1, 2, 17, 41)), model.vocab)))
            case 9:
                _ = cache.keys(self.integer(0, 1)), cache.values(self.integer(0, 1))
            case 10:
                shape = model.kv_heads, self.pick((0, 1, 300)), model.head_dim
                keys, values = ([self.array(shape) for _ in range(model.layers)] for _ in range(2))
                cache.assign(keys if not self.wild() else self.pick(([], [1], None)), values)


CALLS = (
    "matmul_rows", "attend_rows", "law_rows", "sample_token", "verify_tokens", "verify_logits", "uniform",
    "read_bandwidth", "peak_dot", "set_num_threads", "model",
)  # fmt: skip


def main(seed, calls):
    """Prints how often each function returned, of how many calls."""
    returned = dict.fromkeys(CALLS, 0)
    for i in range(calls):
        fuzzer, name = Fuzzer([seed, i]), CALLS[i % len(CALLS)]
        print(f"{i} {name}", file=sys.stderr, flush=True)
        try:
            getattr(fuzzer, name)()
            returned[name] += 1
        except EXPECTED as error:
            assert str(error) or isinstance(error, MemoryError), name
    print(*(f"{name}={count}" for name, count in returned.items()))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

"""specfast: q4g64 weights, packed where the kernels pack them; a pass is `verify`, which also takes the greedy decision."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import specfast
from engines import check_logits, random_tokens
from specfast import _core
from specfast.bench.random_model import random_model
from specfast.bench.shapes import find_shape

QUANT = "q4g64"


class Specfast:
    """A random model in memory and a cache of it."""

    def __init__(self, shape: str, context: int, threads: int) -> None:
        _core.set_num_threads(threads)
        self.model = random_model(find_shape(shape), QUANT, max_context=context + 64)
        self.random = np.random.default_rng(1)
        self.cache = _core.Cache(self.model, context + 32)
        self.model.prefill(self.cache, random_tokens(self.random, context, self.model.vocab))
        self.greedy, self.proposal = _core.Law(temperature=0.0), _core.Proposal()
        check_logits(self.model.forward(self.cache, np.array([1, 2], np.int32), 2), 2, self.model.vocab)
        self.cache.rollback()
        self.about = {
            "version": specfast.__version__,
            "weights": f"{QUANT}, {self.model.isa}",
            "weight_bytes": self.model.weight_bytes,
            "macs_per_row": self.model.macs_per_row,
        }

    def rows(self, M: int) -> float:
        tokens = random_tokens(self.random, M, self.model.vocab)
        self.proposal.set_tokens(tokens[1:])
        start = time.perf_counter()
        self.model.verify(self.cache, tokens[:1], self.proposal, self.greedy, 1.0, 0, 0)
        seconds = time.perf_counter() - start
        self.cache.rollback()
        return seconds


def prepare(shape: str, cache: Path) -> None:
    """Nothing: the weights are made in memory."""


def start(shape: str, context: int, threads: int, cache: Path) -> Specfast:
    return Specfast(shape, context, threads)

"""What a request asks of sampling, and the native law it becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import _core
from .config import kept_by_threshold
from .errors import ConfigurationError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn; the same law is applied to target and draft.

    Attributes:
        temperature: 0 is greedy.
        top_k_threshold: share of the vocabulary that is cut; 1.0 is greedy, 0.0 cuts nothing.
        top_k: keeps this many tokens; 0 keeps all.
        top_p: keeps the smallest set of tokens with this mass.
        min_p: drops tokens below this fraction of the likeliest one.
        seed: of the random streams.

    Raises:
        ConfigurationError: a value outside its range.
    """

    temperature: float = 1.0
    top_k_threshold: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        def require(name: str, ok: bool, limit: str) -> None:
            if not ok:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}, but must be {limit}")

        require(
            "temperature", math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "in 0 to 100; 0 is greedy"
        )
        require(
            "top_k_threshold", 0 <= self.top_k_threshold <= 1, "in 0 to 1 (to keep a number of tokens, use --top-k)"
        )
        require("top_k", self.top_k >= 0, "0 (off) or positive")
        require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        require("min_p", 0 <= self.min_p <= 1, "in 0 to 1")
        require("seed", 0 <= self.seed < 2**64, "in 0 to 2^64 - 1")

    def law(self, vocab: int, vocab_limit: int) -> _core.Law:
        """The native law over `vocab` logits, of which ids from `vocab_limit` on are padding."""
        counts = [k for k in (self.top_k, kept_by_threshold(self.top_k_threshold, vocab)) if 0 < k < vocab]
        keep = min(counts, default=0)
        temperature = 0.0 if keep == 1 else self.temperature
        return _core.Law(temperature, keep, self.top_p, self.min_p, vocab_limit)

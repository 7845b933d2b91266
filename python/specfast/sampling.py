"""What a request asks of sampling, and the native law it becomes."""

from __future__ import annotations

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
        self._require("temperature", float, 0, 100, "; 0 is greedy")
        self._require("top_k_threshold", float, 0, 1, "; to keep a number of tokens use --top-k")
        self._require("top_k", int, 0, 2**31 - 1, "; 0 keeps all")
        self._require("top_p", float, 0, 1, "", positive=True)
        self._require("min_p", float, 0, 1)
        self._require("seed", int, 0, 2**64 - 1)

    def _require(self, name: str, kind: type, low: int, high: int, hint: str = "", *, positive: bool = False) -> None:
        value = getattr(self, name)
        kinds = int if kind is int else (int, float)
        known = isinstance(value, kinds) and not isinstance(value, bool)
        if not known or not low <= value <= high or (positive and value == 0):
            what = "a whole number" if kind is int else "a number"
            above = "above 0 and at most 1" if positive else f"in {low} to {high}"
            raise ConfigurationError(f"{name} is {value!r}, but must be {what} {above}{hint}")

    def law(self, vocab: int, vocab_limit: int) -> _core.Law:
        """The native law over `vocab` logits, of which ids from `vocab_limit` on are padding."""
        counts = [k for k in (self.top_k, kept_by_threshold(self.top_k_threshold, vocab)) if 0 < k < vocab]
        keep = min(counts, default=0)
        temperature = 0.0 if keep == 1 else self.temperature
        return _core.Law(temperature, keep, self.top_p, self.min_p, vocab_limit)

"""What a request asks of sampling, and the native law it becomes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _core
from .config import kept_by_threshold
from .context import Context
from .errors import ConfigurationError

TRUNCATIONS = ("hf", "mlx")
Mask = Callable[[Sequence[int]], "np.ndarray[Any, Any] | None"]
_LEAST = float(np.finfo(np.float32).tiny)  # of what has to stay above 0 in the native law
_NO_BIAS: Mapping[int, float] = {}


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn; the same law is applied to target and draft.

    Attributes:
        temperature: 0 is greedy.
        top_k_threshold: share of the vocabulary that is cut; 1.0 is greedy, 0.0 cuts nothing.
        top_k: keeps this many tokens; 0 keeps all.
        top_p: keeps the smallest set of tokens with this mass.
        min_p: drops tokens below this fraction of the likeliest one.
        truncation: "hf" applies the temperature, then top_k, top_p and min_p; "mlx" truncates at temperature 1, top_p by the
            mass of all tokens, and then applies the temperature.
        repetition_penalty: divides positive logits of tokens in the prompt or the text, and multiplies negative ones
            (Keskar et al. 2019, arXiv:1909.05858; as Hugging Face and mlx-lm); 1.0 is none.
        presence_penalty: subtracted from the logits of generated tokens (OpenAI's; vLLM counts alike); -2 to 2.
        frequency_penalty: the same, times how often the token was generated; -2 to 2.
        penalty_window: the penalties look at this many last tokens; 0 is all, mlx-lm's default is 20.
        logit_bias: added to logits, by token id, before the penalties; -inf forbids a token.
        mask: called with all tokens before a position, prompt and drafted ones included; tells which may follow: an array of
            bool (n,), or bits in uint32 or int32 words (ids beyond it may not), or None for any. It also sees drafted texts
            that are then rejected, never one that goes on after an end token. An exception it raises ends the request
            where the text itself gets there, and only the draft elsewhere.
        seed: of the random streams.

    Raises:
        ConfigurationError: a value outside its range.
    """

    temperature: float = 1.0
    top_k_threshold: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    truncation: str = "hf"
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)
    mask: Mask | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._require("temperature", float, 0, 100, "; 0 is greedy")
        self._require("top_k_threshold", float, 0, 1, "; to keep a number of tokens use --top-k")
        self._require("top_k", int, 0, 2**31 - 1, "; 0 keeps all")
        self._require("top_p", float, 0, 1, "", positive=True)
        self._require("min_p", float, 0, 1)
        self._require("seed", int, 0, 2**64 - 1)
        self._require("repetition_penalty", float, 0, 100, "; 1 is none", positive=True)
        self._require("presence_penalty", float, -2, 2, "; 0 is none")
        self._require("frequency_penalty", float, -2, 2, "; 0 is none")
        self._require("penalty_window", int, 0, 2**31 - 1, "; 0 is all tokens")
        if self.truncation not in TRUNCATIONS:
            raise ConfigurationError(f"truncation is {self.truncation!r}, but must be one of {', '.join(TRUNCATIONS)}")
        if self.mask is not None and not callable(self.mask):
            raise ConfigurationError(f"mask is {self.mask!r}, but must be a function of the tokens so far")
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigurationError(f"logit_bias is {self.logit_bias!r:.100}, but must be numbers by token id")
        for token, bias in self.logit_bias.items():
            ids = isinstance(token, int) and not isinstance(token, bool) and token >= 0
            number = isinstance(bias, (int, float)) and (bias == -math.inf or abs(bias) <= sys.float_info.max)
            if not ids or not number:
                raise ConfigurationError(
                    f"logit_bias of {token!r} is {bias!r}, but must be a number below infinity for a token id"
                )

    def _require(self, name: str, kind: type, low: int, high: int, hint: str = "", *, positive: bool = False) -> None:
        value = getattr(self, name)
        kinds = int if kind is int else (int, float)
        known = isinstance(value, kinds) and not isinstance(value, bool)
        if not known or not low <= value <= high or (positive and value < _LEAST):
            what = "a whole number" if kind is int else "a number"
            above = f"above 0 (at least {_LEAST:.2g}) and at most {high}" if positive else f"in {low} to {high}"
            raise ConfigurationError(f"{name} is {value!r}, but must be {what} {above}{hint}")

    def law(self, vocab: int, vocab_limit: int) -> _core.Law:
        """The native law over `vocab` logits, of which ids from `vocab_limit` on are padding."""
        counts = [k for k in (self.top_k, kept_by_threshold(self.top_k_threshold, vocab)) if 0 < k < vocab]
        keep = min(counts, default=0)
        temperature = 0.0 if keep == 1 else self.temperature
        return _core.Law(temperature, keep, self.top_p, self.min_p, vocab_limit, self.truncation == "mlx")

    def adjustments(self, prompt_length: int, vocab_limit: int, ends: Collection[int] = ()) -> _core.Adjustments | None:
        """The native edits of logits before the law, for target and draft of one request; None where there are none.

        Args:
            prompt_length: tokens of the prompt.
            vocab_limit: ids from it on are padding.
            ends: tokens that end the text; nothing is edited after them.

        Raises:
            ConfigurationError: a bias on a token outside the vocabulary.
        """
        outside = [token for token in self.logit_bias if token >= vocab_limit]
        if outside:
            raise ConfigurationError(f"logit_bias names token {outside[0]}, but the vocabulary has {vocab_limit}")
        penalties = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        if not penalties and not self.logit_bias and self.mask is None:
            return None
        return _core.Adjustments(
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            penalty_window=self.penalty_window,
            prompt_length=prompt_length,
            logit_bias=dict(self.logit_bias),
            mask=self.mask,
            ends=list(ends),
        )


def follow(adjustments: _core.Adjustments | None, context: Context) -> None:
    """Tells the edits the tokens that were kept since they were last told."""
    if adjustments is not None:
        adjustments.follow(np.asarray(context.tokens[adjustments.length :], dtype=np.int32))

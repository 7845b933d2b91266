"""Targets: who decides what a round keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from . import _core
from .context import Context
from .sampling import follow

PREFILL_CHUNK = 256
Progress = Callable[[int, int], None]
MakeTarget = Callable[..., "RequestTarget"]
_ACCEPT, _RESIDUAL = 1, 2  # purposes of draws, as in csrc/random.hpp


@runtime_checkable
class Target(Protocol):
    """Checks a proposal in one pass and follows what was kept. One per request, with its state."""

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        """Reads the prompt, all but its last token."""

    def verify(self, context: Context, proposal: _core.Proposal | None) -> _core.Verdict:
        """Decides how many proposed tokens stay and which token follows; without a proposal this is plain decoding."""

    def commit(self, kept: int) -> None:
        """Follows a round that kept `kept` tokens, of which the last is not yet in any cache."""


class RequestTarget(Target, Protocol):
    """What an engine needs of a target besides: what its draft draws with, and word when the request ends."""

    law: _core.Law
    seed: int
    rule: str
    adjustments: _core.Adjustments | None

    @property
    def capacity(self) -> int:
        """Most positions of the request."""

    def close(self) -> None:
        """Called when the request ends."""


def prefill(model: _core.Model, cache: _core.Cache, tokens: Sequence[int], progress: Progress | None) -> None:
    """Runs tokens through a model into its cache, in chunks so that it can be watched and interrupted."""
    for first in range(0, len(tokens), PREFILL_CHUNK):
        model.prefill(cache, np.asarray(tokens[first : first + PREFILL_CHUNK], dtype=np.int32))
        if progress:
            progress(min(first + PREFILL_CHUNK, len(tokens)), len(tokens))


class NativeTarget:
    """A model run by the native decoder, one call per round. Its cache holds all of the context but the last token.

    Args:
        model: the target.
        law: what its logits become.
        lenience: of acceptance; 1 is exact.
        seed: of the random streams.
        capacity: most tokens of the request.
        rule: "token", "block" (which is token for proposals without laws) or "coupled"; the last two at lenience 1.
        adjustments: edits of the logits before the law.
    """

    def __init__(
        self,
        model: _core.Model,
        law: _core.Law,
        lenience: float,
        seed: int,
        capacity: int,
        rule: str = "token",
        adjustments: _core.Adjustments | None = None,
    ) -> None:
        self.model, self.law, self.seed, self.rule, self.adjustments = model, law, seed, rule, adjustments
        self._lenience = lenience
        self.cache = _core.Cache(model, capacity)

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        prefill(self.model, self.cache, tokens, progress)

    def draft_early(self, context: Context, gamma: int, layers: int, proposal: _core.Proposal) -> None:
        """Drafts gamma tokens with the first layers; `verify` goes on from what these computed."""
        pending = np.asarray(context.tokens[self.cache.length :], dtype=np.int32)
        follow(self.adjustments, context)
        draws = self.law, self.seed, context.round, proposal, self.rule, self.adjustments
        self.model.draft_early(self.cache, pending, gamma, layers, *draws)

    def verify(self, context: Context, proposal: _core.Proposal | None) -> _core.Verdict:
        pending = np.asarray(context.tokens[self.cache.length :], dtype=np.int32)
        follow(self.adjustments, context)
        draws = self.law, self._lenience, self.seed, context.round, self.rule
        return self.model.verify(self.cache, pending, proposal, *draws, self.adjustments)

    def commit(self, kept: int) -> None:
        self.cache.commit(kept)

    def close(self) -> None:
        """What is here goes with the object."""


def judge(
    logits: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int32],
    q: npt.NDArray[np.float32] | None,
    position: int,
    round_number: int,
    law: _core.Law,
    seed: int,
    rule: str,
    lenience: float = 1.0,
) -> _core.Verdict:
    """A round's verdict on logits that a host computed: by the native rules, with the draws of a native round.

    Args:
        logits: (gamma + 1, V).
        tokens: drafted, (gamma,).
        q: their laws (gamma, Vq); None where they are certain.
        position: of the first of them in the text.
        round_number: of the request, which keys draws that positions do not.
        law, seed, rule, lenience: as for NativeTarget.

    Raises:
        NumericalError: logits that are not finite.
    """
    if law.temperature > 0 and rule == "coupled":
        return _core.Verdict(*_core.couple_logits(logits, tokens, law, seed, position))
    u = [_core.uniform(seed, round_number, at, _ACCEPT) for at in range(len(tokens))]
    u.append(_core.uniform(seed, round_number, 0, _RESIDUAL))
    rule, q = (rule, q) if law.temperature > 0 and q is not None else ("token", None)
    return _core.Verdict(*_core.verify_logits(logits, q, tokens, np.array(u), law, lenience, rule=rule))

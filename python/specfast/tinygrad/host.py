"""Targets whose forward pass is tinygrad's own: our law and rollback around a model of any build."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, TinyJit, dtypes

from .. import _core
from ..context import Context
from ..errors import ShapeError, UnsupportedModelError
from ..sampling import follow
from ..targets import Progress, judge
from . import private

MOST_ROWS = 21

Forward = Callable[[Tensor, Any], Tensor]


class HostTarget:
    """A model run by tinygrad, one pass per round under a TinyJit for each number of rows.

    Its cache holds all of the context but the last token; what a position held before is overwritten, which is the rollback.

    Args:
        forward: logits (1, M, vocab) for token ids (1, M) int32 and the start position, a bound variable; it masks positions
            from start + M on, whatever they hold.
        vocab: of the logits.
        law, lenience, seed, capacity, rule, adjustments: as for NativeTarget.
    """

    def __init__(
        self,
        forward: Forward,
        vocab: int,
        law: _core.Law,
        lenience: float,
        seed: int,
        capacity: int,
        rule: str = "token",
        adjustments: _core.Adjustments | None = None,
    ) -> None:
        self.law, self.seed, self.rule, self.adjustments, self.capacity = law, seed, rule, adjustments, capacity
        self.length = 0
        self._forward, self._vocab, self._lenience = forward, vocab, lenience
        self._jits: dict[int, Any] = {}

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        while self.length < len(tokens):
            chunk = tokens[self.length : self.length + MOST_ROWS]
            chunk = chunk if len(chunk) == MOST_ROWS else chunk[:1]  # few shapes, of which each is compiled
            self._run(chunk)
            self.length += len(chunk)
            if progress:
                progress(self.length, len(tokens))

    def verify(self, context: Context, proposal: _core.Proposal | None) -> _core.Verdict:
        pending = context.tokens[self.length :]
        while len(pending) > 1:  # a text may begin with more than its last token unread
            self.prefill(context.tokens[:-1], None)
            pending = context.tokens[self.length :]
        tokens = proposal.tokens if proposal else np.zeros(0, np.int32)
        q: Any = proposal.q if proposal else None
        rows = self._run([*pending, *tokens.tolist()])
        gamma = len(tokens)
        follow(self.adjustments, context)
        if self.adjustments is not None:
            rows, kept = self.adjustments.edit_rows(rows, tokens)
            gamma = min(gamma, len(kept) - 1) if kept else gamma
        q = q[:gamma] if q is not None else None
        logits = np.ascontiguousarray(rows[: gamma + 1])
        at = len(context.tokens), context.round
        return judge(logits, tokens[:gamma], q, *at, self.law, self.seed, self.rule, self._lenience)

    def commit(self, kept: int) -> None:
        self.length += kept

    def _run(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """The logits (M, vocab) of tokens at the positions after the cache's."""
        M = len(tokens)
        if M not in self._jits:
            self._jits[M] = TinyJit(lambda x, start: self._forward(x, start).cast(dtypes.float32).contiguous())
        x = Tensor(np.asarray([tokens], dtype=np.int32)).clone().realize()
        found = self._jits[M](x, private.variable("start_pos", self.capacity - 1, self.length)).numpy()
        if found.shape != (1, M, self._vocab):
            raise ShapeError(f"the forward pass gave {found.shape} for {M} tokens; (1, {M}, {self._vocab}) is needed")
        rows: npt.NDArray[np.float32] = found[0]
        return rows


def own_forward(model: Any) -> tuple[Forward, int, int]:
    """The forward pass of all rows, the vocabulary and the context of a tinygrad.llm Transformer.

    Raises:
        UnsupportedModelError: another model, for which one is to be given, or one with a recurrent state, which cannot be
            rolled back.
    """
    if not all(hasattr(model, name) for name in ("blk", "token_embd", "output_norm", "output", "max_context")):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layers known here; give forward=, a function of token ids (1, M) and a start position "
            "that returns logits (1, M, vocab)"
        )
    if getattr(model, "has_recurrent_block", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has recurrent layers, whose state cannot be rolled back; model.generate runs it plainly"
        )

    def forward(tokens: Tensor, start_pos: Any) -> Tensor:
        x = model.token_embd(tokens).float()
        for block in model.blk:
            x = block(x, start_pos)
        logits: Tensor = model.output(model.output_norm(x))
        return logits

    return forward, int(model.token_embd.weight.shape[0]), int(model.max_context)

"""The settings of verify_tokens.metal and couple_tokens.metal: what a round's decision depends on besides its arrays."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

_PURPOSES = {"draft": 0, "residual": 2}


@dataclass(frozen=True)
class VerifySettings:
    """One launch's settings, in the order in which the kernels read them.

    Attributes:
        gamma: drafted tokens; 0 draws from row 0 alone.
        vocab: ids of a row of p.
        draft_vocab: ids of a row of q; 0: the draft is certain of its tokens.
        rule: "token" or "block"; the coupled rule's kernels do not read it.
        seed, round: key the draws.
        lenience: of the token rule.
        purpose: of the last draw.
        position: of the last draw in the round; under the coupled rule what is added to the position of row 0.
        first: where the drafted tokens begin in `tokens`.
        slot: where the next token goes in `out`.
        with_tau: whether tau goes before it.
    """

    gamma: int
    vocab: int
    draft_vocab: int = 0
    rule: Literal["token", "block", "coupled"] = "token"
    seed: int = 0
    round: int = 0
    lenience: float = 1.0
    purpose: Literal["draft", "residual"] = "residual"
    position: int = 0
    first: int = 0
    slot: int = 1
    with_tau: bool = True

    def array(self) -> npt.NDArray[np.int32]:
        """(16,) int32."""
        packed = struct.pack(
            "<4iQQdIiiiiI",
            self.gamma,
            self.vocab,
            self.draft_vocab,
            int(self.rule == "block"),
            self.seed,
            self.round,
            self.lenience,
            _PURPOSES[self.purpose],
            self.position,
            self.first,
            self.slot,
            int(self.with_tau),
            0,
        )
        return np.frombuffer(packed, np.int32).copy()

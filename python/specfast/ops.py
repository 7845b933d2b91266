"""The rules of speculative sampling on NumPy arrays, compiled."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import _core
from .errors import ConfigurationError

__all__ = ["couple_tokens", "verify_tokens"]


def verify_tokens(
    p: NDArray[np.float32],
    q: NDArray[np.float32] | None,
    tokens: NDArray[np.int32],
    u: NDArray[np.float64],
    *,
    rule: Literal["block", "token"] | None = None,
    lenience: float = 1.0,
) -> tuple[int, int]:
    """Which drafted tokens the target keeps, and the token it adds. Arrays are read, C-contiguous, and not kept.

    The token rule (Leviathan et al. 2022, Alg. 1, arXiv:2211.17192) accepts token i while u[i] q(x) < lenience p(x). The
    block rule (Sun et al. 2024, Alg. 2, arXiv:2403.10444) tests the prefix of i + 1 tokens with u[i] and keeps the longest
    that passes: never fewer in expectation. Both leave the target's law exact; a lenience above 1 does not (no token gets
    more than lenience times its probability).

    Args:
        p: (gamma + 1, V) float32, the target's laws after temperature and truncation; gamma may be 0.
        q: (gamma, Vq) float32, the laws the tokens were drawn from, ids from Vq on having no mass; None for a drafter that
            is certain of its tokens (one-hot), for which both rules keep the same number of tokens in law.
        tokens: (gamma,) int32.
        u: (gamma + 1,) float64 in [0, 1), not used before. The last draws the residual or the bonus, by inverse CDF in token
            order.
        rule: None is "block" at lenience 1, else "token".
        lenience: of the token rule; above 0.

    Returns:
        (tau, next token): tokens[:tau] are kept and the next token follows them. Compared and summed in float64 in a fixed
        order: the same on every machine.

    Raises:
        ConfigurationError: an unknown rule, or the block rule with a lenience other than 1.
        ShapeError: arrays of other shapes or types, tokens or draws out of range.
        NumericalError: the row of p that decides has no mass.
    """
    if rule is None:
        rule = "block" if lenience == 1.0 else "token"
    if rule not in ("block", "token"):
        raise ConfigurationError(f"rule is {rule!r}, but must be 'block' or 'token'; the coupled rule is couple_tokens")
    if rule == "block" and lenience != 1.0:
        raise ConfigurationError(f"the block rule takes lenience 1, not {lenience:g}; use rule='token'")
    tau, token = _core.verify_tokens(p, q, tokens, u, lenience, rule=rule)
    return tau, token


def couple_tokens(p: NDArray[np.float32], tokens: NDArray[np.int32], *, seed: int, position: int) -> tuple[int, int]:
    """The coupled rule: the target chooses by noise that a draft can share, and keeps drafted tokens while they are its own.

    Row i chooses argmax(log p[i] + G) with Gumbel noise G keyed (seed, position + i, token), which is a draw from p[i]: the
    choices depend on the target and the seed only, never on the tokens. A draft that chooses by `couple_tokens(q[i : i + 1],
    no tokens, seed, position + i)` agrees with probability (1 - TV) / (1 + TV) or more (Daliri et al. 2024,
    arXiv:2408.07978).

    Args:
        p: (gamma + 1, V) float32; rows need not sum to 1.
        tokens: (gamma,) int32, drafted by any means.
        seed: 0 to 2^64 - 1.
        position: of row 0's token in the text, 0 to 2^64 - 1.

    Returns:
        (tau, next token). The same on every machine; equal choices go to the lowest id.

    Raises:
        ShapeError: arrays of other shapes or types.
        NumericalError: the row of p that decides has no mass.
    """
    tau, token = _core.couple_tokens(p, tokens, seed, position)
    return tau, token

"""The rules of speculative sampling on NumPy arrays, compiled."""

from __future__ import annotations

import operator
import sys
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .errors import ConfigurationError, ShapeError

__all__ = ["couple_tokens", "verify_tokens"]


def verify_tokens(
    p: NDArray[np.float32] | ArrayLike,
    q: NDArray[np.float32] | ArrayLike | None,
    tokens: NDArray[np.int32] | ArrayLike,
    u: NDArray[np.float64] | ArrayLike,
    *,
    rule: Literal["block", "token"] | None = None,
    lenience: float = 1.0,
) -> tuple[int, int]:
    """Which drafted tokens the target keeps, and the token it adds. Arrays are read, C-contiguous, and not kept; lists are copied.

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
        ConfigurationError: an unknown rule, a lenience that is no number above 0, or not 1 with the block rule.
        ShapeError: arrays of other shapes or types, tokens or draws out of range, a weight in p that is negative or infinite,
            or a row of q that is no law (a negative weight, one that is not finite, or no mass).
        NumericalError: the row of p that decides has no mass.
    """
    if isinstance(lenience, bool) or not isinstance(lenience, Real) or not 0 < lenience <= sys.float_info.max:
        raise ConfigurationError(f"lenience is {lenience!r}, but must be a number above 0; 1 is exact")
    if rule is None:
        rule = "block" if lenience == 1.0 else "token"
    if rule not in ("block", "token"):
        raise ConfigurationError(f"rule is {rule!r}, but must be 'block' or 'token'; the coupled rule is couple_tokens")
    if rule == "block" and lenience != 1.0:
        raise ConfigurationError(f"the block rule takes lenience 1, not {lenience:g}; use rule='token'")
    laws, drafts = _array("p", p, np.float32), None if q is None else _array("q", q, np.float32)
    _require_weights(laws)
    if drafts is not None:
        _require_laws(drafts)
    tau, token = _core.verify_tokens(
        laws, drafts, _array("tokens", tokens, np.int32), _array("u", u, np.float64), float(lenience), rule=rule
    )
    return tau, token


def couple_tokens(
    p: NDArray[np.float32] | ArrayLike, tokens: NDArray[np.int32] | ArrayLike, *, seed: int, position: int
) -> tuple[int, int]:
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
        ConfigurationError: a seed or a position out of range.
        ShapeError: arrays of other shapes or types, or a weight in p that is negative or infinite.
        NumericalError: the row of p that decides has no mass.
    """
    laws = _array("p", p, np.float32)
    _require_weights(laws)
    keys = _key("seed", seed), _key("position", position)
    tau, token = _core.couple_tokens(laws, _array("tokens", tokens, np.int32), *keys)
    return tau, token


def _array(name: str, values: Any, dtype: type[np.generic]) -> NDArray[Any]:
    """An array as it is, which the kernel checks, or one made of lists."""
    if isinstance(values, np.ndarray):
        return values
    try:
        made = np.asarray(values)
        if made.size and not np.can_cast(made.dtype, dtype, "same_kind"):
            raise TypeError(f"{made.dtype} is not {np.dtype(dtype)}")
        return np.asarray(values, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise ShapeError(f"{name} must be an array of {np.dtype(dtype)}, or lists that become one ({error})") from None


def _require_weights(p: NDArray[Any]) -> None:
    """Refuses what no law has; a row of NaN is the kernel's to refuse if it decides."""
    if p.ndim == 2 and p.dtype == np.float32 and p.size:
        wrong = np.flatnonzero((np.fmin.reduce(p, axis=1) < 0) | (np.fmax.reduce(p, axis=1) == np.inf))
        if wrong.size:
            raise ShapeError(f"row {wrong[0]} of p has a weight that is negative or infinite; give probabilities")


def _require_laws(q: NDArray[Any]) -> None:
    if q.ndim == 2 and q.dtype == np.float32 and q.size:
        low, high = q.min(axis=1), q.max(axis=1)
        wrong = np.flatnonzero(~((low >= 0) & (high > 0) & (high < np.inf)))
        if wrong.size:
            raise ShapeError(
                f"row {wrong[0]} of q is no law: its weights are from {low[wrong[0]]:g} to {high[wrong[0]]:g}, but must be finite, "
                "not negative, and not all 0; give None for a drafter that is certain"
            )


def _key(name: str, value: Any) -> int:
    try:
        key = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        key = -1
    if not 0 <= key < 1 << 64:
        raise ConfigurationError(f"{name} is {value!r}, but must be a whole number in 0 to 2^64 - 1")
    return key

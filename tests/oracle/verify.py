"""The rules of speculative sampling, and the exact law of the text they write.

p: (gamma + 1, V), the target's laws; q: (gamma, V), the draft's; tokens: (gamma,), drawn from q; u: (gamma + 1,).
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Rule = Callable[[Array, Array, Sequence[int], Array, float], tuple[int, int]]
Breakpoints = Callable[[Array, Array, Sequence[int], float], list[Array]]


def one_hot(tokens: Sequence[int], V: int) -> Array:
    """The law q of a drafter that is certain of its tokens."""
    return np.eye(V)[list(tokens)]


def inverse_cdf(weights: ArrayLike, u: float) -> int:
    """The first token whose running weight exceeds u times the total."""
    return int(np.searchsorted(np.cumsum(weights), u * np.sum(weights), side="right"))


def residual(p: Array, q: Array, lenience: float = 1.0) -> Array:
    """What is drawn from after a rejection (not normalised); p itself where nothing is left."""
    left = p - np.minimum(q, lenience * p) if lenience <= 1 else np.maximum(p - q, 0)
    return left if left.sum() > 0 else p


def verify_tokens(p: Array, q: Array, tokens: Sequence[int], u: Array, lenience: float = 1.0) -> tuple[int, int]:
    """Leviathan et al. 2022, Alg. 1 (arXiv:2211.17192): how many tokens are kept and the token that follows them."""
    gamma = len(tokens)
    for i, x in enumerate(tokens):
        if not u[i] * q[i, x] < lenience * p[i, x]:
            return i, inverse_cdf(residual(p[i], q[i], lenience), u[gamma])
    return gamma, inverse_cdf(p[gamma], u[gamma])


def prefixes(p: Array, q: Array, tokens: Sequence[int]) -> tuple[list[float], list[float]]:
    """c_i, the share of the target that is left after i tokens, and h_i, the chance that i tokens pass; i = 0..gamma."""
    gamma, c, h = len(tokens), [1.0], [1.0]
    for i, x in enumerate(tokens, 1):
        c.append(min(1.0, c[-1] * p[i - 1, x] / q[i - 1, x]))
        s = np.maximum(c[i] * p[i] - q[i], 0).sum() if i < gamma else c[i]
        h.append(c[i] if i == gamma else s / (s + 1 - c[i]) if s > 0 else 0.0)
    return c, h


def verify_block(p: Array, q: Array, tokens: Sequence[int], u: Array, lenience: float = 1.0) -> tuple[int, int]:
    """Sun et al. 2024, Alg. 2 (arXiv:2403.10444): the longest prefix that passes and the token that follows it."""
    gamma = len(tokens)
    c, h = prefixes(p, q, tokens)
    tau = max(i for i in range(gamma + 1) if i == 0 or u[i - 1] < h[i])
    if tau == gamma:
        return tau, inverse_cdf(p[gamma], u[gamma])
    return tau, inverse_cdf(residual(c[tau] * p[tau], q[tau]), u[gamma])


def block_breakpoints(p: Array, q: Array, tokens: Sequence[int], lenience: float = 1.0) -> list[Array]:
    """Where in each u the block rule's outcome may change."""
    c, h = prefixes(p, q, tokens)
    laws = [p[-1], *(residual(c[i] * p[i], q[i]) for i in range(len(tokens)) if c[i] > 0)]
    return [*(np.array([x]) for x in h[1:]), np.concatenate([np.cumsum(law) / law.sum() for law in laws])]


def couple_tokens(p: Array, tokens: Sequence[int], noise: Array) -> tuple[int, int]:
    """Target samples by the Gumbel-max trick, argmax(log p + noise); drafted tokens stay while they are those.

    p, noise: (gamma + 1, V).
    """
    with np.errstate(divide="ignore"):
        chosen = np.argmax(np.log(p) + noise, axis=1)
    tau = 0
    while tau < len(tokens) and tokens[tau] == chosen[tau]:
        tau += 1
    return tau, int(chosen[tau])


def breakpoints(p: Array, q: Array, tokens: Sequence[int], lenience: float) -> list[Array]:
    """Where in each u the outcome may change: at accept ratios, and at the steps of every law drawn from."""
    gamma = len(tokens)
    laws = [*p, *(residual(p[i], q[i], lenience) for i in range(gamma))]
    steps = np.concatenate([np.cumsum(law) / law.sum() for law in laws])
    ratios = [lenience * p[i, x] / q[i, x] for i, x in enumerate(tokens) if q[i, x] > 0]
    return [*([np.array(ratios)] * gamma), steps]


def verdict_law(
    rule: Rule, p: Array, q: Array, tokens: Sequence[int], lenience: float = 1.0, *, points: list[Array] | None = None
) -> Array:
    """Probability of every (tau, next token), (gamma + 1, V): the rule integrated exactly over u.

    A rule is constant between the breakpoints of each u, so its integral is a sum over cells. `points` replaces the
    breakpoints, for rules that use their draws otherwise than `verify_tokens`.
    """
    edges = [np.unique(np.clip([0.0, 1.0, *x], 0, 1)) for x in points or breakpoints(p, q, tokens, lenience)]
    law = np.zeros(p.shape)
    for cell in itertools.product(*(range(len(x) - 1) for x in edges)):
        low = np.array([x[c] for x, c in zip(edges, cell, strict=True)])
        high = np.array([x[c + 1] for x, c in zip(edges, cell, strict=True)])
        law[rule(p, q, tokens, (low + high) / 2, lenience)] += np.prod(high - low)
    return law


def joint(laws: list[Array], prefix: tuple[int, ...] = ()) -> Array:
    """The law of the tokens after `prefix`: laws[k] is (V,) * k + (V,), the law of token k given those before it."""
    out = np.ones(())
    for law in laws[len(prefix) :]:
        out = out[..., None] * law[prefix]
    return out


def text_law(
    rule: Rule, p: list[Array], q: list[Array], lenience: float = 1.0, breakpoints: Breakpoints = breakpoints
) -> Array:
    """The law of the first gamma + 1 tokens written with one round of `rule`, the rest drawn from the target.

    p[k], k = 0..gamma, and q[k], k = 0..gamma - 1: (V,) * k + (V,), laws of token k given those before it. Sums over
    every string that may be drafted. Returns (V,) * (gamma + 1).
    """
    gamma, V = len(q), p[0].size
    out = np.zeros((V,) * (gamma + 1))
    drafted = joint(q)
    for tokens in itertools.product(range(V), repeat=gamma):
        if drafted[tokens] == 0:
            continue
        given_p = np.array([p[k][tokens[:k]] for k in range(gamma + 1)])
        given_q = np.array([q[k][tokens[:k]] for k in range(gamma)]).reshape(gamma, V)
        points = breakpoints(given_p, given_q, tokens, lenience)
        law = verdict_law(rule, given_p, given_q, tokens, lenience, points=points)
        for tau, token in zip(*np.nonzero(law), strict=True):
            text = (*tokens[:tau], int(token))
            out[text] += drafted[tokens] * law[tau, token] * joint(p, text)
    return out

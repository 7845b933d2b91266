"""Target and draft laws to enumerate; float32 holds every probability exactly (multiples of 2^-12, or denormal)."""

import os

import numpy as np

FULL = os.environ.get("SPECFAST_FULL") == "1"


def dyadic(weights):
    """(..., V) laws near the given weights, in multiples of 2^-12."""
    parts = np.floor(weights / weights.sum(-1, keepdims=True) * 4096)
    largest = np.argmax(parts, -1)[..., None]
    np.put_along_axis(parts, largest, np.take_along_axis(parts, largest, -1) + 4096 - parts.sum(-1, keepdims=True), -1)
    return parts / 4096


def random_laws(rng, V):
    return lambda shape: dyadic(rng.exponential(size=(*shape, V)) ** 2)


def on_half(rng, V, first):
    """Laws over the even or the odd tokens only: target and draft never agree."""
    mask = np.arange(V) % 2 == first
    return lambda shape: dyadic(rng.exponential(size=(*shape, V)) * mask + 1e-9 * mask)


def one_hot_laws(rng, V):
    return lambda shape: np.eye(V)[rng.integers(0, V, shape)]


def tied(rng, V):
    return lambda shape: dyadic(rng.integers(1, 3, (*shape, V)).astype(float))


def nearly_one_hot(rng, V):
    """Most of the mass on one token, 2^-12 on the others."""
    return lambda shape: dyadic(np.eye(V)[rng.integers(0, V, shape)] + 2.0**-12)


def nearly_all_denormal(rng, V):
    """Half on each of two tokens, what float32 can hold of least on the others."""

    def laws(shape):
        law = np.full((*shape, V), 2.0**-149)
        for row in law.reshape(-1, V):
            row[rng.choice(V, 2, replace=False)] = 0.5
        return law

    return laws


PAIRS = {
    "random": lambda rng, V: (random_laws(rng, V), random_laws(rng, V)),
    "disjoint": lambda rng, V: (on_half(rng, V, 0), on_half(rng, V, 1)),
    "certain draft": lambda rng, V: (random_laws(rng, V), one_hot_laws(rng, V)),
    "certain target": lambda rng, V: (one_hot_laws(rng, V), random_laws(rng, V)),
    "tied": lambda rng, V: (tied(rng, V), tied(rng, V)),
    "nearly certain": lambda rng, V: (nearly_one_hot(rng, V), nearly_one_hot(rng, V)),
    "denormal": lambda rng, V: (nearly_all_denormal(rng, V), nearly_all_denormal(rng, V)),
    "equal": None,
}
SIZES = [(2, 1), (2, 3), (3, 2), (4, 1), (4, 2), (4, 3)] + ([(5, 3)] if FULL else [])


def trees(pair, V, gamma, seed):
    """Laws of the next token after every text of 0..gamma tokens, for the target and the draft."""
    rng = np.random.default_rng(seed)
    p_law, q_law = PAIRS[pair](rng, V) if PAIRS[pair] else (random_laws(rng, V), None)
    p = [p_law((V,) * k) for k in range(gamma + 1)]
    return p, [q_law((V,) * k) if q_law else p[k] for k in range(gamma)]

"""From logits to the law that is sampled, by sorting: temperature, then top-k, top-p and min-p."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def law_rows(
    logits: ArrayLike,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    vocab_limit: int = 0,
) -> NDArray[np.float64]:
    """Probabilities (M, V) of logits (M, V). Temperature 0 puts all mass on the arg max; an integer 0 means off."""
    laws = []
    for row in np.asarray(logits, np.float64):
        x = row.copy()
        x[vocab_limit or x.size :] = -np.inf
        by_rank = np.argsort(-x, kind="stable")  # largest first, among equals the lowest id first
        if temperature == 0:
            p = np.zeros_like(x)
            p[by_rank[0]] = 1
            laws.append(p)
            continue
        with np.errstate(under="ignore"):
            p = np.exp((x - x.max()) / temperature)
        if top_k:
            p[by_rank[top_k:]] = 0
        if top_p < 1:
            reached = np.cumsum(p[by_rank]) / p.sum() >= top_p
            p[by_rank[np.argmax(reached) + 1 :]] = 0
        p[p < min_p * p.max()] = 0
        laws.append(p / p.sum())
    return np.array(laws)


def smallest_margin(logits: ArrayLike, *, temperature: float, top_k: int, top_p: float, min_p: float) -> float:
    """How close one row (V,) comes to another truncation: relative to 1 for top_p and to min_p for min_p."""
    p = law_rows(np.asarray(logits)[None], temperature=temperature, top_k=top_k)[0]
    margins = [np.inf]
    if top_p < 1:
        margins.append(float(np.abs(np.cumsum(-np.sort(-p)) - top_p).min()))
    if min_p > 0:
        margins.append(float(np.abs(p / p.max() / min_p - 1).min()))
    return min(margins)

"""From logits to the law that is sampled: edits, and then, by sorting, temperature, top-k, top-p and min-p."""

from collections.abc import Mapping, Sequence

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
    temper_last: bool = False,
) -> NDArray[np.float64]:
    """Probabilities (M, V) of logits (M, V). Temperature 0 puts all mass on the arg max; an integer 0 means off.

    temper_last: each truncation looks at the whole law at temperature 1, and the temperature comes after them (mlx-lm).
    """
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
            whole = np.exp(x - x.max())
        if temper_last:
            if top_k:
                p[by_rank[top_k:]] = 0
            if top_p < 1:
                p[by_rank[np.argmax(np.cumsum(whole[by_rank]) / whole.sum() >= top_p) + 1 :]] = 0
            p[whole < min_p] = 0
            laws.append(p / p.sum())
            continue
        if top_k:
            p[by_rank[top_k:]] = 0
        if top_p < 1:
            reached = np.cumsum(p[by_rank]) / p.sum() >= top_p
            p[by_rank[np.argmax(reached) + 1 :]] = 0
        p[p < min_p * p.max()] = 0
        laws.append(p / p.sum())
    return np.array(laws)


def adjust_logits(
    logits: ArrayLike,
    text: Sequence[int],
    prompt_length: int,
    *,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    penalty_window: int = 0,
    logit_bias: Mapping[int, float] = {},
    allowed: Sequence[bool] | None = None,
) -> NDArray[np.float32]:
    """One row (V,) after `text`, of which the first tokens are the prompt; float32 as the kernels, one operation each."""
    x = np.array(logits, np.float32)
    for token, bias in logit_bias.items():
        x[token] += np.float32(bias)
    first = max(0, len(text) - penalty_window) if penalty_window else 0
    for token in set(text[first:]):
        x[token] = (
            x[token] / np.float32(repetition_penalty) if x[token] > 0 else x[token] * np.float32(repetition_penalty)
        )
        generated = list(text[max(first, prompt_length) :]).count(token)
        if generated:
            x[token] -= np.float32(presence_penalty)
            x[token] -= np.float32(frequency_penalty) * np.float32(generated)
    if allowed is not None:
        x[: len(allowed)][~np.asarray(allowed, bool)] = -np.inf
        x[len(allowed) :] = -np.inf
    return x


def smallest_margin(logits: ArrayLike, *, temperature: float, top_k: int, top_p: float, min_p: float) -> float:
    """How close one row (V,) comes to another truncation: relative to 1 for top_p and to min_p for min_p."""
    p = law_rows(np.asarray(logits)[None], temperature=temperature, top_k=top_k)[0]
    margins = [np.inf]
    if top_p < 1:
        margins.append(float(np.abs(np.cumsum(-np.sort(-p)) - top_p).min()))
    if min_p > 0:
        margins.append(float(np.abs(p / p.max() / min_p - 1).min()))
    return min(margins)

"""Does a sample follow a law? Pearson's test at a stated false-alarm rate."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import chi2

FALSE_ALARM = 1e-6


def excess(counts: ArrayLike, law: ArrayLike, false_alarm: float = FALSE_ALARM) -> float:
    """Pearson's statistic over its critical value: above 1 the sample does not follow the law.

    counts, law: the same shape. Outcomes expected fewer than 8 times are pooled, so that the statistic has its
    asymptotic law; an outcome without mass that was seen is infinite evidence.
    """
    seen, mass = np.ravel(counts).astype(float), np.ravel(law).astype(float)
    if seen[mass == 0].sum() > 0:
        return float("inf")
    expected = mass / mass.sum() * seen.sum()
    rare = expected < 8
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 8:  # too rare even together: part of the smallest outcome that is kept
        smallest = int(np.argmin(expected[:-1]))
        seen[smallest] += seen[-1]
        expected[smallest] += expected[-1]
        seen, expected = seen[:-1], expected[:-1]
    statistic = float(((seen - expected) ** 2 / expected).sum())
    return statistic / float(chi2.isf(false_alarm, len(expected) - 1))

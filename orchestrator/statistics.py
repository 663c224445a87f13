"""What may be said of a sample of scans: intervals, paired comparisons, correction for many of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_RESAMPLES = 9999


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same scans.

    scans : pairs; difference : median of the pairs' differences; p : of the two-sided Wilcoxon signed-rank test;
    effect : rank-biserial correlation, 1 when the first is higher on every scan where they differ, -1 when it is lower
    """

    scans: int
    difference: float
    p: float
    effect: float


def interval(values: Sequence[float], /, *, share: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; the same values give the same interval. One value has none: NaN."""
    if len(values) < 2:
        return float("nan"), float("nan")
    found = stats.bootstrap(
        (np.asarray(values, float),),
        np.mean,
        confidence_level=share,
        n_resamples=_RESAMPLES,
        method="percentile",
        batch=999,
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def compare(first: Sequence[float], second: Sequence[float], /) -> Comparison:
    """Wilcoxon's signed-rank test of two systems' values on the same scans, in the same order; ties are split."""
    differences = np.asarray(first, float) - np.asarray(second, float)
    ranks = stats.rankdata(np.abs(differences[differences != 0]))
    if not len(ranks):
        return Comparison(len(differences), 0.0, 1.0, 0.0)
    p = stats.wilcoxon(differences, zero_method="zsplit").pvalue
    effect = float((ranks * np.sign(differences[differences != 0])).sum() / ranks.sum())
    return Comparison(len(differences), float(np.median(differences)), float(p), effect)


def holm(p: Sequence[float], /) -> list[float]:
    """Holm's step-down correction: p values that may be judged as if each were the only one."""
    order = np.argsort(p)
    factors = len(p) - np.arange(len(p))
    stepped = np.minimum(np.maximum.accumulate(np.asarray(p, float)[order] * factors), 1.0)
    adjusted = np.empty(len(p))
    adjusted[order] = stepped
    return [float(value) for value in adjusted]

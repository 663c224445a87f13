"""What may be said of a sample of scans: intervals, paired comparisons, correction for many of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
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


@dataclass(frozen=True)
class Correlation:
    """A correlation and its 95 % interval, NaN where there are fewer than four pairs."""

    value: float
    low: float
    high: float


def correlation(first: ArrayLike, second: ArrayLike, /, *, ranks: bool = False) -> Correlation:
    """Pearson's correlation of two sequences, (n,) each, or with `ranks` Spearman's; neither may be constant.

    The interval is by Fisher's transformation, that of ranks with the variance of Bonett and Wright
    (doi 10.1007/BF02294183).
    """
    x, y = (stats.rankdata(values) if ranks else np.asarray(values, float) for values in (first, second))
    value = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    if len(x) < 4:
        return Correlation(value, float("nan"), float("nan"))
    if abs(value) == 1:
        return Correlation(value, value, value)
    half = stats.norm.ppf(0.975) * np.sqrt((1 + (value**2 / 2 if ranks else 0)) / (len(x) - 3))
    low, high = np.tanh(np.arctanh(value) + np.array([-half, half]))
    return Correlation(value, float(low), float(high))


def holm(p: Sequence[float], /) -> list[float]:
    """Holm's step-down correction: p values that may be judged as if each were the only one."""
    order = np.argsort(p)
    factors = len(p) - np.arange(len(p))
    stepped = np.minimum(np.maximum.accumulate(np.asarray(p, float)[order] * factors), 1.0)
    adjusted = np.empty(len(p))
    adjusted[order] = stepped
    return [float(value) for value in adjusted]

"""Several rankers' scores of a cohort to one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def fuse(scores: NDArray[np.float64], weights: Sequence[float] | None = None, /) -> NDArray[np.float64]:
    """Weighted mean of ranks; equal scores share their mean rank.

    Parameters
    ----------
    scores : (rankers, scans), higher is better; a scan with a NaN gets one

    Returns
    -------
    (scans,) from 0, the worst by all rankers, to 1, the best
    """
    from scipy.stats import rankdata  # slow to import

    fused = np.full(scores.shape[1], np.nan)
    known = np.isfinite(scores).all(0)
    if known.any():
        ranks = (rankdata(scores[:, known], axis=1) - 1) / max(1, known.sum() - 1)
        fused[known] = np.average(ranks, axis=0, weights=weights)
    return fused

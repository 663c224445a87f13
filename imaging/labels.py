"""Intensities to labels: bins inside each structure and outside, air by itself.

A conformed scan is kept as 256 intensity levels and a class for every voxel. A rule for bins is then a table from
(class, number of bins, level) to bin, so that every sample can draw its own number of bins at no cost.
"""

from dataclasses import dataclass

import kmeans1d
import numpy as np

from onelabel.configs.augmentation import BinsConfig
from onelabel.errors import DataError

Shares = tuple[float, float]

IGNORE = -1
LEVELS = 256
HALF = (LEVELS - 1) // 2  # the highest level of a probability that does not exceed one half
AIR = 0
FAR_MM = 127.0  # distances are not told apart beyond it

_SUBSAMPLE = 4096
_AIR_BINS = 4


@dataclass(frozen=True, eq=False)
class BinnedScan:
    """A conformed scan, ready for synthesis; a key by identity.

    levels : (*size) uint8, intensity in [0, 255]
    target : (*size) int8, class of a voxel; 0 background, IGNORE unknown, which looks like background
    distance_mm : (*size) int8, distance to the edge of what is not background, negative inside, clipped to +-127
    tables : (classes, max_bins + 1, 256) uint8, bin of a level where its class has that many bins; 255 is air
    outside : class of what is out of view: IGNORE if some of the target is, or it would outweigh what is annotated
    probability : (structures, *size) uint8, 255 for 1; None where the label is hard
    """

    levels: np.ndarray
    target: np.ndarray
    distance_mm: np.ndarray
    tables: np.ndarray
    outside: int = 0
    probability: np.ndarray | None = None


def bin_scan(
    image: np.ndarray,
    target: np.ndarray,
    /,
    *,
    spacing_mm: tuple[float, float, float],
    config: BinsConfig,
    classes: int = 2,
    seed: int = 0,
) -> BinnedScan:
    """Bin the intensities of a scan (SingleStrip, arXiv 2508.10464, step 1).

    Parameters
    ----------
    image : (*size) float32 in [0, 1]
    target : (*size) int, class of every voxel

    Raises
    ------
    DataError : a target without foreground, or that leaves no background.
    """
    from scipy.ndimage import distance_transform_edt  # slow to import

    levels = np.rint(np.clip(image, 0, 1) * (LEVELS - 1)).astype(np.uint8)
    if not (target > 0).any() or (target != 0).all():
        raise DataError("the label must hold both structure and background voxels on the network's grid")
    foreground = target != 0  # with what is unknown, which may be it
    air = _air_level(levels[target == 0], method_seed=seed)
    most = max(config.foreground[1], config.background[1])
    tables = np.zeros((classes, most + 1, LEVELS), np.uint8)
    for index in range(classes):
        inside = levels[target == index]
        if index == 0:
            inside = inside[inside > air]
        low, high = config.foreground if index else config.background
        for count in range(low, high + 1):
            tables[index, count] = _bins(inside, count=count, method=config.method, seed=seed)
    tables[0, :, : air + 1] = 255
    outside = distance_transform_edt(~foreground, sampling=spacing_mm)
    inside_mm = distance_transform_edt(foreground, sampling=spacing_mm)
    distance = np.clip(np.rint(outside - inside_mm), -FAR_MM, FAR_MM).astype(np.int8)
    unknown = IGNORE if (target == IGNORE).any() else 0
    return BinnedScan(levels, target.astype(np.int8), distance, tables, unknown)


def read_probability(
    probability: np.ndarray, /, *, threshold: float | None = None, ignore: Shares | None = None
) -> np.ndarray:
    """The class of every voxel, of the probability of each structure.

    Parameters
    ----------
    probability : (structures, *size) uint8, 255 for 1
    threshold : the class is the last one that, with all after it, is more probable than this; over all thresholds from
        0 to 1 a voxel has each class as often as is probable. None: the likeliest class
    ignore : where the structures together are more probable than the first of these, and none as much as the second,
        the class is given as its complement (-1, -2, ...): it is painted as its class, but its label is IGNORE

    Returns
    -------
    (*size) int8
    """
    ranks = np.arange(LEVELS * len(probability)) / (LEVELS - 1)
    if threshold is not None:
        tails = np.cumsum(probability[::-1], axis=0, dtype=np.int32)
        return (ranks > threshold)[tails].sum(0, dtype=np.int8)
    total, most = probability.sum(0, dtype=np.int32), probability.max(0)
    classes = np.where(most > LEVELS - 1 - total, probability.argmax(0) + 1, 0).astype(np.int8)
    if ignore is None:
        return classes
    unknown = (ranks > ignore[0])[total] & (ranks < ignore[1])[most]
    return np.where(unknown, ~classes, classes)


def label_table(scan: BinnedScan, counts: tuple[int, ...], /) -> np.ndarray:
    """Label of every (class, level) when class c has counts[c] bins.

    Returns
    -------
    table : (classes * 256) uint8. Label 0 is air; no label is shared between classes.
    """
    parts, first = [], 1
    for index, count in enumerate(counts):
        bins = scan.tables[index, count].astype(np.int64)
        parts.append(np.where(bins == 255, AIR, bins + first).astype(np.uint8))
        first += count
    return np.concatenate(parts)


def label_map(scan: BinnedScan, counts: tuple[int, ...], /) -> np.ndarray:
    """The label of every voxel, (*size) uint8, when class c has counts[c] bins."""
    table = label_table(scan, counts)
    return table[np.maximum(scan.target, 0).astype(np.int64) * LEVELS + scan.levels]


def _air_level(levels: np.ndarray, *, method_seed: int) -> int:
    # The darkest of a few clusters of the background: air, sinuses and compact bone.
    return int(np.flatnonzero(_bins(levels, count=_AIR_BINS, method="kmeans", seed=method_seed) == 0).max())


def _bins(levels: np.ndarray, *, count: int, method: str, seed: int) -> np.ndarray:
    """Bin of each of the 256 levels, (256,) uint8; fewer bins where there are fewer distinct levels."""
    grid = np.arange(LEVELS)
    if levels.size == 0:
        return np.zeros(LEVELS, np.uint8)
    sample = np.quantile(levels, np.linspace(0, 1, _SUBSAMPLE))
    count = min(count, np.unique(levels).size)
    if method == "gmm":
        from sklearn.mixture import GaussianMixture  # a second to import, in every actor

        mixture = GaussianMixture(count, random_state=seed, covariance_type="full", reg_covar=1.0)
        mixture.fit(sample[:, None])
        rank = np.argsort(np.argsort(mixture.means_[:, 0]))
        return rank[mixture.predict(grid[:, None])].astype(np.uint8)
    if method == "kmeans":
        centres = np.sort(kmeans1d.cluster(sample, count).centroids)
        edges = (centres[1:] + centres[:-1]) / 2
    elif method == "quantile":
        edges = np.quantile(sample, np.linspace(0, 1, count + 1)[1:-1])
    else:
        edges = np.linspace(sample[0], sample[-1], count + 1)[1:-1]
    return np.searchsorted(edges, grid, side="right").astype(np.uint8)

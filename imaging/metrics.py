"""How well a mask agrees with the truth: overlap, surface distances in mm, volumes in mm^3.

Where one mask is empty and the other is not there is no surface to measure from: overlap is 0 and each distance is the
diagonal of the field of view, the worst there can be. Two empty masks agree perfectly.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onelabel.errors import DataError
from onelabel.imaging.labels import IGNORE

FEW = 5  # masks that say nothing of what is usual

Mask = NDArray[Any]


def dice(pred: Mask, truth: Mask, /) -> float:
    """Dice overlap of two masks of shape (*size), 0 to 1."""
    pred, truth = _as_masks(pred, truth)
    total = np.count_nonzero(pred) + np.count_nonzero(truth)
    return float(2 * np.count_nonzero(pred & truth) / total) if total else 1.0


def jaccard(pred: Mask, truth: Mask, /) -> float:
    """Jaccard overlap (intersection over union) of two masks of shape (*size), 0 to 1."""
    pred, truth = _as_masks(pred, truth)
    union = np.count_nonzero(pred | truth)
    return float(np.count_nonzero(pred & truth) / union) if union else 1.0


def hd95(pred: Mask, truth: Mask, spacing_mm: Sequence[float], /) -> float:
    """Hausdorff distance without the worst 5 %, mm.

    The larger of two 95th percentiles: of the distances from the surface of one mask to that of the other, and back.
    """
    return _hd95(*_surface_distances(pred, truth, spacing_mm))


def asd(pred: Mask, truth: Mask, spacing_mm: Sequence[float], /) -> float:
    """Average symmetric surface distance, mm: the mean over the surface voxels of both masks."""
    return _asd(*_surface_distances(pred, truth, spacing_mm))


def volume_mm3(mask: Mask, spacing_mm: Sequence[float], /) -> float:
    """Volume of a mask of shape (*size)."""
    return float(np.count_nonzero(mask) * np.prod(spacing_mm))


def usual_volume(volumes: Sequence[float], /) -> tuple[float, float]:
    """Median volume of a cohort's masks, and how far from it a volume is unlike the others; in the unit of the volumes.

    Far is 3.5 robust standard deviations, at least 0.3 of the median, and infinite among fewer than `FEW` masks.
    """
    if len(volumes) < FEW:
        return float("nan"), float("inf")
    middle = float(np.median(volumes))
    spread = 1.4826 * float(np.median(np.abs(np.array(volumes) - middle)))
    return middle, max(3.5 * spread, 0.3 * middle)


def evaluate(pred: Mask, truth: Mask, spacing_mm: Sequence[float], /) -> dict[str, float | bool]:
    """All measures at once.

    Parameters
    ----------
    pred, truth : (*size)
        Not zero where the structure is.
    spacing_mm : (len(size),)

    Returns
    -------
    dict
        dice, jaccard, hd95_mm, asd_mm, volume_mm3, truth_volume_mm3, and miss: the prediction is empty, the truth not.
    """
    distances = _surface_distances(pred, truth, spacing_mm)
    return {
        "dice": dice(pred, truth),
        "jaccard": jaccard(pred, truth),
        "hd95_mm": _hd95(*distances),
        "asd_mm": _asd(*distances),
        "volume_mm3": volume_mm3(pred, spacing_mm),
        "truth_volume_mm3": volume_mm3(truth, spacing_mm),
        "miss": bool(np.any(truth) and not np.any(pred)),
    }


def evaluate_classes(
    pred: Mask, truth: Mask, spacing_mm: Sequence[float], names: Sequence[str], /
) -> dict[str, float | bool]:
    """Means over the structures that either of two label maps holds, and where they are several the Dice of each.

    Parameters
    ----------
    pred, truth : (*size) int
        Class of a voxel; where the truth is IGNORE nothing counts.
    spacing_mm : (len(size),)
    names : of the classes, background first

    Returns
    -------
    dict
        dice, hd95_mm, asd_mm, and miss: of some structure of the truth nothing was found. Of several structures also
        a `column` of Dice each.
    """
    pred = np.where(truth == IGNORE, 0, pred)
    found = {
        name: evaluate(pred == index, truth == index, spacing_mm)
        for index, name in enumerate(names)
        if index and ((pred == index).any() or (truth == index).any())
    }
    means = {name: float(np.mean([each[name] for each in found.values()])) for name in ("dice", "hd95_mm", "asd_mm")}
    each = {column(name): one["dice"] for name, one in found.items()} if len(names) > 2 else {}
    return {**means, "miss": any(one["miss"] for one in found.values()), **each}


def mean_dice(pred: Mask, truth: Mask, /) -> float:
    """Mean Dice over the structures that either of two label maps (*size) of classes holds; 1 if there is none."""
    held = sorted({*np.unique(pred).tolist(), *np.unique(truth).tolist()} - {0, IGNORE})
    return float(np.mean([dice(pred == index, truth == index) for index in held])) if held else 1.0


def column(name: str, /) -> str:
    """Where the Dice of a structure of this name stands in a table."""
    return "dice_" + re.sub(r"\W+", "_", name)


def _hd95(there: NDArray[np.float64], back: NDArray[np.float64]) -> float:
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def _asd(there: NDArray[np.float64], back: NDArray[np.float64]) -> float:
    return float(np.concatenate([there, back]).mean())


def _surface_distances(
    pred: Mask, truth: Mask, spacing_mm: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance in mm of each surface voxel of one mask to the surface of the other, and back."""
    from scipy.ndimage import distance_transform_edt, find_objects  # slow to import

    pred, truth = _as_masks(pred, truth)
    if len(spacing_mm) != pred.ndim:
        raise DataError(f"spacing_mm is {tuple(spacing_mm)}, the masks have {pred.ndim} axes: give one length an axis.")
    if not (pred.any() and truth.any()):
        agree = pred.any() == truth.any()
        worst = np.zeros(1) if agree else np.array([np.linalg.norm(np.multiply(pred.shape, spacing_mm))])
        return worst, worst
    box = find_objects((pred | truth).view(np.uint8))[0]
    pred_surface, truth_surface = _surface(pred[box]), _surface(truth[box])
    to_truth = distance_transform_edt(~truth_surface, sampling=spacing_mm)
    to_pred = distance_transform_edt(~pred_surface, sampling=spacing_mm)
    return to_truth[pred_surface], to_pred[truth_surface]


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The voxels of a mask that have a face in common with the outside; beyond the array is outside."""
    from scipy.ndimage import binary_erosion  # slow to import

    return np.logical_and(mask, ~binary_erosion(mask))


def _as_masks(pred: Mask, truth: Mask) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Both as booleans, of equal shape."""
    pred, truth = np.asarray(pred), np.asarray(truth)
    if pred.shape != truth.shape:
        raise DataError(f"The masks have shapes {pred.shape} and {truth.shape}: compare them on the same grid.")
    return pred.astype(bool), truth.astype(bool)

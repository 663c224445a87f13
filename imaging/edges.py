"""The edge of a mask: how far each voxel is from it, and moving it."""

from collections.abc import Sequence
from typing import Any

import edt
import numpy as np
from numpy.typing import NDArray


def distance(mask: NDArray[np.bool_], spacing_mm: Sequence[float], /) -> NDArray[np.float32]:
    """Signed distance from each voxel to the nearest one on the other side of the edge, between their centres.

    Parameters
    ----------
    mask : (*size) bool

    Returns
    -------
    (*size) float32, mm
        Positive outside, negative inside, nowhere 0. Where all voxels are on one side, as far as the field of view's
        diagonal.
    """
    far = float(np.linalg.norm(np.multiply(mask.shape, spacing_mm)))
    signed: NDArray[np.float32] = edt.sdf(np.ascontiguousarray(mask), anisotropy=tuple(spacing_mm))
    return np.negative(signed, out=signed).clip(-far, far, out=signed)


def move(labels: NDArray[Any], mm: float, spacing_mm: Sequence[float], /) -> NDArray[Any]:
    """Move the edge of a mask outwards, or for negative mm inwards.

    Parameters
    ----------
    labels : (*size) unsigned
        What joins gets the label that is next to it.
    """
    if not mm:
        return labels
    apart = distance(labels > 0, spacing_mm)
    if mm > 0:
        return extend(labels, (apart > 0) & (apart <= mm), spacing_mm)
    return np.where((apart < 0) & (apart >= mm), labels.dtype.type(0), labels)


def extend(
    labels: NDArray[Any], where: NDArray[np.bool_], spacing_mm: Sequence[float] | None = None, /
) -> NDArray[Any]:
    """Give voxels the label of the nearest one that has one, of labels (*size), of which some are not 0."""
    extended = labels.copy()
    first = labels.max()
    if ((labels == 0) | (labels == first)).all():
        extended[where] = first
        return extended
    from scipy.ndimage import distance_transform_edt  # slow to import

    nearest = distance_transform_edt(labels == 0, sampling=spacing_mm, return_distances=False, return_indices=True)
    extended[where] = labels[tuple(place[where] for place in nearest)]
    return extended

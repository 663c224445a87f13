"""The edge of a mask: how far each voxel is from it, and moving it."""

from collections.abc import Sequence

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


def move(labels: NDArray[np.uint8], mm: float, spacing_mm: Sequence[float], /) -> NDArray[np.uint8]:
    """Move the edge of a mask outwards, or for negative mm inwards.

    Parameters
    ----------
    labels : (*size) uint8
        What joins gets the first label.
    """
    if not mm:
        return labels
    apart = distance(labels > 0, spacing_mm)
    if mm > 0:
        return np.where((apart > 0) & (apart <= mm), np.uint8(1), labels)
    return np.where((apart < 0) & (apart >= mm), np.uint8(0), labels)

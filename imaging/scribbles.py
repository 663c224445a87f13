"""Scribbles made of dense labels, for studies of learning from them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from onelabel.imaging.labels import IGNORE

_AROUND = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # clockwise from above


def scribble(
    target: NDArray[np.int32],
    /,
    *,
    spacing_mm: Sequence[float],
    across: int = 2,
    ring_mm: tuple[float, float] = (4, 20),
) -> NDArray[np.int32]:
    """Of each class a line of one voxel, slice by slice, as an annotator might draw it.

    A structure's line is its skeleton, and where that is hardly more than a point a loop around it, too; the
    background's line runs around all structures.

    Parameters
    ----------
    target : (*size), class of every voxel
    spacing_mm : (3,)
    across : axis along which slices follow each other
    ring_mm : distances from the structures between which the background's line runs

    Returns
    -------
    (*size) int32, IGNORE off the lines
    """
    slices = np.moveaxis(target, across, 0)
    pixel_mm = [step for axis, step in enumerate(spacing_mm) if axis != across]
    lines = np.full(slices.shape, IGNORE, np.int32)
    for plane, line in zip(slices, lines, strict=True):
        for index in np.unique(plane[plane > 0]):
            line[_line(plane == index)] = index
        if (plane > 0).any():
            away_mm = distance_transform_edt(plane <= 0, sampling=pixel_mm)
            ring = (away_mm >= ring_mm[0]) & (away_mm <= ring_mm[1]) & (plane == 0)
            line[skeleton(ring[None])[0]] = 0
    return np.moveaxis(lines, 0, across)


def _line(structure: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The line of a structure (rows, columns)."""
    line = skeleton(structure[None])[0]
    if np.count_nonzero(line) ** 2 < np.count_nonzero(structure):
        depth = distance_transform_edt(structure)
        line |= skeleton((structure & (depth <= depth.max() / 2))[None])[0]
    return line


def skeleton(planes: NDArray[np.bool_], /) -> NDArray[np.bool_]:
    """Thin what is in each plane to lines of one voxel that hang together as it did (Zhang and Suen 1984).

    Parameters
    ----------
    planes : (n, rows, columns)
    """
    kept = np.pad(planes, ((0, 0), (1, 1), (1, 1)))
    before = -1
    while (count := int(np.count_nonzero(kept))) != before:
        before = count
        for first, second in (((0, 2, 4), (2, 4, 6)), ((0, 2, 6), (0, 4, 6))):
            ring = [np.roll(kept, (-row, -column), (1, 2)) for row, column in _AROUND]
            neighbours = np.sum(ring, axis=0, dtype=np.int8)
            entries = np.sum([~a & b for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)], axis=0, dtype=np.int8)
            ends = [np.logical_and.reduce([ring[place] for place in places]) for places in (first, second)]
            kept &= ~((neighbours >= 2) & (neighbours <= 6) & (entries == 1) & ~ends[0] & ~ends[1])
    return kept[:, 1:-1, 1:-1]

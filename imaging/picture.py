"""A small picture of a mask: three slices of its scan, with the outline of each structure."""

import io
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray
from PIL import Image

from onelabel.errors import DataError
from onelabel.imaging.volume import Volume, scale

HEIGHT = 96  # pixels
_WIDEST = 2 * HEIGHT
_GAP = 2
_GREYS = 31  # few, to be small
_COLOURS = ((255, 96, 32), (51, 204, 255), (128, 255, 64), (255, 96, 255))  # of structures, in turn


def overlay(image: Volume, mask: NDArray[Any], /) -> bytes:
    """PNG of the sagittal, coronal and axial slice through the centre of a mask, side by side, up or front on top.

    Parameters
    ----------
    mask : (*size) labels on the image's grid; where it is empty, the slices run through the centre of the image
    """
    structures = np.unique(mask[mask > 0])
    panels = [_panel(*planes, structures) for planes in _slices(image, mask)]
    seen = _scaled(panels)
    sheet = np.zeros((HEIGHT, sum(grey.shape[1] for grey in seen) + _GAP * (len(seen) - 1)), np.uint8)
    left = 0
    for grey, (_, parts) in zip(seen, panels, strict=True):
        for place, inside in enumerate(parts):
            grey[_edge(inside)] = _GREYS + place % len(_COLOURS)
        sheet[:, left : left + grey.shape[1]] = grey
        left += grey.shape[1] + _GAP
    picture = Image.frombytes("P", sheet.shape[::-1], sheet.tobytes())
    greys = np.linspace(0, 255, _GREYS).round().astype(int).tolist()
    picture.putpalette([level for grey in greys for level in (grey, grey, grey)] + list(chain(*_COLOURS)))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _slices(image: Volume, mask: NDArray[Any]) -> Iterator[tuple[NDArray, NDArray, tuple[float, float]]]:
    """Slices (rows, columns) of image and mask, and the size of their pixels in mm."""
    orientation = io_orientation(image.affine)
    data, labels = apply_orientation(image.data, orientation), apply_orientation(mask, orientation)
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = image.spacing_mm
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        along = np.count_nonzero(labels, axis=others)
        place = int(round(np.average(np.arange(len(along)), weights=along))) if along.any() else len(along) // 2
        at = (*(slice(None),) * axis, place)
        planes = (part[at].T[::-1] for part in (data, labels))
        yield next(planes), next(planes), (spacing[others[1]], spacing[others[0]])


def _panel(
    data: NDArray, labels: NDArray, pixel_mm: tuple[float, float], structures: NDArray
) -> tuple[NDArray, list[NDArray]]:
    """Image and mask of each structure at the height of the picture."""
    height, width = np.multiply(data.shape, pixel_mm)
    size = max(1, min(_WIDEST, round(HEIGHT * width / height))), HEIGHT
    grey = Image.fromarray(np.ascontiguousarray(data, np.float32)).resize(size, Image.Resampling.BILINEAR)
    shares = [Image.fromarray((labels == one).astype(np.float32)) for one in structures]
    return np.asarray(grey), [np.asarray(share.resize(size, Image.Resampling.BILINEAR)) > 0.5 for share in shares]


def _edge(inside: NDArray) -> NDArray:
    """The pixels inside that have a side in common with one outside."""
    near = np.pad(inside, 1, mode="edge")
    return inside & ~(near[2:, 1:-1] & near[:-2, 1:-1] & near[1:-1, 2:] & near[1:-1, :-2])


def _scaled(panels: list[tuple[NDArray, list[NDArray]]]) -> list[NDArray]:
    """Grey levels of the slices, on one scale."""
    try:
        levels = scale(np.concatenate([grey.ravel() for grey, _ in panels])) * (_GREYS - 1)
    except DataError:  # nothing to be seen in these slices
        levels = np.zeros(sum(grey.size for grey, _ in panels), np.float32)
    ends = np.cumsum([grey.size for grey, _ in panels])[:-1]
    parts = zip(np.split(levels.round().astype(np.uint8), ends), panels, strict=True)
    return [part.reshape(grey.shape) for part, (grey, _) in parts]

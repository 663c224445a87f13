"""Scans of one volume or of many: read as the volumes that a mask is made for."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from nibabel.spatialimages import SpatialImage

from onelabel.imaging import files
from onelabel.imaging.volume import Volume, checked, open_image, voxels


def read(path: Path, /, *, each: bool = False) -> Iterator[Volume]:
    """Read a 3D image; of a 4D series the mean over time, or each volume.

    Yields
    ------
    Volume
        One at a time: of a series no more than two volumes are held.

    Raises
    ------
    DataError : see `volume.load`.
    """
    image = open_image(path)
    if _is_series(image) and files.is_packed(image):
        with files.damage_named(path), files.forwards(image) as opened:
            yield from volumes(opened, path, each=each)
    else:
        yield from volumes(image, path, each=each)


def volumes(image: SpatialImage, name: Path, /, *, each: bool = False) -> Iterator[Volume]:
    """Like `read`, of an image that is open; `name` stands in errors."""
    if not _is_series(image):
        yield checked(voxels(image, name), image, name, regions=True)
        return
    frames, rest = image.shape[3], (0,) * (len(image.shape) - 4)
    if each:
        for frame in range(frames):
            yield checked(voxels(image, name, (..., frame, *rest)), image, name, regions=True)
        return
    mean = np.zeros(image.shape[:3], np.float32)
    for frame in range(frames):
        mean += voxels(image, name, (..., frame, *rest)) / np.float32(frames)
    yield checked(mean, image, name, regions=True)


def _is_series(image: SpatialImage) -> bool:
    """Whether there is a fourth axis that is longer than one, and none behind it."""
    return len(image.shape) > 3 and image.shape[3] > 1 and set(image.shape[4:]) <= {1}

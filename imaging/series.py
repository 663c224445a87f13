"""Scans of one volume or of many: read as the volumes that a mask is made for."""

from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage

from onelabel.imaging.volume import Volume, checked, load, open_image, voxels


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
    if len(_shape(image)) != 4:
        yield load(path)
        return
    image = _kept_open(image, path)
    frames, rest = image.shape[3], (0,) * (len(image.shape) - 4)
    if each:
        for frame in range(frames):
            yield checked(voxels(image, path, (..., frame, *rest)), image, path)
        return
    mean = np.zeros(image.shape[:3], np.float32)
    for frame in range(frames):
        mean += voxels(image, path, (..., frame, *rest)) / np.float32(frames)
    yield checked(mean, image, path)


def _shape(image: SpatialImage) -> tuple[int, ...]:
    """The shape without trailing axes of length one."""
    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _kept_open(image: SpatialImage, path: Path) -> SpatialImage:
    """The same image with its file kept open: a compressed file is then read once, not once for each volume."""
    if isinstance(image, nib.Nifti1Pair):
        return type(image).from_filename(path, mmap=False, keep_file_open=True)
    return image

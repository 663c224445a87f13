"""Volumes: an array and its place in space; read, written, and moved between voxel grids.

Affines map voxel indices to millimetres in RAS (x to the right, y to the front, z to the top), as nibabel has them.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from onelabel.errors import DataError
from onelabel.imaging import files, places
from onelabel.imaging.labels import IGNORE
from onelabel.imaging.resample import resample
from onelabel.imaging.storage import AnyPath

log = logging.getLogger(__name__)

MAX_BAD_FRACTION = 0.01  # of voxels that are not finite
MAX_LABEL = 2**24  # the last whole number that float32 holds exactly
SAMPLED_VOXELS = 2**18  # enough for percentiles


@dataclass(frozen=True)
class Volume:
    """An image or a label map in space.

    Attributes
    ----------
    data : (*size)
        float32 for images, int32 for labels.
    affine : (4, 4) float64
        Voxel index -> mm, RAS.
    """

    data: NDArray[Any]
    affine: NDArray[np.float64]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel."""
        x, y, z = _spacing(self.affine).tolist()
        return x, y, z

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel, of a sheared one too."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.data.shape


@dataclass(frozen=True)
class Grid:
    """The voxel grid on which a network works, its axes in RAS order."""

    spacing_mm: tuple[float, float, float]
    size: tuple[int, int, int]


def load(path: str | AnyPath, /, *, labels: bool = False) -> Volume:
    """Read a 3D image, or a 3D label map, from NIfTI, MGZ or whatever else nibabel reads, be it at a path or a URI.

    Returns
    -------
    Volume
        float32, finite, with contrast; or int32 with ``labels``.

    Raises
    ------
    DataError
        The file is missing, damaged, not 3D, has no usable affine, more than 1 % of its voxels are not finite, the
        image is constant, or the labels are not whole numbers.
    ConnectionError
        A URI cannot be reached.
    """
    try:
        with places.fetched(str(path)) as file:
            image = open_image(file)
            return checked(voxels(image, file, labels=labels), image, file, labels=labels)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path.") from None


def open_image(path: Path, /) -> SpatialImage:
    """Read the header of an image.

    Raises
    ------
    DataError : see `load`.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # in the affine, which is checked later
            image = nib.load(path, mmap=False)
    except files.UNREADABLE as error:
        if not path.exists():
            raise DataError(f"{path} does not exist: check the path.") from error
        raise DataError(f"{path} cannot be read as an image ({error}): it is damaged or of another format.") from error
    if not isinstance(image, SpatialImage):
        raise DataError(f"{path} holds {type(image).__name__}, not a volume: give a 3D image such as .nii.gz or .mgz.")
    return image


def voxels(image: SpatialImage, path: Path, /, part: Any = (), *, labels: bool = False) -> NDArray[Any]:
    """Read voxels, or a part of them: float32, or for labels as they are.

    Raises
    ------
    DataError : see `load`.
    """
    with files.damage_named(path), np.errstate(over="ignore", invalid="ignore"):  # what overflows is checked below
        return files.read(image, part, dtype=None if labels else np.float32)


def checked(
    data: NDArray[Any], image: SpatialImage, path: Path, /, *, labels: bool = False, regions: bool = False
) -> Volume:
    """Make a volume of what was read.

    regions : whole regions may hold voxels that are not finite, as around a round field of view

    Raises
    ------
    DataError : see `load`.
    """
    data = _without_bad_voxels(_as_3d(data, path), path, regions=regions)
    volume = Volume(_as_labels(data, path) if labels else data, _checked_affine(image, path))
    if not labels and data.min() == data.max():
        raise DataError(f"{path} has the value {data.flat[0]:g} in every voxel: an image needs contrast.")
    return volume


def load_labelled(image_path: str | AnyPath, label_path: str | AnyPath, /, *, above: int = 0) -> tuple[Volume, Volume]:
    """Read an image and its label map, which must lie on the same voxel grid; what is `above` is structure.

    Raises
    ------
    DataError
        Either file is bad (see `load`), the shapes differ, a corner of the field of view lies more than a tenth of a
        voxel elsewhere, or the label map is empty or fills the image.
    """
    image, label = load(image_path), load(label_path, labels=True)
    if image.shape != label.shape:
        raise DataError(
            f"{label_path} has shape {label.shape}, its image {image_path} has {image.shape}: "
            "resample the label to the image."
        )
    corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in image.shape))])
    shift_mm = np.linalg.norm(corners @ (image.affine - label.affine).T, axis=1).max()
    if shift_mm > 0.1 * min(image.spacing_mm):
        raise DataError(
            f"{label_path} lies {shift_mm:.3g} mm from its image {image_path}, at most a tenth of a voxel is allowed: "
            "resample the label to the image or copy the image's affine."
        )
    labelled = np.count_nonzero(label.data > above)
    if labelled in (0, label.data.size):
        what = "no voxel" if labelled == 0 else "every voxel"
        raise DataError(f"{label_path} labels {what}: it needs both background (0) and at least one structure.")
    return image, label


def reorient(volume: Volume, /) -> Volume:
    """Permute and flip axes so that they run closest to right, front, top (RAS); no voxel changes value or place."""
    orientation = io_orientation(volume.affine)
    return Volume(apply_orientation(volume.data, orientation), volume.affine @ inv_ornt_aff(orientation, volume.shape))


def conform(volume: Volume, grid: Grid, /, *, labels: bool = False) -> Volume:
    """Resample onto a network's grid.

    The grid follows the scan's own axes in RAS order, without their shear, and shares the centre of its field of view.
    Following the scan's axes keeps thick slices apart in an oblique scan. Along axes of equal spacing the voxels
    coincide, so that nothing is smoothed.

    Parameters
    ----------
    volume : Volume
    grid : Grid
    labels : bool
        Take the nearest voxel instead of interpolating; see also `conform_mask`.

    Returns
    -------
    Volume
        Of size ``grid.size``, 0 outside the field of view.
    """
    affine = _grid_affine(reorient(volume), grid)
    mode: Literal["nearest", "linear"] = "nearest" if labels else "linear"
    data = resample(volume.data, volume.affine, affine, grid.size, mode=mode, antialias=not labels)
    return Volume(data, affine)


def conform_mask(volume: Volume, grid: Grid, /) -> Volume:
    """Resample labels onto a network's grid by the share that each class has in a voxel.

    A voxel gets the label with the largest share, background included; for a mask that is a share of one half. If some
    are not annotated (IGNORE), nor are all out of view; such weigh so little that lines outlive larger voxels.
    """
    volume = reorient(volume)
    affine = _grid_affine(volume, grid)
    best, best_share = np.zeros(grid.size, volume.data.dtype), np.zeros(grid.size, np.float32)
    background = np.ones(grid.size, np.float32)
    unknown = 0.5 * np.minimum(1, volume.spacing_mm / np.array(grid.spacing_mm)).prod(dtype=np.float32)
    for label in np.unique(volume.data[volume.data != 0]):
        known = label != IGNORE
        share = resample((volume.data == label) == known, volume.affine, affine, grid.size, antialias=True)
        background -= (share := share if known else 1 - share)
        share = share if known else share * unknown
        larger = share > best_share
        best[larger] = label
        best_share[larger] = share[larger]
    best[best_share < background] = 0
    return Volume(best, affine)


def restore(
    probability: NDArray[Any],
    affine: NDArray[np.float64],
    native_shape: Sequence[int],
    native_affine: NDArray[np.float64],
    /,
) -> NDArray[np.float32]:
    """Bring a map from a network's grid back to the grid of the scan.

    Parameters
    ----------
    probability : (*size) or (C, *size)
    affine : (4, 4), mm
        Of the conformed volume.
    native_shape : (3,)
    native_affine : (4, 4), mm

    Returns
    -------
    (*native_shape) or (C, *native_shape) float32
        0 outside the network's grid.
    """
    native: NDArray[np.float32] = resample(probability, affine, native_affine, native_shape)
    return native


def scale(data: NDArray[Any], /) -> NDArray[np.float32]:
    """Scale intensities to [0, 1], blind to the few brightest and darkest voxels.

    Zero becomes the 0.1th percentile of all voxels, one the 99.5th percentile of those brighter than the mean.

    Parameters
    ----------
    data : (*size)

    Raises
    ------
    DataError
        All voxels are equal.
    """
    stride = math.ceil((data.size / SAMPLED_VOXELS) ** (1 / data.ndim))
    lower, upper = _robust_range(data[(slice(None, None, stride),) * data.ndim])
    if not upper > lower:  # too little is bright to be hit by the sample
        lower, upper = float(data.min()), float(data.max())
    if not upper > lower:
        raise DataError(f"An image has the value {lower:g} in every voxel: it needs contrast.")
    scaled = np.subtract(data, lower, dtype=np.float32)
    scaled /= upper - lower
    return scaled.clip(0, 1, out=scaled)


def _robust_range(data: NDArray[Any]) -> tuple[float, float]:
    """Lower and upper end of the intensities that matter."""
    lower, top = np.percentile(data, (0.1, 99.9))
    data = data.clip(lower, top)  # a single huge value would move the mean
    bright = data[data > data.mean()]
    return float(lower), float(np.percentile(bright, 99.5)) if bright.size else float(lower)


def _spacing(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3,) mm: edge lengths of a voxel."""
    return np.sqrt((affine[:3, :3] ** 2).sum(axis=0))


def _as_3d(data: NDArray[Any], path: Path) -> NDArray[Any]:
    """Drop trailing axes of length one; what remains must be a volume."""
    shape = data.shape
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3 or min(data.shape) < 2:
        raise DataError(f"{path} has shape {shape}: a volume has three axes of two or more voxels; extract one.")
    return data


def _without_bad_voxels(data: NDArray[Any], path: Path, *, regions: bool) -> NDArray[Any]:
    """Set few voxels that are not finite, or whole regions of them, to 0, or to the nearest value that occurs."""
    bad = ~np.isfinite(data)
    count = int(np.count_nonzero(bad))
    if not count:
        return data
    most = MAX_BAD_FRACTION * data.size
    if count > most and not (regions and count < data.size and np.count_nonzero(bad & ~_solid(bad)) <= most):
        raise DataError(
            f"{path} has {count / data.size:.1%} voxels that are not finite, at most {MAX_BAD_FRACTION:.0%} is "
            "allowed: repair the file."
        )
    log.warning("%s: %d voxels are not finite, taken for background", path, count)
    good = data[~bad]
    return np.where(bad, np.clip(0, good.min(), good.max()), data).astype(data.dtype, copy=False)


def _solid(bad: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What belongs to blocks of 2 x 2 x 2 such voxels; what lies outside the volume counts as one."""
    from scipy.ndimage import binary_opening  # slow to import

    return binary_opening(np.pad(bad, 1, constant_values=True), np.ones((2, 2, 2)))[1:-1, 1:-1, 1:-1]


def _as_labels(data: NDArray[Any], path: Path) -> NDArray[np.int32]:
    """Round what is a whole number up to the precision of a scaled file."""
    rounded = np.rint(data) if data.dtype.kind == "f" else data
    if data.dtype.kind == "f" and np.abs(data - rounded).max() > 0.01:
        raise DataError(f"{path} has labels that are not whole numbers: give a label map, not a probability.")
    if rounded.min() < -MAX_LABEL or rounded.max() > MAX_LABEL:
        raise DataError(f"{path} has labels from {rounded.min()} to {rounded.max()}: at most 2^24 is allowed.")
    return rounded.astype(np.int32)


def _checked_affine(image: SpatialImage, path: Path) -> NDArray[np.float64]:
    """(4, 4): the affine, which must be invertible."""
    affine = np.array(image.affine, np.float64)
    header = image.header
    if isinstance(header, nib.Nifti1Header) and not (header["qform_code"] or header["sform_code"]):
        log.warning("%s: the header gives no orientation, voxel size alone is used", path)
    sound = affine.shape == (4, 4) and bool(np.isfinite(affine).all())
    # Relative to the voxel size: a microscope's voxels are small, not singular.
    if not sound or abs(np.linalg.det(affine[:3, :3])) <= 1e-3 * _spacing(affine).prod():
        raise DataError(f"{path} has a missing or singular affine {affine.round(3).tolist()}: repair its header.")
    return affine


def _grid_affine(volume: Volume, grid: Grid) -> NDArray[np.float64]:
    """(4, 4) mm: places a grid over a reoriented volume, see `conform`."""
    spacing, shape = _spacing(volume.affine), np.array(volume.shape)
    # The closest rotation to the scan's axes: the same axes unless they are sheared.
    left, _, right = np.linalg.svd(volume.affine[:3, :3] / spacing)
    linear = left @ right * np.array(grid.spacing_mm)
    ratio = np.array(grid.spacing_mm) / spacing
    half = (np.array(grid.size) - 1) / 2
    centre = (shape - 1) / 2
    first = centre - ratio * half
    centre += np.where(np.isclose(ratio, 1, rtol=1e-4), np.rint(first) - first, 0)

    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = volume.affine[:3, :3] @ centre + volume.affine[:3, 3] - linear @ half
    return affine

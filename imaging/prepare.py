"""From files to what networks read: scans on the network's grid."""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onelabel.configs.augmentation import BinsConfig
from onelabel.imaging import places, volume
from onelabel.imaging.classes import Classes, load_target
from onelabel.imaging.labels import HALF, BinnedScan, bin_scan, read_probability
from onelabel.imaging.volume import Grid, Volume

log = logging.getLogger(__name__)


def image_on_grid(image: Volume, grid: Grid, /) -> Volume:
    """Scale an image, bring it onto the grid, and scale what is in view: float32 in [0, 1]."""
    # Scaled first, so that what lies out of view (0) is as dark as air also in images that hold negative values.
    conformed = volume.conform(Volume(volume.scale(image.data), image.affine), grid)
    return Volume(volume.scale(conformed.data), conformed.affine)


def scan_on_grid(
    image_path: str,
    label_path: str,
    grid: Grid,
    /,
    *,
    bins: BinsConfig,
    seed: int,
    classes: Classes | None = None,
    probability: bool = False,
) -> BinnedScan:
    """Load a scan and its label, bring both onto the grid and bin the intensities.

    With `probability` the label file holds that of the structures, 0 to 255; of several along a fourth axis.

    Raises
    ------
    DataError : a file that cannot be used, or grids that differ.
    """
    classes = classes or Classes()
    share = None
    if probability:
        image, parts = _load_probability(image_path, label_path, classes)
        share = np.stack([np.rint(volume.conform(part, grid).data).astype(np.uint8) for part in parts])
        target = read_probability(share)
    else:
        image, label = load_target(image_path, label_path, classes)
        target = volume.conform_mask(label, grid).data
        _warn_of_losses(label_path, classes, label.data, target)
    scan = bin_scan(
        image_on_grid(image, grid).data,
        target,
        spacing_mm=grid.spacing_mm,
        config=bins,
        classes=len(classes),
        seed=seed,
    )
    return replace(scan, probability=share)


def _load_probability(image_path: str, label_path: str, classes: Classes) -> tuple[Volume, list[Volume]]:
    """A scan, and the probability of each structure in it, 0 to 255."""
    if len(classes) == 2:
        image, share = volume.load_labelled(image_path, label_path, above=HALF)
        return image, [share]
    image = volume.load(image_path)
    with places.fetched(label_path) as file:
        shares = volume.voxels(volume.open_image(file), file)
    return image, [Volume(share, image.affine) for share in np.moveaxis(shares, -1, 0)]


def _warn_of_losses(path: str, classes: Classes, target: NDArray[Any], on_grid: NDArray[Any]) -> None:
    """Say which classes have no voxel left."""
    for index, name in enumerate(classes.names):
        if (target == index).any() and not (on_grid == index).any():
            log.warning("%s: no voxel of the grid is '%s', which is there in the file", path, name)

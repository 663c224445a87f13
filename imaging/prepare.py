"""From files to what networks read: scans on the network's grid."""

from dataclasses import replace

import numpy as np

from onelabel.configs.augmentation import BinsConfig
from onelabel.imaging import volume
from onelabel.imaging.labels import HALF, BinnedScan, bin_scan
from onelabel.imaging.volume import Grid, Volume


def image_on_grid(image: Volume, grid: Grid, /) -> Volume:
    """Scale an image, bring it onto the grid, and scale what is in view: float32 in [0, 1]."""
    # Scaled first, so that what lies out of view (0) is as dark as air also in images that hold negative values.
    conformed = volume.conform(Volume(volume.scale(image.data), image.affine), grid)
    return Volume(volume.scale(conformed.data), conformed.affine)


def scan_on_grid(
    image_path: str, label_path: str, grid: Grid, /, *, bins: BinsConfig, seed: int, probability: bool = False
) -> BinnedScan:
    """Load a scan and its mask, bring both onto the grid and bin the intensities.

    With `probability` the label file holds that of the foreground, 0 to 255: the mask is what exceeds one half.

    Raises
    ------
    DataError : a file that cannot be used, or grids that differ.
    """
    image, label = volume.load_labelled(image_path, label_path, above=HALF if probability else 0)
    if probability:
        share = np.rint(volume.conform(label, grid).data).astype(np.uint8)
        mask = (share > HALF).astype(np.int32)
    else:
        mask = volume.conform_mask(Volume((label.data > 0).astype(np.int32), label.affine), grid).data
    scan = bin_scan(image_on_grid(image, grid).data, mask, spacing_mm=grid.spacing_mm, config=bins, seed=seed)
    return replace(scan, probability=share) if probability else scan

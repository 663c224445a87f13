"""From files to what networks read: scans on the network's grid."""

import numpy as np

from onelabel.configs.augmentation import BinsConfig
from onelabel.imaging import volume
from onelabel.imaging.labels import BinnedScan, bin_scan
from onelabel.imaging.volume import Grid, Volume


def image_on_grid(image: Volume, grid: Grid, /) -> Volume:
    """Scale an image, bring it onto the grid, and scale what is in view: float32 in [0, 1]."""
    # Scaled first, so that what lies out of view (0) is as dark as air also in images that hold negative values.
    conformed = volume.conform(Volume(volume.scale(image.data), image.affine), grid)
    return Volume(volume.scale(conformed.data), conformed.affine)


def scan_on_grid(image_path: str, label_path: str, grid: Grid, /, *, bins: BinsConfig, seed: int) -> BinnedScan:
    """Load a scan and its mask, bring both onto the grid and bin the intensities.

    Raises
    ------
    DataError : a file that cannot be used, or grids that differ.
    """
    image, label = volume.load_labelled(image_path, label_path)
    mask = Volume((label.data > 0).astype(np.int32), label.affine)
    return bin_scan(
        image_on_grid(image, grid).data,
        volume.conform_mask(mask, grid).data,
        spacing_mm=grid.spacing_mm,
        config=bins,
        seed=seed,
    )

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from onelabel.configs.augmentation import BinsConfig
from onelabel.errors import DataError
from onelabel.imaging.labels import HALF
from onelabel.imaging.outputs import save
from onelabel.imaging.prepare import image_on_grid, scan_on_grid
from onelabel.imaging.volume import Grid, Volume

GRID = Grid((4.0, 4.0, 4.0), (16, 20, 16))
AFFINE = np.diag([3.0, 2.5, 4.0, 1.0])
Head = tuple[np.ndarray, np.ndarray]


@pytest.mark.parametrize(("factor", "offset"), [(1, 0), (4000, 0), (0.001, 5), (300, -500)])
def test_images_are_scaled_whatever_their_units(head: Head, factor: float, offset: float) -> None:
    plain = image_on_grid(Volume(head[0], AFFINE), GRID)
    scaled = image_on_grid(Volume((head[0] * factor + offset).astype(np.float32), AFFINE), GRID)
    assert plain.shape == GRID.size
    assert plain.data.dtype == np.float32
    assert plain.data.min() == 0 and plain.data.max() == 1
    assert np.allclose(scaled.data, plain.data, atol=2e-3)


def test_what_lies_out_of_view_is_as_dark_as_air(head: Head) -> None:
    wide = Grid((4.0, 4.0, 4.0), (40, 40, 40))
    for offset in (0, -500):
        data = image_on_grid(Volume((head[0] * 300 + offset).astype(np.float32), AFFINE), wide).data
        assert data[0].max() < 0.02 and data[:, :, -1].max() < 0.02


@pytest.mark.parametrize("value", [1, 17])
def test_any_label_is_foreground(head: Head, value: int, tmp_path: Path) -> None:
    save(Volume(head[0], AFFINE), tmp_path / "a.nii.gz")
    save(Volume(head[1] * value, AFFINE), tmp_path / "b.nii.gz", dtype=np.int32)
    paths = (str(tmp_path / "a.nii.gz"), str(tmp_path / "b.nii.gz"))
    scan = scan_on_grid(*paths, GRID, bins=BinsConfig(), seed=0)
    assert scan.levels.shape == scan.target.shape == scan.distance_mm.shape == GRID.size
    assert set(np.unique(scan.target)) == {0, 1}
    volume_mm3 = (scan.target == 1).sum() * 4.0**3
    assert volume_mm3 == pytest.approx(head[1].sum() * 3 * 2.5 * 4, rel=0.05)
    # Image and mask lie on one grid: the phantom's brain is bright.
    assert scan.levels[scan.target == 1].min() > 0.4 * 255


@pytest.mark.parametrize("spacing", [(3.0, 2.5, 4.0), (4.0, 4.0, 4.0)])
def test_a_probability_comes_along(head: Head, spacing: tuple[float, float, float], tmp_path: Path) -> None:
    share = gaussian_filter(head[1].astype(float), 1.5)
    share[share < 0.01] = 0.01  # above nothing in every voxel, as networks have it
    save(Volume(head[0], AFFINE), tmp_path / "a.nii.gz")
    save(Volume(np.rint(255 * share).astype(np.uint8), AFFINE), tmp_path / "p.nii.gz")
    paths = (str(tmp_path / "a.nii.gz"), str(tmp_path / "p.nii.gz"))
    grid = Grid(spacing, head[0].shape if spacing == (3.0, 2.5, 4.0) else GRID.size)
    scan = scan_on_grid(*paths, grid, bins=BinsConfig(), seed=0, probability=True)
    assert scan.probability is not None
    assert (scan.probability.shape, scan.probability.dtype) == ((1, *grid.size), np.uint8)
    assert np.array_equal(scan.target, scan.probability[0] > HALF)
    if grid.size == head[0].shape:
        assert np.array_equal(scan.probability[0], np.rint(255 * share))
    inside = scan.probability[0, scan.distance_mm < -8]
    assert inside.size and inside.mean() > 0.8 * 255
    # As a label map it would be structure everywhere.
    with pytest.raises(DataError, match="labels every voxel"):
        scan_on_grid(*paths, grid, bins=BinsConfig(), seed=0)


def test_a_probability_without_structure_is_an_error(head: Head, tmp_path: Path) -> None:
    save(Volume(head[0], AFFINE), tmp_path / "a.nii.gz")
    save(Volume((127 * head[1]).astype(np.uint8), AFFINE), tmp_path / "p.nii.gz")
    paths = (str(tmp_path / "a.nii.gz"), str(tmp_path / "p.nii.gz"))
    with pytest.raises(DataError, match="labels no voxel"):
        scan_on_grid(*paths, GRID, bins=BinsConfig(), seed=0, probability=True)


def test_a_structure_lost_on_the_grid_is_an_error(head: Head, tmp_path: Path) -> None:
    dot = np.zeros_like(head[1])
    dot[0, 0, 0] = 1
    save(Volume(head[0], AFFINE), tmp_path / "a.nii.gz")
    save(Volume(dot, AFFINE), tmp_path / "b.nii.gz")
    with pytest.raises(DataError, match="on the network's grid"):
        scan_on_grid(
            str(tmp_path / "a.nii.gz"),
            str(tmp_path / "b.nii.gz"),
            Grid((20, 20, 20), (8, 8, 8)),
            bins=BinsConfig(),
            seed=0,
        )

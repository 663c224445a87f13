import cc3d
import numpy as np
import pytest

from onelabel.imaging.labels import IGNORE
from onelabel.imaging.scribbles import scribble, skeleton


def heart() -> np.ndarray:
    """(48, 40, 5) int32: a disc in a ring, and a disc beside them, in the three middle slices."""
    x, y = np.meshgrid(np.arange(48.0), np.arange(40.0), indexing="ij")
    plane = np.zeros((48, 40), np.int32)
    plane[np.hypot(x - 12, y - 20) < 8] = 1
    radius = np.hypot(x - 32, y - 20)
    plane[radius < 12], plane[radius < 8] = 2, 3
    return np.stack([0 * plane, plane, plane, plane, 0 * plane], axis=-1)


@pytest.mark.parametrize("across", [0, 1, 2])
def test_lines_are_thin_and_lie_within_their_class(across: int) -> None:
    target = np.moveaxis(heart(), 2, across)
    lines = scribble(target, spacing_mm=(2, 2, 2), across=across)
    assert lines.shape == target.shape and lines.dtype == np.int32
    assert np.array_equal(lines[lines != IGNORE], target[lines != IGNORE])
    assert set(np.unique(lines)) == {IGNORE, 0, 1, 2, 3}
    for index in range(1, 4):
        assert 0 < (lines == index).sum() < 0.3 * (target == index).sum()
    for plane in np.moveaxis(lines, across, 0)[[0, 4]]:
        assert (plane == IGNORE).all()


def test_a_skeleton_hangs_together_as_the_mask_does() -> None:
    planes = np.moveaxis(heart() > 0, 2, 0)
    ring = np.moveaxis(heart() == 2, 2, 0)
    for mask in (planes, ring):
        thin = skeleton(mask)
        assert not (thin & ~mask).any()
        assert np.array_equal(thin, skeleton(thin))
        for whole, line in zip(mask, thin, strict=True):
            for inside in (False, True):  # pieces, and holes
                near = 8 if inside else 4
                pieces = [cc3d.connected_components(part == inside, connectivity=near).max() for part in (whole, line)]
                assert pieces[0] == pieces[1]


def test_the_background_runs_around() -> None:
    lines = scribble(heart(), spacing_mm=(1, 1, 5), ring_mm=(2, 6))
    around = lines[..., 2] == 0
    assert cc3d.connected_components(~around, connectivity=4).max() >= 2  # it closes

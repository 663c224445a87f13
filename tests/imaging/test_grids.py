from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from onelabel.errors import DataError
from onelabel.imaging.metrics import dice
from onelabel.imaging.resample import box, resample
from onelabel.imaging.volume import Grid, Volume, conform, conform_mask, reorient, restore, scale

ORIENTATIONS = [
    np.array([[sign * (axis == column) for axis in range(3)] for sign, column in zip(signs, order, strict=True)])
    for order in permutations(range(3))
    for signs in product((1, -1), repeat=3)
]
GRID = Grid((1.5, 1.5, 1.5), (24, 26, 28))


def affine_of(matrix: np.ndarray, spacing: tuple[float, ...] = (1.5, 1.5, 1.5)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = matrix * spacing
    affine[:3, 3] = [-7.0, 11.0, 3.5]
    return affine


def rotation(*degrees: float) -> np.ndarray:
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        step = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        step[[i, i, j, j], [i, j, i, j]] = [np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]
        matrix = step @ matrix
    return matrix


def ball(
    affine: np.ndarray, shape: tuple[int, ...] = (20, 22, 23), radii: tuple[float, ...] = (9, 11, 7)
) -> np.ndarray:
    """(*shape) float32: an ellipsoid off the centre, one inside, fading to zero within one voxel."""
    centre = np.array(shape) / 2 - [1, 0.4, -1.3]
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    mm = (index - centre) * np.linalg.norm(affine[:3, :3], axis=0)
    distance = (1 - np.sqrt(((mm / radii) ** 2).sum(-1))) * min(radii)
    return np.clip(distance / 1.5 + 0.5, 0, 1).astype(np.float32)


def image(shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return np.random.default_rng(0).uniform(1, 100, shape).astype(np.float32)


def centroid_mm(volume: Volume) -> np.ndarray:
    index = np.indices(volume.shape).reshape(3, -1)
    mean = (index * volume.data.reshape(-1)).sum(1) / volume.data.sum()
    return volume.affine[:3, :3] @ mean + volume.affine[:3, 3]


# Grids


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_reorient_moves_no_voxel(matrix: np.ndarray) -> None:
    volume = Volume(ball(affine_of(matrix)), affine_of(matrix @ rotation(6, -7, 8)))
    turned = reorient(volume)
    assert nib.aff2axcodes(turned.affine) == ("R", "A", "S")
    np.testing.assert_allclose(centroid_mm(turned), centroid_mm(volume), atol=1e-4)


@pytest.mark.parametrize("tilt", [(0, 0, 0), (12, -9, 17)])
@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_conform_and_restore_undo_each_other(matrix: np.ndarray, tilt: tuple[float, float, float]) -> None:
    affine = affine_of(rotation(*tilt) @ matrix)
    volume = Volume(ball(affine), affine)
    conformed = conform(volume, GRID)
    assert conformed.shape == GRID.size
    np.testing.assert_allclose(conformed.spacing_mm, GRID.spacing_mm)
    np.testing.assert_allclose(centroid_mm(conformed), centroid_mm(volume), atol=0.01)

    restored = restore(conformed.data, conformed.affine, volume.shape, volume.affine)
    np.testing.assert_allclose(restored, volume.data, atol=1e-3)

    mask = Volume((volume.data > 0.5).astype(np.int32), affine)
    conformed = conform_mask(mask, GRID)
    restored = restore(conformed.data, conformed.affine, mask.shape, mask.affine)
    assert dice(restored >= 0.5, mask.data) == 1
    np.testing.assert_array_equal(conform(mask, GRID, labels=True).data, conformed.data)


def test_conform_gives_the_same_voxels_in_every_orientation() -> None:
    straight = Volume(ball(np.eye(4)), affine_of(np.eye(3)))
    expected = conform(straight, GRID)
    for matrix in ORIENTATIONS:
        orientation = nib.orientations.io_orientation(affine_of(matrix))
        data = nib.orientations.apply_orientation(straight.data, orientation)
        affine = straight.affine @ nib.orientations.inv_ornt_aff(orientation, straight.shape)
        conformed = conform(Volume(data, affine), GRID)
        np.testing.assert_array_equal(conformed.data, expected.data)
        np.testing.assert_allclose(conformed.affine, expected.affine, atol=1e-9)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.6, 0.6, 4), (3, 2, 1), (1.5, 1, 2.2)])
@pytest.mark.parametrize("tilt", [(0, 0, 0), (12, -9, 17)])
def test_conform_keeps_the_place_at_any_spacing(spacing: tuple[float, ...], tilt: tuple[float, float, float]) -> None:
    affine = affine_of(rotation(*tilt), spacing)
    shape = tuple(int(34 / length) for length in spacing)
    volume = Volume(ball(affine, shape), affine)
    conformed = conform(volume, GRID)
    np.testing.assert_allclose(centroid_mm(conformed), centroid_mm(volume), atol=0.15)
    restored = restore(conformed.data, conformed.affine, volume.shape, volume.affine)
    assert dice(restored >= 0.5, volume.data >= 0.5) > 0.97

    mask = Volume((volume.data >= 0.5).astype(np.int32), affine)
    conformed = conform_mask(mask, GRID)
    volumes = [np.count_nonzero(v.data) * np.prod(v.spacing_mm) for v in (mask, conformed)]
    assert volumes[1] == pytest.approx(volumes[0], rel=0.05)


def test_conform_drops_shear() -> None:
    affine = affine_of(np.eye(3))
    affine[0, 1] = 0.3
    conformed = conform(Volume(ball(affine), affine), GRID)
    linear = conformed.affine[:3, :3] / GRID.spacing_mm
    np.testing.assert_allclose(linear @ linear.T, np.eye(3), atol=1e-9)


def test_conform_centres_the_field_of_view() -> None:
    volume = Volume(image((40, 30, 9)), affine_of(rotation(5, 0, 0), (1, 1, 4)))
    conformed = conform(volume, GRID)
    centres = [v.affine[:3, :3] @ ((np.array(v.shape) - 1) / 2) + v.affine[:3, 3] for v in (volume, conformed)]
    np.testing.assert_allclose(*centres, atol=1e-9)


def test_conform_is_zero_outside_the_field_of_view() -> None:
    volume = Volume(image((6, 6, 6)) + 10, affine_of(np.eye(3)))
    data = conform(volume, GRID).data
    assert data[9:15, 10:16, 11:17].min() > 10
    assert np.count_nonzero(data > 1e-3) == 6**3


def test_conform_does_not_alias() -> None:
    # Stripes of one voxel are grey at twice the spacing, not stripes of another width.
    stripes = np.broadcast_to(np.arange(40)[:, None, None] % 2, (40, 8, 8)).astype(np.float32)
    data = conform(Volume(stripes, np.eye(4)), Grid((1.9, 1, 1), (12, 8, 8))).data
    np.testing.assert_allclose(data, 0.5, atol=0.1)


def test_conform_mask_keeps_classes_apart() -> None:
    affine = affine_of(np.eye(3), (1, 1, 1))
    labels = np.zeros((30, 30, 30), np.int32)
    labels[5:15, 5:25, 5:25] = 1
    labels[15:25, 5:25, 5:25] = 700
    conformed = conform_mask(Volume(labels, affine), Grid((2, 2, 2), (16, 16, 16)))
    assert conformed.data.dtype == np.int32
    assert set(np.unique(conformed.data)) == {0, 1, 700}
    sizes = [np.count_nonzero(conformed.data == label) * 8 for label in (1, 700)]
    assert sizes == pytest.approx([4000, 4000], rel=0.15)


def test_restore_brings_every_channel_back() -> None:
    volume = Volume(ball(affine_of(np.eye(3))), affine_of(np.eye(3)))
    conformed = conform(volume, GRID)
    both = np.stack([conformed.data, 1 - conformed.data])
    both.flags.writeable = False
    restored = restore(both, conformed.affine, volume.shape, volume.affine)
    assert restored.shape == (2, *volume.shape)
    np.testing.assert_allclose(restored.sum(0), 1, atol=1e-5)


def test_restore_is_zero_outside_the_grid() -> None:
    volume = Volume(image((20, 20, 20)), np.eye(4))
    small = conform(volume, Grid((1, 1, 1), (8, 8, 8)))
    restored = restore(np.ones_like(small.data), small.affine, volume.shape, volume.affine)
    assert restored.sum() == pytest.approx(8**3, rel=1e-4)


def test_resample_in_slabs_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data, to_affine = image((12, 11, 10)), affine_of(rotation(9, 8, 7), (1, 0.9, 0.8))
    to_affine[:3, 3] = 1
    whole = resample(data, np.eye(4), to_affine, (13, 9, 9))
    monkeypatch.setattr("onelabel.imaging.resample.SLAB_VOXELS", 200)
    np.testing.assert_allclose(resample(data, np.eye(4), to_affine, (13, 9, 9)), whole, atol=1e-3)


def test_resample_agrees_with_scipy() -> None:
    from scipy.ndimage import affine_transform

    data, to_affine = image((12, 11, 10)), affine_of(rotation(9, 8, 7), (0.5, 0.4, 0.3))
    to_affine[:3, 3] = 3
    for mode, order in (("linear", 1), ("nearest", 0)):
        expected = affine_transform(data, to_affine, output_shape=(8, 9, 7), order=order)
        ours = resample(data, np.eye(4), to_affine, (8, 9, 7), mode=mode)  # type: ignore[arg-type]
        np.testing.assert_allclose(ours, expected, atol=1e-3)


# Intensities


@pytest.mark.parametrize(("gain", "offset"), [(1, 0), (1e-3, 0), (250, -4000), (1, 30000)])
def test_scale_is_blind_to_gain_offset_and_outliers(gain: float, offset: float) -> None:
    data = ball(np.eye(4)) * image((20, 22, 23))
    expected = scale(data)
    assert expected.dtype == np.float32
    assert (expected.min(), expected.max()) == (0, 1)
    data.flat[0] = 1e5
    data[0, 0, 1] = 1e30
    scaled = scale(data * np.float32(gain) + np.float32(offset))
    np.testing.assert_allclose(scaled.flat[2:], expected.flat[2:], atol=0.02)


def test_scale_leaves_its_input_alone_and_takes_integers() -> None:
    data = (image() * 10).astype(np.int16)
    before = data.copy()
    np.testing.assert_allclose(scale(data), scale(data.astype(np.float32)), atol=1e-6)
    np.testing.assert_array_equal(data, before)


def test_scale_finds_the_one_bright_voxel() -> None:
    data = np.zeros((100, 100, 100), np.float32)
    data[1, 1, 1] = 3
    assert scale(data)[1, 1, 1] == 1


def test_scale_refuses_an_image_without_contrast() -> None:
    with pytest.raises(DataError, match="contrast"):
        scale(np.full((4, 4, 4), 3.0))


@pytest.mark.parametrize("seed", range(6))
def test_parallel_grids_are_resampled_as_any_others(seed: int) -> None:
    """Axes permuted, flipped, of other lengths: a small matrix for each axis gives what looking up points gives."""
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(2, *rng.integers(2, 20, 3))).astype(np.float32)
    affine, target = np.eye(4), np.diag([*rng.uniform(0.4, 4, 3), 1])
    affine[:3, :3] = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3) * rng.uniform(0.4, 4, 3)
    affine[:3, 3], target[:3, 3] = rng.normal(0, 4, (2, 3))
    tilted = affine.copy()
    tilted[:3, :3] += 2e-4 * rng.normal(size=(3, 3))  # too little to matter, too much to be parallel
    for way in ({}, {"antialias": True}):
        for order in ("C", "F"):
            found = resample(np.asarray(data, order=order), affine, target, (15, 16, 17), **way)
            assert np.abs(found - resample(data, tilted, target, (15, 16, 17), **way)).max() < 0.05
            assert found.flags.c_contiguous
    assert np.array_equal(resample(data[0], affine, target, (9, 9, 9)), resample(data, affine, target, (9, 9, 9))[0])


@pytest.mark.parametrize("seed", range(20))
def test_a_box_holds_all_of_a_structure(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scan = Volume(np.zeros(rng.integers(4, 40, 3), np.float32), np.diag([*rng.uniform(0.5, 4, 3), 1]))
    scan.affine[:3, :3] += rng.normal(0, 0.2, (3, 3))
    grid = Grid((3.0, 3.0, 3.0), (16, 16, 16))
    affine = conform(scan, grid).affine
    probability = np.zeros(grid.size, np.float32)
    low = rng.integers(0, 12, 3)
    probability[tuple(slice(a, a + b) for a, b in zip(low, rng.integers(1, 5, 3), strict=True))] = 1
    native = restore(probability, affine, scan.shape, scan.affine) > 0.5
    found = box(probability > 0.5, affine, scan.affine, scan.shape)
    if native.any():
        assert found and native[found].sum() == native.sum()
    assert box(np.zeros(grid.size, bool), affine, scan.affine, scan.shape) is None

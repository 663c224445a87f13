import gzip
import logging
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from onelabel.errors import DataError
from onelabel.imaging.metrics import dice
from onelabel.imaging.volume import (
    Grid,
    Volume,
    conform,
    conform_mask,
    load,
    load_labelled,
    reorient,
    resample,
    restore,
    save,
    scale,
)

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


def write(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    kind = nib.MGHImage if path.suffix == ".mgz" else nib.Nifti1Image
    nib.save(kind(data, affine_of(rotation(10, 5, -8)) if affine is None else affine), path)
    return path


# Reading


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz"])
def test_load_keeps_voxels_and_place(tmp_path: Path, name: str) -> None:
    volume = load(write(tmp_path / name, image()))
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data, image())
    np.testing.assert_allclose(volume.affine, affine_of(rotation(10, 5, -8)), atol=1e-4)
    np.testing.assert_allclose(volume.spacing_mm, 1.5, rtol=1e-5)


def test_load_applies_slope_and_drops_trailing_axes(tmp_path: Path) -> None:
    scan = nib.Nifti1Image((image() * 10).astype(np.int16)[..., None, None], np.eye(4))
    scan.header.set_slope_inter(0.1, 5)
    nib.save(scan, tmp_path / "a.nii")
    volume = load(tmp_path / "a.nii")
    assert volume.shape == (5, 6, 7)
    np.testing.assert_allclose(volume.data, image() + 5, atol=0.1)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 8, 2), (8, 8, 8, 1, 3), (1, 8, 8)])
def test_load_refuses_what_is_not_3d(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="three axes"):
        load(write(tmp_path / "a.nii", image(shape)))


def test_load_refuses_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "a.nii.gz")
    for name, content in {"a.nii.gz": b"no gzip", "b.nii": b"", "c.mgz": b"x" * 400, "d.txt": b"words"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            load(tmp_path / name)
    with pytest.raises(DataError):
        load(tmp_path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_load_refuses_truncated_files(tmp_path: Path, name: str, share: float) -> None:
    path = write(tmp_path / name, image((20, 20, 20)))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="cannot be read"):
        load(path)


def test_load_of_damaged_files_raises_nothing_else(tmp_path: Path) -> None:
    # The log of nibabel tells what it repaired.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    generator = np.random.default_rng(0)
    for name in ("a.nii", "a.mgz", "a.nii.gz"):
        path = write(tmp_path / name, image())
        plain = path.suffix == ".nii"
        sound = path.read_bytes() if plain else gzip.decompress(path.read_bytes())
        for _ in range(60):
            content = bytearray(sound)
            for place in generator.integers(0, 352 if "nii" in name else 90, 3):
                content[place] = generator.integers(256)
            path.write_bytes(bytes(content) if plain else gzip.compress(bytes(content), 1))
            try:
                load(path)
            except DataError as error:
                assert "\n" not in str(error).split("(")[0]


def test_load_refuses_colours(tmp_path: Path) -> None:
    colours = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(DataError, match="real numbers"):
        load(tmp_path / "a.nii", labels=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_load_mends_few_bad_voxels_only(tmp_path: Path, bad: float, caplog: pytest.LogCaptureFixture) -> None:
    data = image((10, 10, 10))
    data.flat[:10] = bad
    volume = load(write(tmp_path / "a.nii", data))
    assert not volume.data.flat[:10].any()
    assert "10 voxels are not finite" in caplog.text
    data.flat[:11] = bad
    with pytest.raises(DataError, match="not finite"):
        load(write(tmp_path / "a.nii", data))


def test_load_takes_voxels_beyond_float32_for_bad(tmp_path: Path) -> None:
    data = image().astype(np.float64)
    data[0, 0, 0] = 1e300
    assert load(write(tmp_path / "a.nii", data)).data[0, 0, 0] == 0


def test_load_refuses_an_image_without_contrast(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", np.full((4, 5, 6), 7, np.uint8))
    with pytest.raises(DataError, match="contrast"):
        load(path)
    assert load(path, labels=True).data.max() == 7


@pytest.mark.parametrize("row", [[0, 0, 0, 0], [np.nan, 0, 0, 0], [0, 1e-9, 0, 0]])
def test_load_refuses_a_useless_affine(tmp_path: Path, row: list[float]) -> None:
    scan = nib.Nifti1Image(image(), np.eye(4))
    scan.header["srow_x"] = row
    nib.save(scan, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[280:296] = np.array(row, np.float32).tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    with pytest.raises(DataError, match="affine"):
        load(tmp_path / "a.nii")


def test_load_accepts_small_voxels(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.nii", image(), np.diag([1e-3, 1e-3, 1e-3, 1]))).spacing_mm[0] == pytest.approx(1e-3)


def test_load_warns_of_a_header_without_orientation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scan = nib.Nifti1Image(image(), None)
    scan.header.set_zooms((1, 2, 3))
    nib.save(scan, tmp_path / "a.nii")
    assert load(tmp_path / "a.nii").spacing_mm == (1, 2, 3)
    assert "no orientation" in caplog.text


def test_load_rounds_labels(tmp_path: Path) -> None:
    labels = (image() % 4).astype(np.float32).round()
    volume = load(write(tmp_path / "a.nii", labels + np.float32(0.001)), labels=True)
    assert volume.data.dtype == np.int32
    np.testing.assert_array_equal(volume.data, labels)
    with pytest.raises(DataError, match="whole numbers"):
        load(write(tmp_path / "a.nii", image()), labels=True)
    with pytest.raises(DataError, match="at most"):
        load(write(tmp_path / "a.nii", np.full((4, 4, 4), 1e9, np.float32)), labels=True)


# An image and its label


def test_load_labelled(tmp_path: Path) -> None:
    pair = write(tmp_path / "a.nii", image()), write(tmp_path / "b.nii", (image() > 50).astype(np.uint8))
    scan, label = load_labelled(*pair)
    assert scan.data.dtype == np.float32
    assert set(np.unique(label.data)) == {0, 1}


@pytest.mark.parametrize(
    ("label", "shift", "match"),
    [
        (np.zeros((5, 6, 7)), 0, "labels no voxel"),
        (np.ones((5, 6, 7)), 0, "labels every voxel"),
        (image((5, 6, 8)) > 50, 0, "shape"),
        (image() > 50, 0.3, "mm from its image"),
    ],
)
def test_load_labelled_refuses(tmp_path: Path, label: np.ndarray, shift: float, match: str) -> None:
    affine = affine_of(np.eye(3))
    scan = write(tmp_path / "a.nii", image(), affine)
    affine[0, 3] += shift
    with pytest.raises(DataError, match=match):
        load_labelled(scan, write(tmp_path / "b.nii", label.astype(np.uint8), affine))


def test_load_labelled_tolerates_rounding(tmp_path: Path) -> None:
    affine = affine_of(np.eye(3))
    scan = write(tmp_path / "a.nii", image(), affine)
    affine[0, 3] += 0.1
    load_labelled(scan, write(tmp_path / "b.nii", (image() > 50).astype(np.uint8), affine))


# Writing


@pytest.mark.parametrize("name", ["a.nii", "new/a.nii.gz"])
def test_save_and_load_agree(tmp_path: Path, name: str) -> None:
    volume = Volume(image(), affine_of(rotation(20, 0, 5), (1, 2, 3)))
    save(volume, tmp_path / name)
    again = load(tmp_path / name)
    np.testing.assert_array_equal(again.data, volume.data)
    np.testing.assert_allclose(again.affine, volume.affine, atol=1e-5)
    assert [path.name for path in (tmp_path / name).parent.iterdir() if path.is_file()] == [Path(name).name]


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (3, 4), (0, 0)])
def test_save_takes_the_geometry_of_its_source(tmp_path: Path, codes: tuple[int, int]) -> None:
    scan = nib.Nifti1Image((image() * 100).astype(np.int16)[..., None], np.eye(4))
    scan.set_qform(affine_of(rotation(4, 3, 2)), codes[0])
    scan.set_sform(affine_of(rotation(4, 3, 3)), codes[1])
    scan.header.set_xyzt_units("mm", "sec")
    scan.header.set_slope_inter(0.01, -3)
    scan.header["cal_max"] = 99
    nib.save(scan, tmp_path / "a.nii.gz")
    volume = load(tmp_path / "a.nii.gz")
    save(Volume(volume.data > 50, volume.affine), tmp_path / "mask.nii.gz", like=tmp_path / "a.nii.gz")

    source, mask = nib.load(tmp_path / "a.nii.gz"), nib.load(tmp_path / "mask.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    assert mask.shape == (5, 6, 7)
    np.testing.assert_array_equal(mask.affine, source.affine)
    for field in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_z", "xyzt_units"):
        np.testing.assert_array_equal(mask.header[field], source.header[field])
    np.testing.assert_array_equal(mask.header["pixdim"][:4], source.header["pixdim"][:4])
    assert mask.dataobj.slope, mask.dataobj.inter == (1, 0)
    assert mask.header["cal_max"] == 0
    np.testing.assert_array_equal(np.asarray(mask.dataobj), volume.data > 50)


def test_save_places_a_mask_on_an_mgz_image(tmp_path: Path) -> None:
    volume = load(write(tmp_path / "a.mgz", image()))
    save(Volume(volume.data > 50, volume.affine), tmp_path / "m.nii.gz", like=tmp_path / "a.mgz")
    load_labelled(tmp_path / "a.mgz", tmp_path / "m.nii.gz")


def test_save_refuses_what_would_not_come_back(tmp_path: Path) -> None:
    volume = Volume(image().astype(np.int32), np.eye(4))
    with pytest.raises(DataError, match="must end in"):
        save(volume, tmp_path / "a.mgz")
    with pytest.raises(DataError, match="cannot represent"):
        save(Volume(volume.data + 250, volume.affine), tmp_path / "a.nii", dtype=np.uint8)
    with pytest.raises(DataError, match="must be equal"):
        save(volume, tmp_path / "a.nii", like=write(tmp_path / "b.nii", image((4, 4, 4))))
    assert [path.name for path in tmp_path.iterdir()] == ["b.nii"]


def test_save_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii"
    save(Volume(image(), np.eye(4)), path)

    def full(_: object, unfinished: Path) -> None:
        unfinished.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", full)
    with pytest.raises(OSError, match="disk full"):
        save(Volume(image() + 1, np.eye(4)), path)
    np.testing.assert_array_equal(load(path).data, image())
    assert list(tmp_path.iterdir()) == [path]


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

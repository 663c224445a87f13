import gzip
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from onelabel.errors import DataError
from onelabel.imaging import series
from onelabel.imaging.outputs import save
from onelabel.imaging.volume import Volume, load, load_labelled

TILTED = np.array([[1.48, -0.21, 0.13, -7], [0.2, 1.47, 0.26, 11], [-0.16, -0.23, 1.47, 3.5], [0, 0, 0, 1]])


def image(shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return np.random.default_rng(0).uniform(1, 100, shape).astype(np.float32)


def write(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    kind = nib.MGHImage if path.suffix == ".mgz" else nib.Nifti1Image
    nib.save(kind(data, TILTED if affine is None else affine), path)
    return path


# Reading


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz"])
def test_load_keeps_voxels_and_place(tmp_path: Path, name: str) -> None:
    volume = load(write(tmp_path / name, image()))
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data, image())
    np.testing.assert_allclose(volume.affine, TILTED, atol=1e-4)
    np.testing.assert_allclose(volume.spacing_mm, 1.5, rtol=0.01)


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
            for place in generator.integers(*((0, 352) if "nii" in name else (20, 90)), 3):
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
    data[0, 0, 0] = 0
    data[4, 5] = bad
    volume = load(write(tmp_path / "a.nii", data))
    assert not volume.data[4, 5].any()
    assert "10 voxels are not finite" in caplog.text
    data[6, 5, 5] = bad
    with pytest.raises(DataError, match=r"1\.1% voxels that are not finite"):
        load(write(tmp_path / "a.nii", data))


@pytest.mark.parametrize("least", [-5.0, 0.0, 3.0])
def test_regions_without_data_are_background_when_stripping(tmp_path: Path, least: float) -> None:
    """NaN around a round field of view, and in one plane at the edge."""
    data = image((20, 21, 22)) + np.float32(least)
    place = np.indices(data.shape) - np.array([10, 10, 11])[:, None, None, None]
    outside = np.sqrt((place**2).sum(0)) > 9
    outside[0] = True
    data[10, 10, 10] = least - 1
    data[outside] = np.nan
    path = write(tmp_path / "a.nii", data)
    (volume,) = series.read(path)
    assert (volume.data[outside] == max(0, least - 1)).all()
    assert np.array_equal(volume.data[~outside], data[~outside])
    with pytest.raises(DataError, match="not finite"):
        load(path)


def test_load_takes_voxels_beyond_float32_for_bad(tmp_path: Path) -> None:
    data = image().astype(np.float64)
    data[0, 0, :2] = 1e300, 0
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
    affine = TILTED.copy()
    scan = write(tmp_path / "a.nii", image(), affine)
    affine[0, 3] += shift
    with pytest.raises(DataError, match=match):
        load_labelled(scan, write(tmp_path / "b.nii", label.astype(np.uint8), affine))


def test_load_labelled_tolerates_rounding(tmp_path: Path) -> None:
    affine = TILTED.copy()
    scan = write(tmp_path / "a.nii", image(), affine)
    affine[0, 3] += 0.1
    _, label = load_labelled(scan, write(tmp_path / "b.nii", (image() > 50).astype(np.uint8), affine))
    np.testing.assert_array_equal(label.data, image() > 50)


# Writing


@pytest.mark.parametrize("name", ["a.nii", "new/a.nii.gz"])
def test_save_and_load_agree(tmp_path: Path, name: str) -> None:
    volume = Volume(image(), TILTED @ np.diag([1, 2, 3, 1]))
    save(volume, tmp_path / name)
    again = load(tmp_path / name)
    np.testing.assert_array_equal(again.data, volume.data)
    np.testing.assert_allclose(again.affine, volume.affine, atol=1e-5)
    assert [path.name for path in (tmp_path / name).parent.iterdir() if path.is_file()] == [Path(name).name]


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (3, 4), (0, 0)])
def test_save_takes_the_geometry_of_its_source(tmp_path: Path, codes: tuple[int, int]) -> None:
    scan = nib.Nifti1Image((image() * 100).astype(np.int16)[..., None], np.eye(4))
    scan.set_qform(TILTED, codes[0])
    scan.set_sform(TILTED * 1.01, codes[1])
    scan.header.set_xyzt_units("mm", "sec")
    scan.header.set_slope_inter(0.01, -3)
    scan.header["cal_max"] = 99
    nib.save(scan, tmp_path / "a.nii.gz")
    volume = load(tmp_path / "a.nii.gz")
    save(Volume(volume.data > 50, volume.affine), tmp_path / "mask.nii.gz", like=tmp_path / "a.nii.gz")

    source, mask = nib.load(tmp_path / "a.nii.gz"), nib.load(tmp_path / "mask.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    assert mask.shape == (5, 6, 7, 1)
    np.testing.assert_array_equal(mask.affine, source.affine)
    for field in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_z", "xyzt_units"):
        np.testing.assert_array_equal(mask.header[field], source.header[field])
    np.testing.assert_array_equal(mask.header["pixdim"][:4], source.header["pixdim"][:4])
    assert (mask.dataobj.slope, mask.dataobj.inter) == (1, 0)
    assert mask.header["cal_max"] == 0
    np.testing.assert_array_equal(np.asarray(mask.dataobj)[..., 0], volume.data > 50)


def test_save_places_a_mask_on_an_mgz_image(tmp_path: Path) -> None:
    volume = load(write(tmp_path / "a.mgz", image()))
    save(Volume(volume.data > 50, volume.affine), tmp_path / "m.nii.gz", like=tmp_path / "a.mgz")
    _, mask = load_labelled(tmp_path / "a.mgz", tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(mask.data, volume.data > 50)


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

    def full(unfinished: Path, _: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("onelabel.imaging.storage.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        save(Volume(image() + 1, np.eye(4)), path)
    np.testing.assert_array_equal(load(path).data, image())
    assert list(tmp_path.iterdir()) == [path]

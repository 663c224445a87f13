"""What is written beside a scan has the scan's geometry, whatever kind of file the scan is."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from onelabel.errors import DataError
from onelabel.imaging import series
from onelabel.imaging.outputs import save, save_inside
from onelabel.imaging.volume import Volume, load

SHAPE = (5, 6, 7)
TILTED = np.array([[-1.2, 0.3, 0.1, 20], [0.2, 1.4, -0.4, -30], [0, 0.5, 4.8, 12.5], [0, 0, 0, 1]])
GEOMETRY = ("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d")
GEOMETRY += ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")

DTYPES = (np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64)


def values(dtype: type, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Negative ones, and ones that are not finite, where the type has them."""
    data = np.random.default_rng(0).integers(0, 250, shape).astype(dtype)
    if np.dtype(dtype).kind != "u":
        data -= 100
    if np.dtype(dtype).kind == "f":
        data.flat[:2] = np.nan, np.pi
    return data


def nifti(kind: type, *, dtype: type = np.int16, order: str = "<", shape: tuple[int, ...] = SHAPE) -> nib.Nifti1Image:
    """An image of scaled voxels whose qform and sform differ, with units, a text and an extension."""
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    image = kind(values(dtype, shape), None, header)
    image.header.set_qform(TILTED, 1)
    image.header.set_sform(TILTED @ np.diag([1, 1, 1.01, 1]), 4)
    image.header.set_xyzt_units("mm", "sec")
    image.header["scl_slope"], image.header["scl_inter"] = 0.01, -3
    image.header["descrip"], image.header["cal_max"] = b"a scan", 7
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"kept"))
    return image


KINDS: dict[str, tuple[str, Callable[[], nib.spatialimages.SpatialImage]]] = {
    "nifti1": ("a.nii.gz", lambda: nifti(nib.Nifti1Image)),
    "nifti2": ("a.nii", lambda: nifti(nib.Nifti2Image)),
    "pair": ("a.hdr", lambda: nifti(nib.Nifti1Pair)),
    "big-endian": ("a.nii.gz", lambda: nifti(nib.Nifti1Image, order=">")),
    "trailing": ("a.nii.gz", lambda: nifti(nib.Nifti1Image, shape=(*SHAPE, 1))),
    "series": ("a.nii.gz", lambda: nifti(nib.Nifti1Image, shape=(*SHAPE, 3))),
    **{dtype.__name__: ("a.nii.gz", lambda dtype=dtype: nifti(nib.Nifti1Image, dtype=dtype)) for dtype in DTYPES},
}


@pytest.fixture(params=KINDS)
def scan(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name, make = KINDS[request.param]
    nib.save(make(), tmp_path / name)
    return tmp_path / name


def stored(path: Path) -> tuple[nib.Nifti1Header, np.ndarray]:
    image = nib.load(path, mmap=False)
    assert isinstance(image, nib.Nifti1Pair)
    holder = image.file_map.get("header", image.file_map["image"])
    with holder.get_prepare_fileobj("rb") as file:
        header = type(image.header)(file.read(image.header.sizeof_hdr), image.header.endianness, check=False)
    return header, np.asarray(image.dataobj.get_unscaled())


def test_a_masks_geometry_is_that_of_its_scan_byte_by_byte(scan: Path, tmp_path: Path) -> None:
    volume = next(series.read(scan))
    save(Volume(volume.data > 0, volume.affine), tmp_path / "mask.nii.gz", like=scan)
    (theirs, image), (ours, mask) = stored(scan), stored(tmp_path / "mask.nii.gz")
    for field in GEOMETRY:
        assert ours[field].tobytes() == theirs[field].tobytes(), field
    assert isinstance(ours, nib.Nifti2Header) == isinstance(theirs, nib.Nifti2Header)
    assert ours.get_data_shape() == (image.shape if image.size == mask.size else SHAPE)
    assert ours.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.reshape(SHAPE), volume.data > 0)


def test_inside_the_mask_nothing_changes_and_the_header_nowhere(scan: Path, tmp_path: Path) -> None:
    mask = np.random.default_rng(1).random(SHAPE) > 0.5
    save_inside(mask, tmp_path / "brain.nii.gz", like=scan)
    (theirs, image), (ours, brain) = stored(scan), stored(tmp_path / "brain.nii.gz")
    moved = () if scan.suffix != ".hdr" else ("magic", "vox_offset")
    for field in ours.keys():
        assert field in moved or ours[field].tobytes() == theirs[field].tobytes(), field
    assert brain.dtype == image.dtype
    assert brain[mask].tobytes() == image[mask].tobytes()
    outside = load(tmp_path / "brain.nii.gz").data[~mask] if brain.ndim == 3 else brain[~mask] * 0.01 - 3
    assert np.abs(outside).max() < (0.01 if brain.dtype.kind == "f" or brain.dtype.itemsize > 1 else 0.46)
    if scan.suffix != ".hdr":
        assert [part.get_content() for part in nib.load(tmp_path / "brain.nii.gz").header.extensions] == [b"kept"]


def test_a_header_that_readers_mend_is_kept_as_it_is(tmp_path: Path) -> None:
    image = nifti(nib.Nifti1Image)
    nib.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[76:80] = np.float32(0).tobytes()  # pixdim[0], the handedness: 0 is read as 1
    (tmp_path / "a.nii").write_bytes(raw)
    mask = np.ones(SHAPE, bool)
    save_inside(mask, tmp_path / "brain.nii", like=tmp_path / "a.nii")
    assert (tmp_path / "brain.nii").read_bytes() == bytes(raw)
    save(Volume(mask, TILTED), tmp_path / "mask.nii", like=tmp_path / "a.nii")
    assert (tmp_path / "mask.nii").read_bytes()[76:80] == bytes(4)


def test_an_mgz_scan_gets_a_nifti_image_of_its_own_type(tmp_path: Path) -> None:
    data = values(np.int16)
    nib.save(nib.MGHImage(data, TILTED), tmp_path / "a.mgz")
    mask = data > 0
    save_inside(mask, tmp_path / "brain.nii.gz", like=tmp_path / "a.mgz")
    image, brain = nib.load(tmp_path / "a.mgz"), nib.load(tmp_path / "brain.nii.gz")
    assert brain.get_data_dtype() == np.int16
    np.testing.assert_allclose(brain.affine, image.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(brain.dataobj), np.where(mask, data, 0))


def test_the_same_mask_gives_the_same_bytes(scan: Path, tmp_path: Path) -> None:
    volume = Volume(np.ones(SHAPE, bool), TILTED)
    for name in ("a", "b"):
        save(volume, tmp_path / name / "mask.nii.gz", like=scan)
    assert (tmp_path / "a" / "mask.nii.gz").read_bytes() == (tmp_path / "b" / "mask.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in ("a.nii.gz", "a.nii") for shape in (SHAPE, (*SHAPE, 1), (*SHAPE, 4))]
    + [("a.mgz", SHAPE), ("a.mgz", (*SHAPE, 4))],
)
def test_a_series_is_read_as_its_mean_or_one_by_one(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    data = np.random.default_rng(0).random(shape, np.float32)
    kind = nib.MGHImage if name.endswith("mgz") else nib.Nifti1Image
    nib.save(kind(data, TILTED), tmp_path / name)
    frames = data.reshape(*SHAPE, -1)
    (mean,) = series.read(tmp_path / name)
    np.testing.assert_allclose(mean.data, frames.mean(-1), atol=1e-6)
    each = list(series.read(tmp_path / name, each=True))
    np.testing.assert_array_equal(np.stack([volume.data for volume in each], -1), frames)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz"])
def test_the_checksum_of_a_packed_series_counts(tmp_path: Path, name: str, each: bool) -> None:
    kind = nib.MGHImage if name.endswith("mgz") else nib.Nifti1Image
    nib.save(kind(np.random.default_rng(0).random((*SHAPE, 3), np.float32), TILTED), tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    content[-8] ^= 1  # the first byte of the checksum
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"a\.(nii\.gz|mgz) cannot be read to its end"):
        list(series.read(tmp_path / name, each=each))


@pytest.mark.parametrize("kind", [nib.AnalyzeImage, nib.Spm99AnalyzeImage, nib.Spm2AnalyzeImage])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_an_analyze_scan_gets_a_nifti_image_of_its_own_type(tmp_path: Path, kind: type, dtype: str) -> None:
    data = np.random.default_rng(0).uniform(0, 200, SHAPE).astype(dtype)
    nib.save(kind(data, np.diag([2.0, 2, 2, 1])), tmp_path / "a.img")
    mask = data > 90
    save_inside(mask, tmp_path / "brain.nii.gz", like=tmp_path / "a.hdr")
    image, brain = nib.load(tmp_path / "a.hdr"), nib.load(tmp_path / "brain.nii.gz")
    assert brain.get_data_dtype() == data.dtype
    np.testing.assert_allclose(brain.affine, image.affine)
    np.testing.assert_array_equal(np.asarray(brain.dataobj), np.where(mask, data, 0))


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7, 2, 3), (5, 6, 1), (5, 1, 7, 3)])
def test_what_is_no_series_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random(shape, np.float32), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(DataError, match="three axes"):
        list(series.read(tmp_path / "a.nii"))

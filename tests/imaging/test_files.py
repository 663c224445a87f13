import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from onelabel.errors import DataError
from onelabel.imaging import files
from onelabel.imaging.volume import load


def write(path: Path, dtype: str = "int16") -> np.ndarray:
    """Noise, scaled where it is of integers."""
    data = np.random.default_rng(0).uniform(0, 100, (9, 8, 7)).astype(dtype)
    if path.suffix in (".mgz", ".mgh"):
        nib.save(nib.MGHImage(data, np.eye(4)), path)
    else:
        image = nib.Nifti1Image(data, np.eye(4))
        image.header.set_slope_inter(0.5, 3)
        nib.save(image, path)
    return np.asarray(nib.load(path).dataobj, np.float32)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nii.bz2", "a.img", "a.img.gz", "a.mgz"])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_read_gives_what_nibabel_gives(tmp_path: Path, name: str, dtype: str) -> None:
    known = write(tmp_path / name, dtype)
    np.testing.assert_array_equal(files.read(nib.load(tmp_path / name), dtype=np.float32), known)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz"])
def test_a_flipped_bit_of_a_packed_file_is_noticed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, "float32")
    content = bytearray(path.read_bytes())
    for place in range(len(content) - 200, len(content) - 4, 10):
        content[place] ^= 4
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            load(path)
        content[place] ^= 4


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("axis", [1800, 32767])
def test_no_memory_is_taken_for_a_claim(tmp_path: Path, name: str, axis: int) -> None:
    path = tmp_path / name
    write(path)
    content = bytearray(path.read_bytes() if path.suffix == ".nii" else gzip.decompress(path.read_bytes()))
    content[42:48] = np.array([axis] * 3, "<i2").tobytes()
    path.write_bytes(content if path.suffix == ".nii" else gzip.compress(content))
    with pytest.raises(DataError, match="speaks of .* bytes"):
        load(path)


def test_complex_numbers_are_no_image(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.complex64), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match="complex64: only real numbers"):
        load(tmp_path / "a.nii.gz")

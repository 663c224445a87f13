from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import onelabel
from onelabel import strip
from onelabel.configs.schema import ConfidenceRankerConfig
from onelabel.errors import CheckpointError, DataError
from onelabel.imaging.metrics import dice
from onelabel.models import checkpoint, quality
from onelabel.models.rankers.expectation import fit
from onelabel.tasks import strip as stripping

WriteScan = Callable[..., Path]


@pytest.fixture
def scan(write_scan: WriteScan, tmp_path: Path) -> Path:
    return write_scan(tmp_path / "head.nii.gz")


@pytest.fixture
def judging(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint that says what to expect of its masks: a Dice of half the score, which is too low."""
    folder = tmp_path / "judging"
    folder.mkdir()
    for file in trained.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    scores = np.linspace(0, 1, 101)
    quality.save(folder, ConfidenceRankerConfig(), (None,), fit(scores[None], scores / 2), bad=0.9)
    return folder


def test_a_path_an_image_and_an_array_give_the_mask_of_the_command(trained: Path, tmp_path: Path, scan: Path) -> None:
    stripping.strip([str(scan)], out=tmp_path / "out", checkpoint=trained)
    written = np.asarray(nib.load(tmp_path / "out" / "head_mask.nii.gz").dataobj)
    image = nib.load(scan)
    for given in (scan, str(scan), image, (image.get_fdata(), image.affine)):
        found = strip(given, checkpoint=trained)
        assert found.mask.dtype == np.uint8
        np.testing.assert_array_equal(found.mask, written)
        np.testing.assert_array_equal(found.affine, image.affine)
        assert found.volume_ml == pytest.approx(
            np.count_nonzero(written) * abs(np.linalg.det(image.affine)) / 1000, rel=1e-3
        )
        assert (found.score, found.expected_dice, found.flag) == (None, None, False)
    np.testing.assert_array_equal(np.asarray(found.image().dataobj), written)


def test_it_says_how_far_to_trust_the_mask(judging: Path, tmp_path: Path, scan: Path) -> None:
    found = strip(scan, checkpoint=judging)
    assert found.score is not None and found.expected_dice is not None
    assert found.expected_dice == pytest.approx(found.score / 2, abs=0.01)
    assert found.flag
    assert found.flags[0] == "low expected Dice"
    assert strip(scan, checkpoint=judging, trust=False).score is None
    outcome = stripping.strip([str(scan)], out=tmp_path / "out", checkpoint=judging)
    assert (outcome.stripped, outcome.flagged) == (1, 1)
    assert (1, "flagged", "low expected Dice") in outcome.reasons


def test_a_series_has_one_mask_or_many(trained: Path, write_scan: WriteScan, tmp_path: Path) -> None:
    series = write_scan(tmp_path / "bold.nii.gz", shape=(12, 14, 10, 3))
    assert strip(series, checkpoint=trained).mask.shape == (12, 14, 10)
    assert strip(series, checkpoint=trained, each_frame=True).mask.shape == (12, 14, 10, 3)


def test_errors_are_sentences(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        strip(tmp_path / "nothing.nii.gz", checkpoint=trained)
    with pytest.raises(DataError, match="the array has shape"):
        strip((np.zeros((3, 4)), np.eye(4)), checkpoint=trained)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        strip(tmp_path / "nothing.nii.gz", checkpoint=tmp_path)


def test_what_is_not_there_is_an_attribute_error() -> None:
    assert {"strip", "Stripped"} <= set(onelabel.__all__)
    with pytest.raises(AttributeError, match="no attribute 'stripp'"):
        _ = onelabel.stripp  # type: ignore[attr-defined]


def test_without_a_checkpoint_the_own_network_does_it(shared_data: Path) -> None:
    folder = shared_data / "contrasts"
    found = strip(folder / "image" / "nvreg_T1.nii.gz")
    truth = np.asarray(nib.load(folder / "mask" / "nvreg_T1.nii.gz").dataobj)
    assert dice(found.mask, truth) > 0.95
    assert found.expected_dice is not None and found.expected_dice > 0.9
    assert not found.flag


def test_the_own_network_is_small_and_knows_where_it_comes_from() -> None:
    assert sum(file.stat().st_size for file in checkpoint.DEFAULT.rglob("*") if file.is_file()) < 8e6
    meta = checkpoint.load_segmenter(checkpoint.DEFAULT)[1]
    assert meta.step > 0 and meta.manifest_digest and meta.versions["torch"]

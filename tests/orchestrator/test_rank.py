from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from onelabel.errors import ConfigError, DataError, OnelabelError
from onelabel.orchestrator.rank import rank


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A labelled scan, and a folder of masks of which one has a scan."""
    rng = np.random.default_rng(0)
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[3:9, 3:9, 3:9] = 1
    for name in ("masks", "scans"):
        (tmp_path / name).mkdir()
    image = (mask * 100 + rng.normal(0, 5, mask.shape)).astype(np.float32)
    for path, data in (
        ("head.nii.gz", image),
        ("true.nii.gz", mask),
        ("masks/a_mask.nii.gz", mask),
        ("masks/b_mask.nii.gz", mask),
        ("scans/a.nii.gz", image),
    ):
        nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / path)
    return {"image": tmp_path / "head.nii.gz", "mask": tmp_path / "true.nii.gz", "out": tmp_path / "trust.parquet"}


def sentence(source: Path, files: dict[str, Any], **changed: Any) -> str:
    with pytest.raises(OnelabelError) as caught:
        rank(str(source), **(files | changed))
    return str(caught.value)


def test_scans_and_the_network_that_looks_at_them_belong_together(files: dict[str, Any], tmp_path: Path) -> None:
    assert "belong together" in sentence(tmp_path / "masks", files, images=str(tmp_path / "scans"))
    assert "belong together" in sentence(tmp_path / "masks", files, segmenter=tmp_path)


def test_bad_input_is_one_sentence_before_any_work(files: dict[str, Any], tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    assert "must end in .parquet or .csv" in sentence(masks, files, out=tmp_path / "trust.txt")
    scans = {"images": str(tmp_path / "scans"), "segmenter": tmp_path / "nothing"}
    assert "have no scan, for example 'b'" in sentence(masks, files, **scans)
    assert "no checkpoint at" in sentence(masks / "a_mask.nii.gz", files, **scans)
    assert "looks at scans with a network" in sentence(masks, files, settings=["stages.0.ranker={type: consistency}"])
    assert "masks are ranked by looking at them" in sentence(masks, files, settings=["stages.0.ranker={type: random}"])
    assert "leave out data.classes" in sentence(masks, files, settings=["data.classes=[background, a]"])
    assert "true.nii.gz" in sentence(masks, files, mask=tmp_path / "masks" / "true.nii.gz")


def test_errors_are_of_the_kinds_that_the_command_line_knows(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        rank(str(tmp_path / "masks"), **files, settings=["stages.0.rankr=1"])
    with pytest.raises(DataError):
        rank(str(tmp_path / "nothing"), **files)

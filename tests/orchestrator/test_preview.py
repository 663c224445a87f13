from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from onelabel.configs.load import load
from onelabel.errors import DataError
from onelabel.orchestrator.preview import material, preview

SIZE = (24, 28, 20)


def write(path: Path, *, labels: bool = False) -> Path:
    radius = np.linalg.norm((np.indices(SIZE).T / (np.array(SIZE) - 1) - 0.5), axis=-1).T
    noise = np.random.default_rng(0).random(SIZE)
    data = (
        (radius < 0.25).astype(np.uint8) if labels else (np.where(radius < 0.4, 80, 0) + 9 * noise).astype(np.float32)
    )
    nib.save(nib.Nifti1Image(data, np.diag([8.0, 8.0, 8.0, 1.0])), path)
    return path


def test_samples_stand_below_real_scans(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cohort").mkdir()
    labelled = write(tmp_path / "head.nii.gz")
    write(tmp_path / "head_mask.nii.gz", labels=True)
    write(tmp_path / "cohort" / "a.nii.gz")
    (tmp_path / "cohort" / "b.nii.gz").write_bytes(b"not an image")
    config = load(["singlestrip", "smoke", f"data.labelled={labelled}", f"data.unlabelled={tmp_path / 'cohort'}"])
    sheet = preview(config, tmp_path / "out", count=3)
    names = {path.name.removesuffix(".nii.gz") for path in sheet.parent.glob("*.nii.gz")}
    samples = {f"sample-{i:02d}_{kind}" for i in range(3) for kind in ("image", "label")}
    assert names == {"real-00_image", "real-00_label", "real-01_image"} | samples
    assert "'b' is not shown" in caplog.text
    for name in ("real-00", "sample-02"):
        image, label = (nib.load(sheet.parent / f"{name}_{kind}.nii.gz") for kind in ("image", "label"))
        assert image.shape == label.shape == config.grid.size
        assert set(np.unique(label.get_fdata())) == {0, 1}
    first, second = (nib.load(sheet.parent / f"sample-0{i}_image.nii.gz").get_fdata() for i in range(2))
    assert not np.array_equal(first, second)
    assert sheet.stat().st_size > 10_000


def test_material_needs_the_labelled_scan_alone(tmp_path: Path) -> None:
    labelled = write(tmp_path / "head.nii.gz")
    write(tmp_path / "head_mask.nii.gz", labels=True)
    config = load(["singlestrip", "smoke", f"data.labelled={labelled}", f"data.unlabelled={tmp_path / 'nowhere'}"])
    pictures = material(config, count=2)
    names = ["labelled", "bins-fewest", "bins-most", "sample-00", "sample-01"]
    assert [picture.name for picture in pictures] == [f"{name}.png" for name in names]
    assert len({picture.data for picture in pictures}) == len(names)
    labelled.unlink()
    with pytest.raises(DataError):
        material(config, count=2)


def test_several_structures_are_shown_in_their_bins(tmp_path: Path) -> None:
    labelled = write(tmp_path / "head.nii.gz")
    mask = nib.load(write(tmp_path / "head_mask.nii.gz", labels=True))
    label = np.asarray(mask.dataobj).copy()
    label[:12] *= 40
    nib.save(nib.Nifti1Image(label, mask.affine), tmp_path / "head_mask.nii.gz")
    settings = ["data.classes={40: left, 1: right}", "grid.patch=16", "synthesis.deform.flip=0"]
    config = load(["supervised", "smoke", f"data.labelled={labelled}", *settings])
    one, several = (material(c, count=1) for c in (load(["supervised", "smoke", f"data.labelled={labelled}"]), config))
    assert [picture.name for picture in one] == [picture.name for picture in several]
    assert [p.data for p in one if p.name == "bins-most.png"] != [p.data for p in several if p.name == "bins-most.png"]
    sheet = preview(config, tmp_path / "out", count=2)
    sample = nib.load(sheet.parent / "sample-01_label.nii.gz")
    assert sample.shape == (16, 16, 16) and set(np.unique(sample.get_fdata())) <= {0, 1, 2}
    real = nib.load(sheet.parent / "real-00_label.nii.gz").get_fdata()
    assert set(np.unique(real)) == {0, 1, 2}

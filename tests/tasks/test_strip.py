import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from stripped import files, other_network, table

from onelabel.errors import CheckpointError, ClusterError, ConfigError, DataError
from onelabel.imaging.places import HIDDEN
from onelabel.tasks.strip import strip
from onelabel.tasks.strip_record import TABLE
from onelabel.tasks.strip_worker import CUT, SCHEMA, Settings

SHAPE = (12, 14, 10)

Row = dict[str, Any]
WriteScan = Callable[..., Path]


def test_masks_lie_in_the_scans_own_grid(trained: Path, tmp_path: Path, write_scan: WriteScan) -> None:
    scan = write_scan(tmp_path / "head.nii.gz")
    outcome = strip([str(scan)], out=tmp_path / "out", checkpoint=trained)
    assert (outcome.scans, outcome.stripped, outcome.failed, outcome.kept) == (1, 1, 0, 0)
    (row,) = table(tmp_path / "out")
    assert row["error"] is None
    assert row["key"] == "head"
    assert Path(row["mask"]) == tmp_path / "out" / "head_mask.nii.gz"
    image, mask = nib.load(scan), nib.load(row["mask"])
    assert mask.shape == SHAPE
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, image.affine)
    for coded in ("get_qform", "get_sform"):
        (ours, our_code), (theirs, their_code) = getattr(mask, coded)(coded=True), getattr(image, coded)(coded=True)
        np.testing.assert_array_equal(ours, theirs)
        assert our_code == their_code
    voxels = np.asarray(mask.dataobj)
    assert set(np.unique(voxels)) <= {0, 1}
    expected_ml = np.count_nonzero(voxels) * abs(np.linalg.det(mask.affine)) / 1000
    assert row["volume_ml"] == pytest.approx(expected_ml, rel=1e-3)


def test_the_table_says_what_came_of_each_scan(trained: Path, tmp_path: Path, write_scan: WriteScan) -> None:
    scan = write_scan(tmp_path / "head.nii.gz")
    strip([str(scan)], out=tmp_path / "out", checkpoint=trained)
    read = pq.read_table(tmp_path / "out" / TABLE)
    assert read.schema.equals(SCHEMA)
    (row,) = read.to_pylist()
    assert row["grid"] == "12 x 14 x 10, 6 x 7 x 9.09 mm"
    assert row["picture"].startswith(b"\x89PNG")
    assert all(row[f"seconds_{phase}"] >= 0 for phase in ("load", "predict", "trust", "save"))
    assert 50 < row["peak_memory_mb"] < 4000
    assert (row["error_class"], row["score"], row["brain"], row["distance"]) == (None, None, None, None)
    assert row["flag"] == (row["flags"] in ("empty", "full"))


def test_a_broken_file_is_a_row_and_stops_nobody(trained: Path, tmp_path: Path, write_scan: WriteScan) -> None:
    scans = tmp_path / "scans"
    for key in ("a", "d"):
        write_scan(scans / f"{key}.nii.gz")
    (scans / "b.nii.gz").write_bytes(b"not an image")
    write_scan(scans / "c.nii.gz", shape=(*SHAPE, 2, 3))
    outcome = strip([str(scans)], out=tmp_path / "out", checkpoint=trained, settings=Settings(threads=1))
    rows = table(tmp_path / "out")
    assert [row["key"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["error"] is None for row in rows] == [True, False, False, True]
    assert "\n" not in rows[1]["error"]
    assert "three axes" in rows[2]["error"]
    assert [row["error_class"] for row in rows] == [None, "DataError", "DataError", None]
    assert [row["mask"] is None for row in rows] == [False, True, True, False]
    assert (outcome.scans, outcome.stripped, outcome.failed) == (4, 2, 2)
    assert [reason[:2] for reason in outcome.reasons if reason[1] == "failed"] == [(1, "failed"), (1, "failed")]
    assert sorted(files(tmp_path / "out")) == ["a_mask.nii.gz", "d_mask.nii.gz", TABLE]
    assert not (tmp_path / "out" / HIDDEN).exists()


def test_the_same_scan_gives_the_same_mask(trained: Path, tmp_path: Path, write_scan: WriteScan) -> None:
    scan = write_scan(tmp_path / "head.mgz")
    for out in ("one", "two"):
        strip([str(scan)], out=tmp_path / out, checkpoint=trained)
    one, two = ((tmp_path / out / "head_mask.nii.gz").read_bytes() for out in ("one", "two"))
    assert one == two


def test_images_and_distances_are_written_on_request(trained: Path, tmp_path: Path, write_scan: WriteScan) -> None:
    scan = write_scan(tmp_path / "head.nii.gz", dtype=np.int16)
    strip([str(scan)], out=tmp_path / "out", checkpoint=trained, image=True, distance=True)
    (row,) = table(tmp_path / "out")
    image, mask, brain, distance = (
        np.asarray(nib.load(row[name]).dataobj) for name in ("image", "mask", "brain", "distance")
    )
    np.testing.assert_array_equal(brain, np.where(mask, image, 0))
    np.testing.assert_array_equal(distance < 0, mask > 0)
    assert nib.load(row["brain"]).get_data_dtype() == np.int16
    np.testing.assert_array_equal(nib.load(row["distance"]).affine, nib.load(scan).affine)


def test_a_border_moves_the_edge(trained: Path, tmp_path: Path, write_scan: WriteScan) -> None:
    scan, volumes_ml = write_scan(tmp_path / "head.nii.gz"), []
    for border_mm in (-7.0, 0.0, 10.0):
        out = tmp_path / str(border_mm)
        strip([str(scan)], out=out, checkpoint=trained, settings=Settings(border_mm=border_mm))
        volumes_ml.append(table(out)[0]["volume_ml"])
    assert volumes_ml == sorted(set(volumes_ml))


@pytest.mark.parametrize("each_frame", [False, True])
def test_a_series_gets_one_mask_or_one_a_volume(
    trained: Path, tmp_path: Path, write_scan: WriteScan, each_frame: bool
) -> None:
    scan = write_scan(tmp_path / "bold.nii.gz", shape=(*SHAPE, 3))
    settings = Settings(each_frame=each_frame)
    strip([str(scan)], out=tmp_path / "out", checkpoint=trained, settings=settings, image=True, distance=True)
    (row,) = table(tmp_path / "out")
    assert row["error"] is None
    mask, brain = (np.asarray(nib.load(row[name]).dataobj) for name in ("mask", "brain"))
    assert mask.shape == ((*SHAPE, 3) if each_frame else SHAPE)
    assert nib.load(row["distance"]).shape == mask.shape
    inside = mask if each_frame else mask[..., None]
    np.testing.assert_array_equal(brain, np.where(inside, np.asarray(nib.load(scan).dataobj), 0))
    if each_frame:
        single, image = tmp_path / "one.nii.gz", nib.load(scan)
        nib.save(image.slicer[..., 1], single)
        strip([str(single)], out=tmp_path / "single", checkpoint=trained)
        np.testing.assert_array_equal(mask[..., 1], np.asarray(nib.load(table(tmp_path / "single")[0]["mask"]).dataobj))


def test_a_bids_dataset_gets_derivatives(trained: Path, tmp_path: Path, write_scan: WriteScan) -> None:
    raw = tmp_path / "raw"
    for name in ("sub-1/ses-a/anat/sub-1_ses-a_T1w", "sub-1/ses-a/anat/sub-1_ses-a_T2w", "sub-2/anat/sub-2_T1w"):
        write_scan(raw / f"{name}.nii.gz")
    (raw / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    out = raw / "derivatives" / "onelabel"
    strip([str(raw)], out=out, checkpoint=trained, image=True)
    assert sorted(name for name in files(out) if "sub-1" in name) == [
        "sub-1/ses-a/anat/sub-1_ses-a_desc-brain_T1w.json",
        "sub-1/ses-a/anat/sub-1_ses-a_desc-brain_T1w.nii.gz",
        "sub-1/ses-a/anat/sub-1_ses-a_desc-brain_T2w.json",
        "sub-1/ses-a/anat/sub-1_ses-a_desc-brain_T2w.nii.gz",
        "sub-1/ses-a/anat/sub-1_ses-a_desc-brain_mask.json",
        "sub-1/ses-a/anat/sub-1_ses-a_desc-brain_mask.nii.gz",
        "sub-1/ses-a/anat/sub-1_ses-a_mod-T2w_desc-brain_mask.json",
        "sub-1/ses-a/anat/sub-1_ses-a_mod-T2w_desc-brain_mask.nii.gz",
    ]
    described = json.loads((out / "dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative"
    assert described["GeneratedBy"][0]["Name"] == "onelabel"
    facts = json.loads((out / "sub-2/anat/sub-2_desc-brain_mask.json").read_text())
    assert facts["Type"] == "Brain"
    assert facts["Sources"] == ["bids:raw:sub-2/anat/sub-2_T1w.nii.gz"]
    assert json.loads((out / "sub-2/anat/sub-2_desc-brain_T1w.json").read_text())["SkullStripped"] is True
    assert strip([str(raw)], out=out, checkpoint=trained, image=True).kept == 3


# What cannot work fails at the start


def test_what_cannot_work_fails_at_the_start(trained: Path, tmp_path: Path, write_scan: WriteScan) -> None:
    scan = str(write_scan(tmp_path / "head.nii.gz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="folder without images"):
        strip([str(tmp_path / "empty")], out=tmp_path / "out", checkpoint=trained)
    with pytest.raises(DataError, match="not writable"):
        strip([scan], out=Path(scan) / "out", checkpoint=trained)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        strip([scan], out=tmp_path / "out", checkpoint=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "grid", [{}, {"spacing_mm": [8, 8, 8]}, {"spacing_mm": [8, 8, 8], "size": [15, 16, 16]}, {"size": 3}]
)
def test_a_grid_that_does_not_fit_the_network_is_named(
    trained: Path, tmp_path: Path, write_scan: WriteScan, grid: dict[str, Any]
) -> None:
    broken = other_network(tmp_path / "broken", trained)
    facts = json.loads((broken / "meta.json").read_text())
    (broken / "meta.json").write_text(json.dumps(facts | {"grid": grid}))
    scan = str(write_scan(tmp_path / "head.nii.gz"))
    with pytest.raises(CheckpointError, match="has a grid .* that its network cannot use"):
        strip([scan], out=tmp_path / "out", checkpoint=broken)


def test_a_mask_that_the_networks_view_cuts_off_is_flagged(
    trained: Path, tmp_path: Path, write_scan: WriteScan
) -> None:
    for name, shape in (("whole", (12, 14, 10)), ("beyond", (60, 60, 60))):
        write_scan(tmp_path / "in" / f"{name}.nii.gz", shape=shape)
    strip([str(tmp_path / "in")], out=tmp_path / "out", checkpoint=trained)
    beyond, whole = table(tmp_path / "out")
    assert CUT in beyond["flags"] and beyond["flag"]
    assert CUT not in whole["flags"]


@pytest.mark.parametrize("border", [float("nan"), float("inf")])
def test_a_border_is_a_length(border: float) -> None:
    with pytest.raises(ConfigError, match="is no length"):
        Settings(border_mm=border)


def test_a_missing_gpu_is_named(
    trained: Path, tmp_path: Path, write_scan: WriteScan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    scan = str(write_scan(tmp_path / "head.nii.gz"))
    with pytest.raises(ClusterError, match="no CUDA device"):
        strip([scan], out=tmp_path / "out", checkpoint=trained, settings=Settings(device="cuda"))

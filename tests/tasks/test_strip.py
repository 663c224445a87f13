import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest

from onelabel.errors import CheckpointError, ClusterError, DataError
from onelabel.imaging.places import HIDDEN, Folder
from onelabel.tasks import strip_record, strip_worker
from onelabel.tasks.strip import in_process, strip
from onelabel.tasks.strip_plan import Job
from onelabel.tasks.strip_record import TABLE, Outcome
from onelabel.tasks.strip_worker import SCHEMA, Settings

SHAPE = (12, 14, 10)

Row = dict[str, Any]
WriteScan = Callable[..., Path]


def table(out: Path) -> list[Row]:
    """The rows of the table, by key."""
    return sorted(pq.read_table(out / TABLE).to_pylist(), key=lambda row: str(row["key"]))


def files(folder: Path) -> dict[str, int]:
    """All files with the time of their last change."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


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


# Going on


@pytest.fixture
def scans(tmp_path: Path, write_scan: WriteScan) -> Path:
    for number in range(5):
        write_scan(tmp_path / "scans" / f"{number}.nii.gz", seed=number)
    return tmp_path / "scans"


def test_the_same_command_does_only_what_is_missing(trained: Path, tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    (scans / "3.nii.gz").rename(tmp_path / "away")
    (scans / "3.nii.gz").write_bytes(b"broken")
    assert strip([str(scans)], out=out, checkpoint=trained).failed == 1
    before = files(out)
    (out / "1_mask.nii.gz").unlink()
    (tmp_path / "away").replace(scans / "3.nii.gz")
    os.utime(scans / "0.nii.gz")
    outcome = strip([str(scans)], out=out, checkpoint=trained)
    assert (outcome.scans, outcome.stripped, outcome.failed, outcome.kept) == (5, 5, 0, 2)
    after = files(out)
    assert {name for name in after if after[name] != before.get(name)} == {
        *(f"{number}_mask.nii.gz" for number in (0, 1, 3)),
        TABLE,
    }
    assert [row["key"] for row in table(out)] == list("01234")
    assert strip([str(scans)], out=out, checkpoint=trained).kept == 5


def test_a_folder_lists_all_that_was_stripped_into_it(trained: Path, tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    (scans / "0.nii.gz").write_bytes(b"broken")
    strip([str(scans / "0.nii.gz"), str(scans / "1.nii.gz")], out=out, checkpoint=trained)
    outcome = strip([str(scans / "2.nii.gz")], out=out, checkpoint=trained)
    assert (outcome.scans, outcome.stripped, outcome.kept) == (1, 1, 0)
    assert [row["key"] for row in table(out)] == ["1", "2"]  # what failed, and was not asked for again, is forgotten


def other_network(folder: Path, trained: Path) -> Path:
    folder.mkdir()
    for file in trained.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    facts = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(facts | {"seed": 1}))
    return folder


def test_masks_made_in_another_way_are_not_mixed(trained: Path, tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    strip([str(scans)], out=out, checkpoint=trained)
    before = files(out)
    with pytest.raises(DataError, match="made with border 0.0, not 2.0: give another output folder, or --overwrite"):
        strip([str(scans)], out=out, checkpoint=trained, settings=Settings(border_mm=2.0))
    other = other_network(tmp_path / "other", trained)
    with pytest.raises(DataError, match="made with checkpoint"):
        strip([str(scans)], out=out, checkpoint=other)
    assert files(out) == before
    outcome = strip([str(scans)], out=out, checkpoint=other, overwrite=True)
    assert (outcome.stripped, outcome.kept) == (5, 0)
    assert strip([str(scans)], out=out, checkpoint=other).kept == 5


def test_a_table_of_another_program_is_not_touched(trained: Path, tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pq.write_table(pq.ParquetFile(_some_table(tmp_path)).read(), out / TABLE)
    with pytest.raises(DataError, match="another program"):
        strip([str(scans)], out=out, checkpoint=trained)
    assert list(files(out)) == [TABLE]


def _some_table(folder: Path) -> Path:
    import pyarrow as pa

    pq.write_table(pa.table({"key": ["a"]}), folder / "some.parquet")
    return folder / "some.parquet"


def interrupted(after: int) -> Any:
    """Strips so many scans and is cut off."""

    def spread(jobs: Sequence[Job], checkpoint: Path, settings: Settings, out: Folder) -> Iterator[Row]:
        for number, row in enumerate(in_process(jobs, checkpoint, settings, out)):
            if number == after:
                raise KeyboardInterrupt
            yield row

    return spread


def test_what_was_done_before_an_interrupt_is_kept(trained: Path, tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        strip([str(scans)], out=out, checkpoint=trained, spread=interrupted(3))
    assert not (out / TABLE).exists()
    leftover = out / HIDDEN / "unfinished" / "x" / "half_mask.nii.gz"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    outcome = strip([str(scans)], out=out, checkpoint=trained)
    assert (outcome.stripped, outcome.kept) == (5, 3)
    assert not (out / HIDDEN).exists()


def test_parts_are_joined_in_any_number(
    trained: Path, tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strip_record, "PART_ROWS", 2)
    monkeypatch.setattr(strip_record, "EVERY_S", 0)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        strip([str(scans)], out=out, checkpoint=trained, spread=interrupted(3))
    assert len(list((out / HIDDEN).glob("part-*"))) == 2
    assert strip([str(scans)], out=out, checkpoint=trained).kept == 3
    assert [row["key"] for row in table(out)] == list("01234")


def test_two_commands_do_not_write_to_one_folder(trained: Path, tmp_path: Path, scans: Path) -> None:
    began, go_on = threading.Event(), threading.Event()

    def waiting(*job: Any) -> Iterator[Row]:
        began.set()
        go_on.wait(60)
        yield from in_process(*job)

    first: list[Outcome] = []
    options: dict[str, Any] = {"out": tmp_path / "out", "checkpoint": trained}
    other = threading.Thread(target=lambda: first.append(strip([str(scans)], spread=waiting, **options)))
    other.start()
    try:
        assert began.wait(60)
        with pytest.raises(DataError, match="another onelabel strip writes to"):
            strip([str(scans)], **options)
    finally:
        go_on.set()
        other.join()
    assert first[0].stripped == 5


# Faults


class Failing:
    """Saves a mask, but for the first calls, which fail."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0
        self.save = strip_worker.outputs.save

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        self.save(*arguments, **options)


@pytest.mark.parametrize(
    ("error", "times", "calls"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), 1, 2),
        (ConnectionResetError(104, "Connection reset by peer"), 2, 2),
        (OSError(5, "Input/output error"), 1, 2),
        (OSError(28, "No space left on device"), 1, 1),
        (PermissionError(13, "Permission denied"), 1, 1),
        (DataError("damaged"), 1, 1),
        (IndexError("a bug of a library"), 1, 1),
    ],
)
def test_what_can_pass_is_tried_once_more(
    trained: Path,
    tmp_path: Path,
    write_scan: WriteScan,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    times: int,
    calls: int,
) -> None:
    failing = Failing(error, times)
    monkeypatch.setattr(strip_worker.outputs, "save", failing)
    monkeypatch.setattr(strip_worker, "WAIT_S", 0)
    strip([str(write_scan(tmp_path / "head.nii.gz"))], out=tmp_path / "out", checkpoint=trained)
    assert failing.calls == calls
    (row,) = table(tmp_path / "out")
    if times < calls:
        assert row["error"] is None
    else:
        assert row["error_class"] == type(error).__name__
        assert str(error) in row["error"]
        assert list(files(tmp_path / "out")) == [TABLE]


def test_a_full_disk_ends_as_a_sentence_and_is_gone_on_from(
    trained: Path, tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write, rows = strip_record.Record._write, []

    def full(self: strip_record.Record, part: list[Row]) -> None:
        rows.append(len(part))
        if len(rows) == 3:
            raise OSError(28, "No space left on device")
        write(self, part)

    monkeypatch.setattr(strip_record, "EVERY_S", 0)
    with monkeypatch.context() as patched:
        patched.setattr(strip_record.Record, "_write", full)
        with pytest.raises(DataError, match="No space left on device"):
            strip([str(scans)], out=out, checkpoint=trained)
    outcome = strip([str(scans)], out=out, checkpoint=trained)
    assert outcome.kept >= 2
    assert outcome.stripped == 5


def test_memory_does_not_grow_with_the_cohort(tmp_path: Path) -> None:
    record = strip_record.Record(Folder(str(tmp_path)), {})
    blank = dict.fromkeys(SCHEMA.names)
    picture = os.urandom(10_000)
    for number in range(300):
        record.add(blank | {"key": str(number), "image": f"/{number}", "picture": picture})
        assert len(record._rows) < strip_record.PART_ROWS
    outcome = record.finish([Job(str(number), f"/{number}", "") for number in range(300)])
    record.close()
    assert outcome.scans == 300


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


def test_a_missing_gpu_is_named(
    trained: Path, tmp_path: Path, write_scan: WriteScan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    scan = str(write_scan(tmp_path / "head.nii.gz"))
    with pytest.raises(ClusterError, match="no CUDA device"):
        strip([scan], out=tmp_path / "out", checkpoint=trained, settings=Settings(device="cuda"))

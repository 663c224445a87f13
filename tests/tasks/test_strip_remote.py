"""Scans and results in an object store: an S3 server on this machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from onelabel.errors import DataError
from onelabel.imaging import places
from onelabel.orchestrator import qc
from onelabel.orchestrator.strip import strip as strip_with_page
from onelabel.tasks import strip_worker
from onelabel.tasks.remote import find
from onelabel.tasks.strip import strip
from onelabel.tasks.strip_record import TABLE

WriteScan = Callable[..., Path]
Store = fs.FileSystem


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own for what is fetched."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.fixture
def put(bucket: Store, write_scan: WriteScan, tmp_path: Path) -> Callable[..., None]:
    """Puts scans, or text, into the bucket."""

    def write(name: str, text: str | None = None) -> None:
        if text is None:
            file = write_scan(tmp_path / "put" / Path(name).name, seed=len(name))
            data = file.read_bytes()
        else:
            data = text.encode()
        with bucket.open_output_stream(name, compression=None) as stream:
            stream.write(data)

    return write


def names(bucket: Store, folder: str) -> list[str]:
    listed = bucket.get_file_info(fs.FileSelector(folder, recursive=True))
    return sorted(info.path.removeprefix(f"{folder}/") for info in listed if info.type == fs.FileType.File)


def rows(bucket: Store, folder: str) -> list[dict[str, Any]]:
    return sorted(
        pq.read_table(bucket.open_input_file(f"{folder}/{TABLE}")).to_pylist(), key=lambda row: str(row["key"])
    )


def test_a_folder_becomes_a_folder_and_the_same_command_goes_on(
    bucket: Store, put: Callable[..., None], trained: Path, tmp_path: Path
) -> None:
    for name in ("a", "deep/b", "c_mask"):
        put(f"in/{name}.nii.gz")
    put("in/d.nii.gz", "broken")
    options: dict[str, Any] = {"out": "s3://heads/out/", "checkpoint": trained, "image": True}
    outcome = strip(["s3://heads/in"], **options)
    assert (outcome.scans, outcome.stripped, outcome.failed) == (3, 2, 1)
    assert outcome.table == f"s3://heads/out/{TABLE}"
    results = ["a_brain.nii.gz", "a_mask.nii.gz", "deep/b_brain.nii.gz", "deep/b_mask.nii.gz"]
    assert names(bucket, "out") == [*results, TABLE]
    first, second, third = rows(bucket, "out")
    assert (first["image"], first["mask"]) == ("s3://heads/in/a.nii.gz", "s3://heads/out/a_mask.nii.gz")
    assert third["error_class"] == "DataError"
    assert third["error"].startswith("s3://heads/in/d.nii.gz cannot be read")
    assert second["key"] == "b"

    bucket.delete_file("out/a_mask.nii.gz")
    put("in/d.nii.gz")
    again = strip(["s3://heads/in"], **options)
    assert (again.stripped, again.failed, again.kept) == (3, 0, 1)
    assert not list((tmp_path / "tmp").rglob("*.nii*"))


def test_names_may_hold_what_has_a_meaning_in_uris(bucket: Store, put: Callable[..., None], trained: Path) -> None:
    stems = ["a head", "50% off", "Köpfe", "what?", "no#1", "a+b&c=d"]
    for stem in stems:
        put(f"my scans/{stem}.nii.gz")
    outcome = strip(["s3://heads/my scans"], out="s3://heads/my masks", checkpoint=trained)
    assert (outcome.stripped, outcome.failed) == (6, 0)
    assert names(bucket, "my masks") == sorted([*(f"{stem}_mask.nii.gz" for stem in stems), TABLE])
    assert {row["key"] for row in rows(bucket, "my masks")} == set(stems)
    assert strip(["s3://heads/my%20scans"], out="s3://heads/my%20masks", checkpoint=trained).kept == 6


def test_the_masks_are_those_of_local_files(
    bucket: Store, put: Callable[..., None], trained: Path, tmp_path: Path
) -> None:
    put("in/a.nii.gz")
    strip(["s3://heads/in/a.nii.gz"], out=tmp_path / "out", checkpoint=trained)
    strip([str(tmp_path / "put" / "a.nii.gz")], out="s3://heads/out", checkpoint=trained)
    with bucket.open_input_file("out/a_mask.nii.gz") as stream:
        assert stream.read() == (tmp_path / "out" / "a_mask.nii.gz").read_bytes()


def test_the_quality_page_lies_beside_the_table(bucket: Store, put: Callable[..., None], trained: Path) -> None:
    for name in "ab":
        put(f"in/{name}.nii.gz")
    strip_with_page(["s3://heads/in"], out="s3://heads/out", checkpoint=trained, workers=1)
    assert names(bucket, "out") == ["a_mask.nii.gz", "b_mask.nii.gz", qc.NAME, TABLE]
    with bucket.open_input_file(f"out/{qc.NAME}") as stream:
        page = stream.read().decode()
    assert "Masks in out" in page and page.count("<article") == 2


def test_a_bids_dataset_a_glob_a_manifest_and_a_pair(
    bucket: Store, put: Callable[..., None], trained: Path, tmp_path: Path
) -> None:
    for name in ("sub-1/anat/sub-1_T1w", "sub-1/anat/sub-1_T2w", "sub-2/func/sub-2_task-x_bold"):
        put(f"raw/{name}.nii.gz")
    put("raw/dataset_description.json", "{}")
    put("scans.csv", "key,image,site\nx,raw/sub-1/anat/sub-1_T1w.nii.gz,a\ny,s3://heads/elsewhere.nii.gz,b\n")
    raw = "s3://heads/raw"
    assert [row["suffix"] for row in find(raw)] == ["T1w", "T2w"]
    assert [row["suffix"] for row in find(raw, where={"suffix": ["bold"]})] == ["bold"]
    assert len(find("s3://heads/raw/*/anat/*_T*w.nii.gz")) == 2
    assert len(find("s3://heads/**/*.nii.gz")) == 3
    assert [row["image"] for row in find("s3://heads/scans.csv")] == [
        "s3://heads/raw/sub-1/anat/sub-1_T1w.nii.gz",
        "s3://heads/elsewhere.nii.gz",
    ]
    assert [row["key"] for row in find("s3://heads/scans.csv", where={"site": "b"})] == ["y"]

    strip([raw], out="s3://heads/raw/derivatives/onelabel", checkpoint=trained, where={"suffix": "T1w"})
    found = names(bucket, "raw/derivatives/onelabel")
    assert found == [
        "dataset_description.json",
        TABLE,
        "sub-1/anat/sub-1_desc-brain_mask.json",
        "sub-1/anat/sub-1_desc-brain_mask.nii.gz",
    ]
    with bucket.open_input_file("raw/derivatives/onelabel/sub-1/anat/sub-1_desc-brain_mask.json") as stream:
        assert json.loads(stream.read())["Sources"] == ["bids:raw:sub-1/anat/sub-1_T1w.nii.gz"]

    nib.save(nib.Nifti1Pair(np.random.default_rng(0).random((9, 9, 9), np.float32), np.eye(4)), tmp_path / "p.hdr")
    for ending in ("hdr", "img"):
        with bucket.open_output_stream(f"pair/p.{ending}") as stream:
            stream.write((tmp_path / f"p.{ending}").read_bytes())
    assert strip(["s3://heads/pair"], out=tmp_path / "pair", checkpoint=trained).stripped == 1


def test_what_is_not_there_is_named_before_any_work(
    bucket: Store, put: Callable[..., None], trained: Path, tmp_path: Path
) -> None:
    put("in/a.nii.gz")
    for source, problem in [
        ("s3://heads/nothing", "names no image"),
        ("s3://no-such-bucket/x", "no-such-bucket"),
        ("s4://heads/in", "cannot be opened"),
    ]:
        with pytest.raises(DataError, match=problem):
            strip([source], out=tmp_path / "out", checkpoint=trained)
    with pytest.raises(DataError, match="lies inside the input"):
        strip(["s3://heads/in"], out="s3://heads/in/out", checkpoint=trained)
    with pytest.raises(DataError, match="not writable"):
        strip(["s3://heads/in"], out="s3://no-such-bucket/out", checkpoint=trained)
    assert names(bucket, "in") == ["a.nii.gz"]


def test_a_connection_that_breaks_is_tried_once_more(
    bucket: Store, put: Callable[..., None], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("in/a.nii.gz")
    calls, copy = [], fs.copy_files

    def breaking(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")
        copy(*arguments)

    monkeypatch.setattr(places.fs, "copy_files", breaking)
    monkeypatch.setattr(strip_worker, "WAIT_S", 0)
    assert strip(["s3://heads/in"], out=tmp_path / "out", checkpoint=trained).stripped == 1
    assert len(calls) == 2

"""Paths of disks and of an object store: what holds for one holds for the other."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onelabel.errors import DataError, StorageError
from onelabel.imaging import outputs, places, storage, volume
from onelabel.imaging.storage import AnyPath, StorePath, path_of
from onelabel.imaging.volume import Volume


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> AnyPath:
    """A folder that is not there yet."""
    if request.param == "disk":
        return tmp_path / "runs" / "study"
    request.getfixturevalue("bucket")
    return path_of("s3://heads/runs/study")


def names(folder: AnyPath, pattern: str = "*") -> list[str]:
    found: Any = folder.glob(pattern)
    return sorted(str(path).removeprefix(f"{folder}/") for path in found)


def test_parts_of_a_path(folder: AnyPath) -> None:
    path = folder / "round-00" / "scores.parquet"
    assert (path.name, path.suffix, path.parent.name) == ("scores.parquet", ".parquet", "round-00")
    assert path.parent.parent == folder and path == folder / "round-00/scores.parquet"
    assert path_of(str(path)) == path and pickle.loads(pickle.dumps(path)) == path
    assert path.resolve() == path.absolute() == path and path.is_absolute()


def test_what_is_there(folder: AnyPath) -> None:
    path = folder / "round-00" / "done"
    assert not (path.exists() or path.is_file() or folder.exists() or folder.is_dir() or names(folder))
    storage.write_text(path, "yés")
    assert path.read_text(encoding="utf-8") == "yés" and path.read_bytes() == "yés".encode()
    assert path.is_file() and folder.is_dir() and not folder.is_file() and not path.is_dir()
    storage.write_text(folder / "round-01" / "done", "")
    storage.write_text(folder / "other" / "done", "")
    assert names(folder) == ["other", "round-00", "round-01"]
    assert names(folder, "round-*/done") == ["round-00/done", "round-01/done"] == names(folder, "round-*/d*")
    assert [each.name for each in sorted(folder.iterdir(), key=str)] == names(folder)
    path.unlink()
    path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        path.read_bytes()
    storage.remove(folder)
    storage.remove(folder)
    assert not names(folder)


def test_a_file_appears_as_a_whole_or_not_at_all(folder: AnyPath) -> None:
    path = folder / "table.parquet"
    with pytest.raises(ZeroDivisionError), storage.writing(path) as file:
        assert file.suffix == ".parquet"
        file.write_bytes(b"half")
        raise ZeroDivisionError
    assert not path.exists() and not names(folder)
    for content in (b"first", b"second"):
        with storage.writing(path) as file:
            file.write_bytes(content)
        assert path.read_bytes() == content and names(folder) == ["table.parquet"]


def test_a_folder_appears_as_a_whole_or_not_at_all(folder: AnyPath, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded, upload = [], StorePath.upload
    monkeypatch.setattr(StorePath, "upload", lambda path, file: [uploaded.append(path.name), upload(path, file)])
    for content in ("old", "new"):
        with storage.building(folder, last="meta.json") as unfinished:
            (unfinished / "meta.json").write_text(content)
            (unfinished / "deep").mkdir()
            (unfinished / "deep" / f"{content}.pt").write_text(content)
            assert not (folder / "deep" / f"{content}.pt").exists()
    assert names(folder, "*") == ["deep", "meta.json"] and names(folder, "deep/*") == ["deep/new.pt"]
    assert uploaded in ([], ["old.pt", "meta.json", "new.pt", "meta.json"])
    with storage.local(folder) as here:
        assert (here / "deep" / "new.pt").read_text() == "new"
    with storage.local(folder / "meta.json") as file:
        assert file.read_text() == "new"


def test_an_image_is_written_and_read(folder: AnyPath, tmp_path: Path) -> None:
    data, like = np.arange(60, dtype=np.float32).reshape(3, 4, 5), tmp_path / "like.nii.gz"
    outputs.save(Volume(data, np.diag([2.0, 3, 4, 1])), like)
    outputs.save(Volume(data > 30, np.diag([2.0, 3, 4, 1])), folder / "mask.nii.gz", like=like)
    outputs.save(Volume(data, np.eye(4)), folder / "image.nii.gz", like=str(folder / "mask.nii.gz"))
    found = volume.load(str(folder / "image.nii.gz"))
    assert np.array_equal(found.data, data) and found.spacing_mm == (2, 3, 4)
    assert volume.load(folder / "mask.nii.gz", labels=True).data.sum() == 29
    missing = folder / "none.nii.gz"
    with pytest.raises(DataError, match=f"{missing} does not exist"):
        volume.load(missing)


def test_a_query_stays_at_the_end() -> None:
    path = path_of("s3://heads/runs/?region=oslo")
    assert str(path / "a" / "b.txt") == "s3://heads/runs/a/b.txt?region=oslo"
    assert str((path / "a").parent.parent) == "s3://heads?region=oslo"


def test_what_has_a_meaning_in_uris_is_escaped() -> None:
    path = path_of("s3://heads/my runs?region=oslo") / "a#1 ü?%20.nii"
    assert str(path) == "s3://heads/my%20runs/a%231%20%C3%BC%3F%2520.nii?region=oslo"
    assert path_of(str(path)) == path
    assert places.path_in(str(path)) == "heads/my runs/a#1 ü?%20.nii"
    assert places.filesystem(str(path))[1] == places.path_in(str(path))


def test_a_password_is_refused() -> None:
    with pytest.raises(DataError, match="password") as caught:
        path_of("s3://key:secret@heads/runs")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("s3://no-such-bucket/runs", "NO_SUCH_BUCKET"),
        ("s3://heads/runs?endpoint_override=127.0.0.1:9&scheme=http&region=oslo", "NETWORK_CONNECTION"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_sentence(bucket: object, place: str, problem: str) -> None:
    path = path_of(place)
    with pytest.raises(StorageError, match=problem) as caught:
        storage.write_text(path / "probe", "")
    assert "\n" not in str(caught.value) and "check the bucket, the credentials" in str(caught.value)


def test_a_disk_that_is_full_is_not_the_stores_fault(bucket: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("pyarrow.fs.copy_files", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_text(path_of("s3://heads/x"), "")

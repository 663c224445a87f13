"""Cohorts at URIs are those of the same files on a disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs

from onelabel.errors import DataError
from onelabel.orchestrator.evaluate import masks
from onelabel.tasks.cohort import Cohort, open_cohort

FILES = ("b/x.nii.gz", "b/x_mask.nii.gz", "c/x.nii.gz", "c/.hidden.nii.gz", "y.mgz", "y_seg.nii", "notes.txt")
TWINS = ("images/p/x.nii.gz", "images/y.nii.gz", "masks/p/x.nii.gz")
TABLE = "image,mask,site\nb/x.nii.gz,b/x_mask.nii.gz,oslo\nc/x.nii.gz,,bern\n"


@pytest.fixture
def both(bucket: fs.FileSystem, tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Makes files in a folder and in the bucket; where each is."""

    def make(*names: str, text: str = "") -> tuple[Path, str]:
        for name in names:
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_text(text)
            with bucket.open_output_stream(f"in/{name}", compression=None) as stream:
                stream.write(text.encode())
        return tmp_path / "in", "s3://heads/in"

    return make


def there(cohort: Cohort, folder: Path) -> list[dict[str, object]]:
    """Rows as if the folder were in the bucket."""
    rows = cohort.rows()
    return [
        row | {name: row[name] and row[name].replace(str(folder), "s3://heads/in") for name in ("image", "label")}
        for row in rows
    ]


@pytest.mark.parametrize("files", [FILES, TWINS])
@pytest.mark.parametrize("inside", ["", "/b", "/**/x.nii.gz", "/b/x.nii.gz", "/images"])
def test_folders_globs_and_files(both: Callable[..., tuple[Path, str]], files: tuple[str, ...], inside: str) -> None:
    folder, uri = both(*files)
    if not any(folder.glob(inside[1:] or "*")):
        pytest.skip("nothing there")
    here, remote = open_cohort(f"{folder}{inside}"), open_cohort(f"{uri}{inside}")
    assert sorted(remote.rows(), key=str) == sorted(there(here, folder), key=str)


def test_a_manifest(both: Callable[..., tuple[Path, str]]) -> None:
    folder, uri = both(*FILES)
    both("scans.csv", text=TABLE)
    for where in (None, {"site": "oslo"}):
        here, remote = open_cohort(folder / "scans.csv", where=where), open_cohort(f"{uri}/scans.csv", where=where)
        assert remote.rows() == there(here, folder)
    assert [row["key"] for row in open_cohort(f"{uri}/scans.csv").rows()] == ["b_x", "c_x"]
    only = open_cohort(f"{uri}/scans.csv", where={"site": "oslo"}, require_labels=True)
    assert only.rows()[0]["label"] == f"{uri}/b/x_mask.nii.gz"


def test_a_manifest_on_a_disk_names_files_elsewhere(both: Callable[..., tuple[Path, str]]) -> None:
    folder, uri = both(*FILES)
    both("scans.csv", text=f"image,label\n{uri}/b/x.nii.gz,{uri}/b/x_mask.nii.gz\n")
    (row,) = open_cohort(folder / "scans.csv", require_labels=True).rows()
    assert (row["image"], row["label"]) == (f"{uri}/b/x.nii.gz", f"{uri}/b/x_mask.nii.gz")


def test_what_is_missing_is_named(both: Callable[..., tuple[Path, str]]) -> None:
    _, uri = both(*FILES)
    both("lost.csv", text="image,label\nb/x.nii.gz,b/lost.nii.gz\n")
    with pytest.raises(DataError, match="'c_x' of .* have no label"):
        open_cohort(uri, require_labels=True)
    with pytest.raises(DataError, match=f"'{uri}/b/lost.nii.gz', named by {uri}/lost.csv, do not exist"):
        open_cohort(f"{uri}/lost.csv", require_labels=True)
    with pytest.raises(DataError, match="names no image"):
        open_cohort(f"{uri}/nothing")


def test_masks_to_evaluate(both: Callable[..., tuple[Path, str]]) -> None:
    folder, uri = both("one/a.nii.gz", "two/a.nii.gz", "b.nii.gz")
    found = {key: str(path).replace(str(folder), uri) for key, path in masks(str(folder)).items()}
    assert {key: str(path) for key, path in masks(uri).items()} == found
    assert set(found) == {"one_a", "two_a", "b"}

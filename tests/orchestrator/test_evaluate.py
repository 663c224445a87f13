from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from onelabel.errors import DataError
from onelabel.orchestrator.evaluate import SCHEMA, evaluate, masks, summarise, write

SHAPE = (8, 9, 10)
SPACING_MM = (1.0, 2.0, 1.5)


def write_mask(path: Path, *, first: int = 2, last: int = 6, shape: tuple[int, ...] = SHAPE, shift: float = 0) -> Path:
    """A box from plane first to plane last along the first axis."""
    data = np.zeros(shape, np.uint8)
    data[first:last, 2:7, 3:8] = 1
    affine = np.diag([*SPACING_MM, 1])
    affine[0, 3] = shift
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@pytest.mark.parametrize("ending", ["", "_mask", "_brain_mask", "_label", "_brain"])
def test_masks_meet_by_the_names_of_their_scans(ending: str, tmp_path: Path) -> None:
    for key in ("a", "b"):
        write_mask(tmp_path / "ours" / f"{key}{ending}.nii.gz")
        write_mask(tmp_path / "theirs" / f"{key}_seg.nii.gz")
    rows = evaluate(str(tmp_path / "ours" / "*"), str(tmp_path / "theirs"))
    assert [(row["key"], row["miss"], row["dice"]) for row in rows] == [("a", False, 1), ("b", False, 1)]


def test_the_measures(tmp_path: Path) -> None:
    write_mask(tmp_path / "ours" / "a.nii.gz", first=2, last=4)
    write_mask(tmp_path / "theirs" / "a.nii.gz", first=2, last=6)
    (row,) = evaluate(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    assert list(row) == SCHEMA.names
    assert row["dice"] == pytest.approx(2 * 2 / 6)
    assert row["jaccard"] == pytest.approx(2 / 4)
    assert row["hd95_mm"] == 2
    assert 0 < row["asd_mm"] < 2
    assert row["truth_volume_mm3"] == 2 * row["volume_mm3"] == 4 * 5 * 5 * np.prod(SPACING_MM)
    assert row["miss"] is False
    assert row["error"] is None


def test_a_truth_without_prediction_is_a_miss_at_the_worst(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_mask(tmp_path / "ours" / "a.nii.gz")
    write_mask(tmp_path / "ours" / "stray.nii.gz")
    for key in ("a", "b"):
        write_mask(tmp_path / "theirs" / f"{key}.nii.gz")
    found, missed = evaluate(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    assert found["dice"] == 1
    assert missed["miss"] is True
    assert missed["prediction"] is None
    assert (missed["dice"], missed["volume_mm3"]) == (0, 0)
    assert missed["hd95_mm"] == missed["asd_mm"] == pytest.approx(np.linalg.norm(np.multiply(SHAPE, SPACING_MM)))
    assert "stray" in caplog.text
    figures = summarise([found, missed])
    assert figures["dice"] == {"mean": 0.5, "median": 0.5, "worst": 0}
    assert figures["hd95_mm"]["worst"] == missed["hd95_mm"]


def test_other_grids_and_broken_files_are_rows_with_errors(tmp_path: Path) -> None:
    for key in ("place", "shape", "sound", "torn"):
        write_mask(tmp_path / "theirs" / f"{key}.nii.gz")
    write_mask(tmp_path / "ours" / "place.nii.gz", shift=0.5)
    write_mask(tmp_path / "ours" / "shape.nii.gz", shape=(8, 9, 11))
    write_mask(tmp_path / "ours" / "sound.nii.gz", shift=0.01)
    (tmp_path / "ours" / "torn.nii.gz").write_bytes(b"torn")
    place, shape, sound, torn = evaluate(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    assert "0.5 mm" in place["error"]
    assert "(8, 9, 11)" in shape["error"]
    assert torn["error"] is not None
    assert sound["error"] is None
    assert [row["dice"] for row in (place, shape, torn)] == [None] * 3
    assert summarise([place, shape, sound, torn])["dice"]["worst"] == sound["dice"]
    assert summarise([place]) == {}


def test_two_files_are_compared_whatever_their_names(tmp_path: Path) -> None:
    ours, theirs = write_mask(tmp_path / "ours.nii.gz"), write_mask(tmp_path / "theirs.nii.gz")
    (row,) = evaluate(str(ours), str(theirs))
    assert row["dice"] == 1


def test_a_manifest_names_its_masks(tmp_path: Path) -> None:
    write_mask(tmp_path / "m" / "1.nii.gz")
    write_mask(tmp_path / "truth" / "first_mask.nii.gz")
    manifest = tmp_path / "strip.csv"
    manifest.write_text("key,image,mask\nfirst,scans/1.nii.gz,m/1.nii.gz\n")
    (row,) = evaluate(str(manifest), str(tmp_path / "truth"))
    assert row["dice"] == 1


def test_masks_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for subject in ("sub-1", "sub-2"):
        write_mask(tmp_path / "tree" / subject / "t1_mask.nii.gz")
    assert sorted(masks(str(tmp_path / "tree"))) == ["sub-1_t1", "sub-2_t1"]
    assert sorted(masks(str(tmp_path / "tree" / "*" / "*.nii.gz"))) == ["sub-1_t1", "sub-2_t1"]


def test_scans_beside_masks_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.nii.gz", "a_mask.nii.gz", "b.nii.gz"):
        write_mask(tmp_path / "mixed" / name)
        write_mask(tmp_path / "apart" / ("masks" if "mask" in name else "images") / "a.nii.gz")
    assert masks(str(tmp_path / "mixed")) == {"a": tmp_path / "mixed" / "a_mask.nii.gz"}
    assert "1 files not named like masks are left out" in caplog.text
    assert masks(str(tmp_path / "apart")) == {"a": tmp_path / "apart" / "masks" / "a.nii.gz"}


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    write_mask(tmp_path / "ours" / "a.nii.gz")
    write_mask(tmp_path / "theirs" / "z.nii.gz")
    with pytest.raises(DataError, match="'a' there, 'z' here"):
        evaluate(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    with pytest.raises(DataError, match="holds no masks"):
        evaluate(str(tmp_path / "nowhere"), str(tmp_path / "theirs"))
    write_mask(tmp_path / "ours" / "a_seg.nii.gz")
    write_mask(tmp_path / "ours" / "a_label.nii.gz")
    with pytest.raises(DataError, match="the same key '.*a'"):
        masks(str(tmp_path / "ours"))


@pytest.mark.parametrize("name", ["table.parquet", "table.csv"])
def test_tables_are_written_whole(name: str, tmp_path: Path) -> None:
    write_mask(tmp_path / "a.nii.gz")
    rows = evaluate(str(tmp_path / "a.nii.gz"), str(tmp_path / "a.nii.gz"))
    write(rows, tmp_path / "new" / name)
    read = pq.read_table if name.endswith("parquet") else pyarrow.csv.read_csv
    table = read(tmp_path / "new" / name)
    assert table.column_names == SCHEMA.names
    assert table["dice"].to_pylist() == [1]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    with pytest.raises(DataError, match="must end in"):
        write(rows, tmp_path / "table.txt")

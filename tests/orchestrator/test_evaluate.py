from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from onelabel.errors import DataError
from onelabel.orchestrator.evaluate import SCHEMA, compare_systems, evaluate, groups_of, masks, summarise, write

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
    assert row["volume_difference_percent"] == -50
    assert row["miss"] is False
    assert row["error"] is None
    assert row["class"] == "foreground"


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
    assert missed["volume_difference_percent"] == -100
    (figures,) = summarise([found, missed])
    assert (figures["scans"], figures["misses"]) == (2, 1)
    assert [figures[name] for name in ("dice", "median", "worst")] == [0.5, 0.5, 0]
    assert 0 <= figures["low"] < 0.5 < figures["high"] <= 1
    assert figures["hd95_mm"] == missed["hd95_mm"] / 2


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
    (figures,) = summarise([place, shape, sound, torn])
    assert (figures["scans"], figures["worst"]) == (1, sound["dice"])
    assert summarise([place]) == []


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


def write_labels(path: Path, labels: dict[int, tuple[int, int]]) -> None:
    """Boxes between two planes of the first axis, by label."""
    data = np.zeros(SHAPE, np.uint8)
    for label, (first, last) in labels.items():
        data[first:last, 2:7, 3:8] = label
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([*SPACING_MM, 1])), path)


def test_several_labels_are_a_row_each(tmp_path: Path) -> None:
    write_labels(tmp_path / "theirs" / "a.nii.gz", {1: (1, 3), 4: (3, 7)})
    write_labels(tmp_path / "ours" / "a.nii.gz", {1: (1, 3), 4: (3, 5), 7: (5, 7)})
    write_labels(tmp_path / "theirs" / "b.nii.gz", {255: (1, 3)})  # one label is the foreground, whatever its number
    write_labels(tmp_path / "ours" / "b.nii.gz", {1: (1, 3)})
    rows = evaluate(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    found = {(row["key"], row["class"]): row for row in rows}
    assert {place: row["dice"] for place, row in found.items()} == {
        ("a", "1"): 1,
        ("a", "4"): pytest.approx(2 * 2 / 6),
        ("a", "7"): 0,
        ("b", "foreground"): 1,
    }
    assert not found["a", "7"]["miss"] and found["a", "7"]["volume_difference_percent"] is None
    assert {row["class"]: row["scans"] for row in summarise(rows)} == {"1": 1, "4": 1, "7": 1, "foreground": 1}


def test_a_lost_label_is_a_miss(tmp_path: Path) -> None:
    write_labels(tmp_path / "theirs" / "a.nii.gz", {1: (1, 3), 2: (3, 7)})
    write_labels(tmp_path / "ours" / "a.nii.gz", {1: (1, 3)})
    one, two = evaluate(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    assert (one["miss"], two["miss"], two["dice"]) == (False, True, 0)


def test_groups_are_summarised_apart(tmp_path: Path) -> None:
    lines = ["key,image,mask,site"]
    for key, last in (("a", 6), ("b", 5), ("c", 4)):
        write_mask(tmp_path / "ours" / f"{key}.nii.gz", last=last)
        write_mask(tmp_path / f"{key}_mask.nii.gz")
        lines.append(f"{key},{key}.nii.gz,{key}_mask.nii.gz,{'north' if key == 'a' else 'south'}")
    manifest = tmp_path / "truth.csv"
    manifest.write_text("\n".join(lines))
    groups = groups_of(str(manifest), "site")
    assert groups == {"a": "north", "b": "south", "c": "south"}
    rows = evaluate(str(tmp_path / "ours"), str(manifest), groups=groups)
    north, south = summarise(rows)
    assert (north["group"], north["scans"], north["dice"]) == ("north", 1, 1)
    assert (south["group"], south["scans"]) == ("south", 2)
    assert south["dice"] == pytest.approx((6 / 7 + 4 / 6) / 2)
    with pytest.raises(DataError, match="no column 'scanner'.* site"):
        groups_of(str(manifest), "scanner")
    with pytest.raises(DataError, match="no manifest"):
        groups_of(str(tmp_path / "ours"), "site")


def test_systems_are_compared_on_the_scans_that_both_have(tmp_path: Path) -> None:
    for place in range(8):
        write_mask(tmp_path / "truth" / f"s{place}.nii.gz")
        write_mask(tmp_path / "good" / f"s{place}.nii.gz", last=6 if place else 5)
        write_mask(tmp_path / "poor" / f"s{place}.nii.gz", last=4)
    write_mask(tmp_path / "poor" / "s7.nii.gz", shift=9)
    rows = [
        row
        for name in ("good", "poor", "good again")
        for row in evaluate(str(tmp_path / name.split()[0]), str(tmp_path / "truth"), system=name)
    ]
    table = {(row["first"], row["second"], row["measure"]): row for row in compare_systems(rows)}
    assert len(table) == 6
    dice, distance, same = (
        table[place]
        for place in (("good", "poor", "dice"), ("good", "poor", "hd95_mm"), ("good", "good again", "dice"))
    )
    assert dice["scans"] == distance["scans"] == 7
    assert dice["difference"] == pytest.approx(1 - 4 / 6)
    assert (dice["effect"], distance["effect"], same["effect"]) == (1, -1, 0)
    assert dice["p"] < 0.05 <= same["p"] == 1
    assert dice["p_holm"] == pytest.approx(6 * dice["p"]) or dice["p_holm"] >= 4 * dice["p"]
    assert compare_systems([row for row in rows if row["system"] == "good"]) == []

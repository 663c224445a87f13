import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onelabel.errors import DataError
from onelabel.tasks.cohort import SCHEMA, Cohort, open_cohort

Touch = Callable[..., Path]


@pytest.fixture
def touch(tmp_path: Path) -> Touch:
    """Make empty files in the temporary folder: cohorts name scans, and never read them."""

    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return make


def manifest(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def found(cohort: Cohort, root: Path) -> dict[str, tuple[str, str | None]]:
    """Key -> image and label, relative to a folder."""
    return {
        row["key"]: (os.path.relpath(row["image"], root), row["label"] and os.path.relpath(row["label"], root))
        for row in cohort.rows()
    }


# Manifests


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_manifest(tmp_path: Path, ending: str, delimiter: str) -> None:
    lines = ["key,image,mask,split", "007,a/x.nii.gz,m/x.nii.gz,train", "b,/data/y.nii,,test"]
    path = manifest(tmp_path / f"table.{ending}", *(line.replace(",", delimiter) for line in lines))
    cohort = open_cohort(str(path))
    assert cohort.table.schema == SCHEMA
    assert cohort.rows() == [
        {
            "key": "007",
            "image": str(tmp_path / "a/x.nii.gz"),
            "label": str(tmp_path / "m/x.nii.gz"),
            "kind": "dense",
            "weight": 1.0,
        },
        {"key": "b", "image": "/data/y.nii", "label": None, "kind": "none", "weight": 1.0},
    ]


@pytest.mark.parametrize("image", ["image", "path", "file"])
@pytest.mark.parametrize("label", ["label", "mask", "seg", "segmentation", "lesion"])
def test_manifest_columns_have_other_names(tmp_path: Path, image: str, label: str) -> None:
    path = manifest(tmp_path / "table.csv", f"{label},{image}", "m.nii.gz,x.nii.gz")
    cohort = open_cohort(path, label_column="lesion" if label == "lesion" else None)
    assert found(cohort, tmp_path) == {"x": ("x.nii.gz", "m.nii.gz")}


def test_manifest_keeps_kind_weight_and_scores(tmp_path: Path) -> None:
    path = manifest(tmp_path / "t.csv", "image,label,kind,weight,score", "x.nii,y.nii,pseudo,0.5,0.9", "z.nii,,none,,")
    rows = open_cohort(path).rows()
    assert [(row["kind"], row["weight"], row["score"]) for row in rows] == [("pseudo", 0.5, 0.9), ("none", 1.0, None)]


def test_a_written_cohort_is_a_manifest(tmp_path: Path) -> None:
    cohort = open_cohort(manifest(tmp_path / "t.csv", "image,label", "x.nii,y.nii", "z.nii,n/a"))
    cohort.write(tmp_path / "new" / "cohort.parquet")
    assert open_cohort(tmp_path / "new" / "cohort.parquet").table.equals(cohort.table)
    assert open_cohort(tmp_path / "new" / "cohort.parquet", where={"kind": "none"}).rows() == cohort.rows()[1:]


def test_where_keeps_rows(tmp_path: Path) -> None:
    path = manifest(tmp_path / "t.csv", "image,split,site", "a.nii,test,1", "b.nii,train,1", "c.nii,test,2")
    assert [row["key"] for row in open_cohort(path, where={"split": "test"}).rows()] == ["a", "c"]
    assert [row["key"] for row in open_cohort(path, where={"split": "test", "site": "2"}).rows()] == ["c"]


@pytest.mark.parametrize(
    ("lines", "options", "match"),
    [
        (["image,split", "a.nii,test"], {"where": {"splt": "test"}}, "did you mean 'split'"),
        (["image,split", "a.nii,test"], {"where": {"split": "tset"}}, "it holds 'test'"),
        (["image,maks", "a.nii,b.nii"], {"label_column": "mask"}, "did you mean 'maks'"),
        (["imgae,split", "a.nii,test"], {}, "did you mean 'imgae'"),
        (["image,label"], {}, "lists no scan"),
        ([""], {}, "table"),
        (["image,label", "a.nii,b.nii,c.nii"], {}, "read as a table"),
        (["image,image", "a.nii,b.nii"], {}, "two columns of one name"),
        (["image,label", ",b.nii"], {}, "no image"),
        (["key,image", "k,a.nii", "k,b.nii"], {}, "'k' stand in more than one row"),
        (["image", "a.nii", "a.nii"], {}, "'a' stand in more than one row"),
        (["key,image", "../k,a.nii"], {}, "no slashes"),
        (["key,image", "..,a.nii"], {}, "no slashes"),
        (["image,kind", "a.nii,thick"], {}, "of kind 'thick'"),
        (["image,weight", "a.nii,heavy"], {}, "no number"),
        (["image,label", "a.nii,b.nii", "c.nii,"], {"require_labels": True}, "'c' of .* have no label"),
        (["image,label", "a.nii,b.nii"], {"require_labels": True}, "do not exist"),
    ],
)
def test_bad_manifests_are_refused(tmp_path: Path, lines: list[str], options: dict, match: str) -> None:
    with pytest.raises(DataError, match=match):
        open_cohort(manifest(tmp_path / "t.csv", *lines), **options)


def test_a_manifest_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    (tmp_path / "a.csv").write_bytes(b"image\n\xff\xfe\n")
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(DataError, match="table"):
            open_cohort(tmp_path / name)


def test_required_labels_that_exist_are_accepted(touch: Touch) -> None:
    root = touch("a.nii", "b.nii")
    assert len(open_cohort(manifest(root / "t.csv", "image,label", "a.nii,b.nii"), require_labels=True)) == 1


# Files and folders


@pytest.mark.parametrize("ending", ["mask", "label", "seg", "brainmask", "brain_mask"])
@pytest.mark.parametrize("image_type", ["nii", "nii.gz", "mgz"])
def test_labels_lie_beside_images(touch: Touch, ending: str, image_type: str) -> None:
    root = touch(f"s1/x.{image_type}", f"s1/x_{ending}.nii.gz", "s2/y.nii", "notes.txt", ".hidden.nii")
    label = f"s1/x_{ending}.nii.gz"
    assert found(open_cohort(root), root) == {"x": (f"s1/x.{image_type}", label), "y": ("s2/y.nii", None)}
    assert found(open_cohort(root / f"s1/x.{image_type}"), root) == {"x": (f"s1/x.{image_type}", label)}
    assert found(open_cohort(f"{root}/s1/?.*"), root) == {"x": (f"s1/x.{image_type}", label)}
    assert found(open_cohort(f"{root}/**/*.nii*"), root)["y"] == ("s2/y.nii", None)


@pytest.mark.parametrize(
    ("images", "labels"),
    [("image", "mask"), ("images", "masks"), ("t1", "mask"), ("imagesTr", "labelsTr"), ("images", "label")],
)
def test_labels_lie_in_a_folder_of_their_own(touch: Touch, images: str, labels: str) -> None:
    root = touch(f"{images}/x.nii.gz", f"{images}/y.nii.gz", f"{labels}/x.nii.gz", "tissue/x.nii.gz")
    assert found(open_cohort(root), root) == {
        "x": (f"{images}/x.nii.gz", f"{labels}/x.nii.gz"),
        "y": (f"{images}/y.nii.gz", None),
    }


def test_keys_take_folders_only_where_names_repeat(touch: Touch) -> None:
    root = touch("sub-01/anat/x.nii", "sub-02/anat/x.nii", "sub-02/anat/y.nii")
    assert sorted(found(open_cohort(root), root)) == ["sub-01_anat_x", "sub-02_anat_x", "y"]


def test_a_label_is_no_scan_of_a_folder_but_may_be_given_alone(touch: Touch) -> None:
    root = touch("x_mask.nii", "y.nii")
    assert sorted(found(open_cohort(root), root)) == ["y"]
    assert sorted(found(open_cohort(root / "x_mask.nii"), root)) == ["x_mask"]


def test_relative_sources_give_absolute_paths(touch: Touch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(touch("in/x.nii"))
    assert open_cohort("in").rows()[0]["image"] == str(Path.cwd() / "in/x.nii")


@pytest.mark.parametrize(
    ("files", "source", "match"),
    [
        ([], "nowhere", "does not exist"),
        ([], "", "without images"),
        (["a.txt"], "", "without images"),
        (["a.txt"], "a.txt", "neither an image nor a manifest"),
        (["a.txt"], "*.nii", "matches no image"),
        (["a.nii", "a.mgz"], "", "'a' stand in more than one row"),
        (["a.nii", "a_mask.nii", "a_seg.nii"], "", "more than one label"),
        (["images/a.nii", "masks/a.nii", "labels/a.nii"], "", "more than one label"),
    ],
)
def test_bad_sources_are_refused(touch: Touch, files: list[str], source: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        open_cohort(touch(*files) / source)


# BIDS


@pytest.fixture
def bids(touch: Touch) -> Path:
    root = touch(
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.json",
        "sub-01/ses-a/func/sub-01_ses-a_task-rest_bold.nii.gz",
        "sub-02/anat/sub-02_run-1_FLAIR.nii.gz",
        "sub-02/anat/sub-02_run-2_FLAIR.nii.gz",
        "derivatives/strip/sub-01/ses-a/anat/sub-01_ses-a_desc-brain_mask.nii.gz",
        "derivatives/strip/sub-01/ses-a/anat/sub-01_ses-a_space-MNI_desc-brain_mask.nii.gz",
        "derivatives/strip/sub-01/ses-a/anat/sub-01_ses-a_label-GM_mask.nii.gz",
        "derivatives/strip/sub-02/anat/sub-02_run-2_desc-brain_mask.nii.gz",
    )
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    return root


def test_bids(bids: Path) -> None:
    masks = "derivatives/strip"
    assert found(open_cohort(bids), bids) == {
        "sub-01_ses-a_T1w": (
            "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
            f"{masks}/sub-01/ses-a/anat/sub-01_ses-a_desc-brain_mask.nii.gz",
        ),
        "sub-01_ses-a_T2w": ("sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz", None),
        "sub-02_run-1_FLAIR": ("sub-02/anat/sub-02_run-1_FLAIR.nii.gz", None),
        "sub-02_run-2_FLAIR": (
            "sub-02/anat/sub-02_run-2_FLAIR.nii.gz",
            f"{masks}/sub-02/anat/sub-02_run-2_desc-brain_mask.nii.gz",
        ),
    }


def test_bids_entities_are_columns(bids: Path) -> None:
    assert sorted(found(open_cohort(bids, where={"suffix": "T1w"}), bids)) == ["sub-01_ses-a_T1w"]
    assert sorted(found(open_cohort(bids, where={"run": "2"}), bids)) == ["sub-02_run-2_FLAIR"]


def test_bids_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_description.json").write_text("{}")
    with pytest.raises(DataError, match="without anatomical images"):
        open_cohort(tmp_path)


# The table


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return open_cohort(manifest(tmp_path / "t.csv", "image", "a.nii", "b.nii", "c.nii"))


def test_cohort_round_trip_leaves_one_file(cohort: Cohort, tmp_path: Path) -> None:
    cohort.write(tmp_path / "new" / "c.parquet")
    cohort.write(tmp_path / "new" / "c.parquet")
    assert Cohort.read(tmp_path / "new" / "c.parquet").table.equals(cohort.table)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.parquet"]


def test_join_matches_by_key_and_replaces(cohort: Cohort) -> None:
    scored = cohort.join(pa.table({"key": ["c", "a"], "score": [0.3, 0.1], "weight": [3.0, 1.0]}))
    assert [row["score"] for row in scored.rows()] == [0.1, None, 0.3]
    assert [row["weight"] for row in scored.rows()] == [1.0, None, 3.0]
    assert [row["key"] for row in scored.rows()] == ["a", "b", "c"]
    with pytest.raises(DataError, match="'d' are not in the cohort"):
        cohort.join(pa.table({"key": ["d"], "score": [0.3]}))


def test_cohort_refuses_other_tables(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'weight' is missing"):
        Cohort(cohort.table.drop_columns(["weight"]))
    with pytest.raises(DataError, match="must be of type double"):
        Cohort(cohort.table.set_column(4, "weight", pa.array(["1"] * 3)))
    with pytest.raises(DataError, match="more than one row"):
        Cohort(pa.concat_tables([cohort.table, cohort.table]))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="'key' is missing"):
        Cohort.read(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="Parquet"):
        Cohort.read(tmp_path / "none.parquet")


def test_labelled_cohorts_can_be_loaded(tmp_path: Path) -> None:
    from onelabel.imaging.volume import load_labelled

    data = np.random.default_rng(0).random((4, 5, 6), np.float32)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "x.nii.gz")
    nib.save(nib.Nifti1Image((data > 0.5).astype(np.uint8), np.eye(4)), tmp_path / "x_mask.nii.gz")
    (row,) = open_cohort(tmp_path / "x.nii.gz", require_labels=True).rows()
    assert load_labelled(row["image"], row["label"])[0].shape == (4, 5, 6)


def test_a_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.nii.gz")).touch()
    except OSError:
        pytest.skip("the file system wants UTF-8")
    with pytest.raises(DataError, match=r"caf.udce9.* is no text in UTF-8"):
        open_cohort(tmp_path)

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from onelabel.errors import DataError
from onelabel.imaging.places import Folder
from onelabel.tasks.strip_plan import check_apart, plan

WriteScan = Callable[..., Path]


def targets(*inputs: Path) -> list[str]:
    return [job.mask for job in plan([str(source) for source in inputs])]


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def bids(folder: Path, *names: str) -> Path:
    touched(folder, *(f"{name}.nii.gz" for name in names))
    (folder / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    return folder


def test_a_folder_is_mirrored(tmp_path: Path) -> None:
    touched(tmp_path, "sub-1/anat/t1.nii.gz", "sub-2/anat/t1.nii.gz", "x.mgz", "y.hdr", "y.img")
    assert targets(tmp_path) == [
        "sub-1/anat/t1_mask.nii.gz",
        "sub-2/anat/t1_mask.nii.gz",
        "x_mask.nii.gz",
        "y_mask.nii.gz",
    ]


def test_files_of_one_name_keep_their_folders(tmp_path: Path) -> None:
    touched(tmp_path, "sub-1/t1.nii.gz", "sub-2/t1.nii.gz", "other.nii")
    jobs = plan([str(tmp_path / name) for name in ("sub-1/t1.nii.gz", "sub-2/t1.nii.gz", "other.nii")])
    assert [job.mask for job in jobs] == ["sub-1/t1_mask.nii.gz", "sub-2/t1_mask.nii.gz", "other_mask.nii.gz"]
    assert [job.key for job in jobs] == ["sub-1_t1", "sub-2_t1", "other"]


def test_manifests_globs_and_files_are_joined_and_each_scan_stands_once(tmp_path: Path) -> None:
    touched(tmp_path, "a.nii.gz", "b.nii.gz", "c.nii.gz")
    manifest = tmp_path / "scans.csv"
    manifest.write_text(f"key,image\nfirst,a.nii.gz\nsecond,file://{tmp_path}/d%20d.nii.gz\nthird,s3://bucket/e.nii\n")
    found = plan([str(manifest), str(tmp_path / "[bc].nii.gz"), str(tmp_path / "c.nii.gz")])
    assert [job.mask for job in found] == [f"{key}_mask.nii.gz" for key in ("first", "second", "third", "b", "c")]
    assert [job.image for job in found[1:3]] == [f"{tmp_path}/d d.nii.gz", "s3://bucket/e.nii"]


@pytest.mark.parametrize("name", ["pair.hdr", "pair.img"])
def test_a_pair_is_one_scan(tmp_path: Path, name: str) -> None:
    nib.save(nib.Nifti1Pair(np.zeros((2, 2, 2), np.int16), np.eye(4)), tmp_path / "pair.hdr")
    (job,) = plan([str(tmp_path / name)])
    assert (Path(job.image).name, job.mask) == ("pair.hdr", "pair_mask.nii.gz")


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    touched(tmp_path, "a b.nii.gz")
    assert [job.image for job in plan([f"file://{tmp_path}/a%20b.nii.gz"])] == [str(tmp_path / "a b.nii.gz")]


def test_scans_that_only_their_ending_tells_apart_are_refused(tmp_path: Path) -> None:
    touched(tmp_path, "t1.nii.gz", "t1.mgz")
    with pytest.raises(DataError, match="would both be called t1_mask.nii.gz"):
        targets(tmp_path / "t1.nii.gz", tmp_path / "t1.mgz")


BIDS = (
    *("sub-01/ses-a/anat/sub-01_ses-a_T1w", "sub-01/ses-b/anat/sub-01_ses-b_T1w", "sub-02/ses-a/anat/sub-02_ses-a_T1w"),
    *("sub-02/ses-a/anat/sub-02_ses-a_run-2_echo-1_T2w", "sub-02/ses-a/func/sub-02_ses-a_task-rest_bold"),
)


def test_masks_of_a_bids_dataset_have_bids_names(tmp_path: Path) -> None:
    assert targets(bids(tmp_path, *BIDS)) == [
        "sub-01/ses-a/anat/sub-01_ses-a_desc-brain_mask.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_desc-brain_mask.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_desc-brain_mask.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_run-2_mod-T2w_echo-1_desc-brain_mask.nii.gz",
    ]


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ({"sub": ["01"]}, 2),
        ({"sub": ["01", "02"], "ses": ["a"]}, 3),
        ({"suffix": ["T2w"]}, 1),
        ({"suffix": ["bold"]}, 1),
    ],
)
def test_a_bids_dataset_can_be_filtered(tmp_path: Path, where: dict[str, list[str]], count: int) -> None:
    assert len(plan([str(bids(tmp_path, *BIDS))], where=where)) == count


def test_a_filter_that_nothing_passes_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'sub' = '07': it holds '01', '02'"):
        plan([str(bids(tmp_path, *BIDS))], where={"sub": ["07"]})


def test_other_results_stand_beside_the_mask(tmp_path: Path) -> None:
    root = bids(tmp_path / "raw", "sub-1/anat/sub-1_desc-preproc_T1w")
    (job,) = plan([str(root)], image=True, distance=True)
    assert job.results == [
        "sub-1/anat/sub-1_desc-brain_T1w.nii.gz",
        "sub-1/anat/sub-1_desc-brain_distance.nii.gz",
        "sub-1/anat/sub-1_desc-brain_mask.nii.gz",
    ]
    touched(tmp_path, "x.nii")
    assert plan([str(tmp_path / "x.nii")])[0].results == ["x_mask.nii.gz"]


@pytest.mark.parametrize(
    ("source", "out", "fine"),
    [
        ("scans", "scans", False),
        ("scans", "scans/out", False),
        ("scans", "scans-out", True),
        ("scans/a.nii.gz", "scans", True),
        ("scans/*.nii.gz", "scans", False),
        ("scans/*.nii.gz", "scans/out", True),
        ("scans/**/*.nii.gz", "scans/out", False),
        ("raw", "raw/derivatives/onelabel", True),
        ("raw", "raw/masks", False),
    ],
)
def test_results_must_not_be_found_as_scans(tmp_path: Path, source: str, out: str, fine: bool) -> None:
    touched(tmp_path, "scans/a.nii.gz")
    bids(tmp_path / "raw", "sub-1/anat/sub-1_T1w")
    inputs = [str(tmp_path / source)]
    jobs, folder = plan(inputs), Folder(str(tmp_path / out))
    if fine:
        check_apart(inputs, jobs, folder)
    else:
        with pytest.raises(DataError, match="lies inside the input"):
            check_apart(inputs, jobs, folder)


def test_labels_may_be_as_many_as_there_are(tmp_path: Path) -> None:
    touched(tmp_path, "plain/a.nii.gz", "plain/a_mask.nii.gz", "plain/a_seg.nii.gz")
    assert [job.key for job in plan([str(tmp_path / "plain")])] == ["a"]
    names = [f"derivatives/{tool}/sub-1/anat/sub-1_desc-brain_mask" for tool in ("fmriprep", "onelabel")]
    root = bids(tmp_path / "raw", "sub-1/anat/sub-1_T1w", *names)
    assert targets(root) == ["sub-1/anat/sub-1_desc-brain_mask.nii.gz"]


def test_no_scan_of_a_folder_is_passed_over(tmp_path: Path) -> None:
    names = ["a.NII.GZ", "b.nii.bz2", "t1/c.nii.gz", "t2/c.nii.gz", "more/d.mgz"]
    for name in (*names, "masks/c.nii.gz", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "lost.nii.gz").symlink_to("nowhere.nii.gz")
    jobs = plan([str(tmp_path)])
    assert {job.image for job in jobs} == {str(tmp_path / name) for name in (*names, "lost.nii.gz")}
    assert {job.mask for job in jobs} >= {"a_mask.nii.gz", "b_mask.nii.gz", "t1/c_mask.nii.gz", "t2/c_mask.nii.gz"}


def test_disks_and_stores_may_be_mixed(tmp_path: Path) -> None:
    touched(tmp_path, "a/head.nii.gz")
    manifest = tmp_path / "scans.csv"
    manifest.write_text("image\ns3://bucket/b/head.nii.gz\n")
    found = [job.mask for job in plan([str(tmp_path / "a" / "head.nii.gz"), str(manifest)])]
    assert len(set(found)) == 2 and all(name.endswith("head_mask.nii.gz") for name in found)


@pytest.mark.parametrize("place", ["file:///no such/scan.nii.gz", "file://elsewhere/x.nii.gz", "x" * 300])
def test_what_is_no_place_is_one_sentence(place: str) -> None:
    with pytest.raises(DataError) as caught:
        plan([place])
    assert "\n" not in str(caught.value)


def test_in_a_store_too_results_must_not_be_found_as_scans() -> None:
    query = "?endpoint_override=localhost:9000&scheme=http&region=us-east-1"
    with pytest.raises(DataError, match="lies inside the input"):
        check_apart([f"s3://b/in/{query}"], [], Folder(f"s3://b/in/out{query}"))


def test_no_result_overwrites_an_input(tmp_path: Path) -> None:
    touched(tmp_path, "a.nii.gz", "a_mask.nii.gz")
    manifest = tmp_path / "scans.csv"
    manifest.write_text("image\na.nii.gz\na_mask.nii.gz\n")
    jobs = plan([str(manifest)])
    with pytest.raises(DataError, match="is an input and would be overwritten"):
        check_apart([str(manifest)], jobs, Folder(str(tmp_path)))

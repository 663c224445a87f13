from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest

from onelabel.configs.schema import UNetConfig
from onelabel.errors import CheckpointError, ClusterError, DataError
from onelabel.models import checkpoint, networks
from onelabel.tasks.strip import SCHEMA, TABLE, plan, strip

SHAPE = (12, 14, 10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was never trained."""
    config = UNetConfig(channels=(4, 4), patch=1)
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    meta = checkpoint.Meta(
        network=config.model_dump(mode="json"),
        learner="supervised",
        grid={"spacing_mm": (8.0, 8.0, 8.0), "size": (16, 16, 16)},
        step=0,
        seed=0,
        manifest_digest="",
    )
    checkpoint.save(folder, networks.build(config), meta)
    return folder


def write_scan(path: Path, *, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Path:
    """A scan with an oblique affine whose qform and sform differ, and codes of their own."""
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-6.0, 7.0, 9.0])
    affine[:3, 3] = (30, -40, 12.5)
    data = np.random.default_rng(seed).random(shape, dtype=np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mgz":
        nib.save(nib.MGHImage(data, affine), path)
        return path
    image = nib.Nifti1Image(data, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine @ np.diag([1, 1, 1.01, 1]), code=4)
    nib.save(image, path)
    return path


def test_masks_lie_in_the_scans_own_grid(trained: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "head.nii.gz")
    (row,) = strip([str(scan)], out=tmp_path / "out", checkpoint=trained)
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
    assert row["volume_mm3"] == pytest.approx(np.count_nonzero(voxels) * abs(np.linalg.det(mask.affine)), rel=1e-3)


def test_a_broken_file_is_a_row_and_stops_nobody(trained: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    for key in ("a", "d"):
        write_scan(scans / f"{key}.nii.gz")
    (scans / "b.nii.gz").write_bytes(b"not an image")
    write_scan(scans / "c.nii.gz", shape=(*SHAPE, 3))
    rows = strip([str(scans)], out=tmp_path / "out", checkpoint=trained, threads=1)
    assert [row["key"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["error"] is None for row in rows] == [True, False, False, True]
    assert "\n" not in rows[1]["error"]
    assert "three axes" in rows[2]["error"]
    assert [row["mask"] is None for row in rows] == [False, True, True, False]
    table = pq.read_table(tmp_path / "out" / TABLE)
    assert table.schema.names == SCHEMA.names
    assert table.to_pylist() == [{name: row[name] for name in SCHEMA.names} for row in rows]
    assert not list((tmp_path / "out").glob(".*"))


def test_the_same_scan_gives_the_same_mask(trained: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "head.mgz")
    masks = []
    for out in ("one", "two"):
        (row,) = strip([str(scan)], out=tmp_path / out, checkpoint=trained)
        masks.append(np.asarray(nib.load(row["mask"]).dataobj))
    np.testing.assert_array_equal(*masks)


def targets(*inputs: Path) -> list[str]:
    return [job.target.as_posix() for job in plan([str(source) for source in inputs])]


def test_a_folder_is_mirrored(tmp_path: Path) -> None:
    for name in ("sub-1/anat/t1.nii.gz", "sub-2/anat/t1.nii.gz", "x.mgz"):
        write_scan(tmp_path / name)
    assert targets(tmp_path) == ["sub-1/anat/t1_mask.nii.gz", "sub-2/anat/t1_mask.nii.gz", "x_mask.nii.gz"]


def test_files_of_one_name_keep_their_folders(tmp_path: Path) -> None:
    files = [write_scan(tmp_path / name) for name in ("sub-1/t1.nii.gz", "sub-2/t1.nii.gz", "other.nii")]
    jobs = plan([str(file) for file in files])
    assert [job.target.as_posix() for job in jobs] == [
        "sub-1/t1_mask.nii.gz",
        "sub-2/t1_mask.nii.gz",
        "other_mask.nii.gz",
    ]
    assert [job.key for job in jobs] == ["sub-1_t1", "sub-2_t1", "other"]


def test_manifests_globs_and_files_are_joined_and_each_scan_stands_once(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz"):
        write_scan(tmp_path / name)
    manifest = tmp_path / "scans.csv"
    manifest.write_text("key,image\nfirst,a.nii.gz\n")
    found = targets(manifest, tmp_path / "[bc].nii.gz", tmp_path / "c.nii.gz")
    assert found == ["first_mask.nii.gz", "b_mask.nii.gz", "c_mask.nii.gz"]


def test_scans_that_only_their_ending_tells_apart_are_refused(tmp_path: Path) -> None:
    files = [write_scan(tmp_path / name) for name in ("t1.nii.gz", "t1.mgz")]
    with pytest.raises(DataError, match="would both be called t1_mask.nii.gz"):
        targets(*files)


def test_what_cannot_work_fails_at_the_start(trained: Path, tmp_path: Path) -> None:
    scan = str(write_scan(tmp_path / "head.nii.gz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="folder without images"):
        strip([str(tmp_path / "empty")], out=tmp_path / "out", checkpoint=trained)
    with pytest.raises(DataError, match="not writable"):
        strip([scan], out=Path(scan) / "out", checkpoint=trained)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        strip([scan], out=tmp_path / "out", checkpoint=tmp_path)


def test_a_missing_gpu_is_named(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    scan = str(write_scan(tmp_path / "head.nii.gz"))
    with pytest.raises(ClusterError, match="no CUDA device"):
        strip([scan], out=tmp_path / "out", checkpoint=trained, device="cuda")

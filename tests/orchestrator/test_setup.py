import gzip
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from onelabel.configs.load import load, parse
from onelabel.configs.schema import RunConfig
from onelabel.errors import ClusterError, ConfigError, DataError, OnelabelError
from onelabel.orchestrator.setup import needs, open_cohorts, open_folder

SIZE = (12, 14, 10)
RANKER = {"type": "autoencoder"}


def head() -> np.ndarray:
    return np.random.default_rng(0).random(SIZE).astype(np.float32)


def mask() -> np.ndarray:
    inside = np.zeros(SIZE, np.uint8)
    inside[3:9, 3:9, 3:8] = 1
    return inside


def write(path: Path, data: np.ndarray, *, shift_mm: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 3] = shift_mm
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One labelled scan, and a cohort of three."""
    write(tmp_path / "labelled" / "one.nii.gz", head())
    write(tmp_path / "labelled" / "one_mask.nii.gz", mask())
    for key in "abc":
        write(tmp_path / "cohort" / f"{key}.nii.gz", head())
    return tmp_path


def config(folder: Path, /, *, stage: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    scans = {"labelled": str(folder / "labelled" / "one.nii.gz"), "unlabelled": str(folder / "cohort")}
    base = {"name": "base", "steps": 1, "start": "scratch", "streams": {"train": [{"type": "synthetic"}]}}
    base |= {"ranker": RANKER, "select": {"type": "top_k", "k": 2}} | (stage or {})
    settings = {"name": "test", "storage": str(folder / "runs"), "data": scans, "stages": [base]}
    return parse(settings | changes)


def refusal(run: RunConfig) -> str:
    """The message with which the scans of a run are refused: one line."""
    with pytest.raises(OnelabelError) as caught:
        open_cohorts(run)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_sound_scans_are_found(data: Path) -> None:
    cohorts = open_cohorts(config(data))
    assert [row["key"] for row in cohorts.labelled.rows()] == ["one"]
    assert cohorts.labelled.rows()[0]["label"] == str(data / "labelled" / "one_mask.nii.gz")
    assert cohorts.unlabelled is not None
    assert [row["key"] for row in cohorts.unlabelled.rows()] == ["a", "b", "c"]
    assert cohorts.test is None


def test_the_digest_tells_cohorts_apart(data: Path) -> None:
    before = open_cohorts(config(data)).digest
    assert before == open_cohorts(config(data)).digest
    write(data / "cohort" / "d.nii.gz", head())
    assert before != open_cohorts(config(data)).digest


def test_k_is_at_most_the_cohorts_size(data: Path) -> None:
    open_cohorts(config(data, stage={"select": {"type": "top_k", "k": 3}}))
    with pytest.raises(ConfigError) as caught:
        open_cohorts(config(data, stage={"select": {"type": "top_k", "k": 4}}))
    assert all(part in str(caught.value) for part in ("'base'", "k = 4", "holds 3"))
    # Where nothing is ranked, nothing is selected.
    open_cohorts(config(data, stage={"select": {"type": "top_k", "k": 4}, "ranker": None}))


def test_streams_are_those_that_the_learner_reads(data: Path) -> None:
    for streams in ({"trian": [{"type": "synthetic"}]}, {}, {name: [{"type": "mask"}] for name in ("train", "extra")}):
        with pytest.raises(ConfigError) as caught:
            open_cohorts(config(data, stage={"streams": streams}))
        message = str(caught.value)
        assert all(name in message for name in ("'base'", "'supervised' reads train", *streams))


def test_a_stage_makes_a_network_that_segments_images(data: Path) -> None:
    assert "'autoencoder'" in refusal(config(data, stage={"learner": {"type": "autoencoder"}}))
    assert "'mask'" in refusal(config(data, stage={"streams": {"train": [{"type": "mask"}]}}))


def test_the_oracle_needs_masks(data: Path) -> None:
    oracle = config(data, stage={"ranker": {"type": "oracle"}})
    assert "oracle" in refusal(oracle)
    write(data / "cohort" / "a_mask.nii.gz", mask())
    open_cohorts(oracle)


@pytest.mark.parametrize("broken", ["labelled", "unlabelled", "test"])
def test_a_source_that_is_not_there(data: Path, broken: str) -> None:
    run = config(data)
    scans = run.data.model_dump() | {broken: str(data / "nowhere")}
    assert "nowhere does not exist" in refusal(config(data, data=scans))


def test_a_labelled_scan_without_a_label(data: Path) -> None:
    (data / "labelled" / "one_mask.nii.gz").unlink()
    assert "'one'" in refusal(config(data))


def test_a_test_scan_without_a_label(data: Path) -> None:
    scans = config(data).data.model_dump() | {"test": str(data / "cohort")}
    assert "have no label" in refusal(config(data, data=scans))


@pytest.mark.parametrize(
    ("label", "part"),
    [
        (np.zeros(SIZE, np.uint8), "labels no voxel"),
        (np.ones(SIZE, np.uint8), "labels every voxel"),
        (np.ones((12, 14, 9), np.uint8), "shape (12, 14, 9)"),
        (np.full(SIZE, 0.5, np.float32) * mask(), "whole numbers"),
        (np.stack([mask()] * 3, axis=-1), "three axes"),
    ],
    ids=["empty", "full", "another shape", "a probability", "4D"],
)
def test_a_label_that_cannot_be_used(data: Path, label: np.ndarray, part: str) -> None:
    write(data / "labelled" / "one_mask.nii.gz", label)
    message = refusal(config(data))
    assert part in message
    assert "'one'" in message and "one_mask.nii.gz" in message


NAMES = ["background", "a", "b"]


def classes(folder: Path, label: np.ndarray, /, *, stage: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    write(folder / "labelled" / "one_mask.nii.gz", label)
    scans = config(folder).data.model_dump(exclude_none=True) | {"classes": NAMES} | more
    return config(folder, data=scans, stage=stage)


def test_every_class_is_in_some_labelled_scan(data: Path) -> None:
    label = mask()
    assert "no labelled scan holds 'b'" in refusal(classes(data, label))
    label[4, 4, 4] = 2
    assert open_cohorts(classes(data, label))
    label[5, 5, 5] = 7
    message = refusal(classes(data, label))
    assert "does not name (7)" in message and "'one'" in message
    assert open_cohorts(classes(data, label, classes={1: "a", 2: "b", 7: "a"}))
    assert open_cohorts(classes(data, label, ignore=7))
    assert open_cohorts(config(data))  # all as one structure


def test_scribbles_are_read_as_they_are_or_not_at_all(data: Path) -> None:
    label = np.full(SIZE, 255, np.uint8)
    label[2], label[5, 5, 3:6], label[6, 6, 3:6] = 0, 1, 2
    real = {"streams": {"train": [{"type": "real"}]}, "ranker": {"type": "confidence"}}
    quiet = real | {"expect": {"images": 0}}
    assert open_cohorts(classes(data, label, stage=quiet, ignore=255))
    for stage, part in (
        (quiet | {"streams": {"train": [{"type": "real"}, {"type": "synthetic"}]}}, "type to real"),
        (quiet | {"ranker": RANKER}, "another ranker"),
        (real, "expect.images=0"),
    ):
        message = refusal(classes(data, label, stage=stage, ignore=255))
        assert part in message and "'one'" in message and "'base'" in message
    assert "does not name (255)" in refusal(classes(data, label, stage=quiet))
    # A part that is not annotated is no scribble.
    label[:] = 0
    label[3:6, 3:9, 3:8], label[6:9, 3:9, 3:8], label[11] = 1, 2, 255
    assert open_cohorts(classes(data, label, ignore=255))


def test_a_label_on_another_grid(data: Path) -> None:
    write(data / "labelled" / "one_mask.nii.gz", mask(), shift_mm=5)
    assert "5 mm from its image" in refusal(config(data))


@pytest.mark.parametrize(
    ("image", "part"),
    [
        (np.stack([head()] * 2, axis=-1), "three axes"),
        (np.full(SIZE, 7.0, np.float32), "needs contrast"),
        (np.full(SIZE, np.nan, np.float32), "not finite"),
    ],
    ids=["4D", "constant", "no number"],
)
def test_an_image_that_cannot_be_used(data: Path, image: np.ndarray, part: str) -> None:
    write(data / "labelled" / "one.nii.gz", image)
    message = refusal(config(data))
    assert part in message
    assert "'one'" in message


@pytest.mark.parametrize("name", ["one.nii.gz", "one_mask.nii.gz"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_file_that_was_cut_off(data: Path, name: str, share: float) -> None:
    path = data / "labelled" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    message = refusal(config(data))
    assert name in message and "'one'" in message


def test_a_file_that_is_another(data: Path) -> None:
    (data / "labelled" / "one.nii.gz").write_bytes(gzip.compress(b"no image at all" * 100))
    assert "one.nii.gz" in refusal(config(data))


def test_a_damaged_scan_in_the_cohort_is_no_reason_to_stop(data: Path) -> None:
    (data / "cohort" / "b.nii.gz").write_bytes(b"")
    assert open_cohorts(config(data)).unlabelled is not None


@pytest.mark.parametrize("column", ["labelled", "unlabelled"])
def test_keys_are_unique(data: Path, column: str) -> None:
    image, label = data / "labelled" / "one.nii.gz", data / "labelled" / "one_mask.nii.gz"
    manifest = data / "scans.csv"
    manifest.write_text(f"key,image,label\nsame,{image},{label}\nsame,{image},{label}\n")
    scans = config(data).data.model_dump() | {column: str(manifest)}
    message = refusal(config(data, data=scans))
    assert "'same'" in message and "key" in message


def test_rows_are_chosen_and_columns_named(data: Path) -> None:
    image, label = data / "labelled" / "one.nii.gz", data / "labelled" / "one_mask.nii.gz"
    manifest = data / "scans.csv"
    manifest.write_text(f"key,image,brain,split\nx,{image},{label},train\ny,{image},,test\n")
    source = {"path": str(manifest), "where": {"split": "train"}, "label_column": "brain"}
    scans = config(data).data.model_dump()
    cohorts = open_cohorts(config(data, data=scans | {"labelled": source}))
    assert [row["key"] for row in cohorts.labelled.rows()] == ["x"]
    assert "'split' = 'none'" in refusal(config(data, data=scans | {"labelled": source | {"where": {"split": "none"}}}))
    assert "no column 'skull'" in refusal(config(data, data=scans | {"labelled": source | {"label_column": "skull"}}))


def test_scans_that_are_probabilities_take_more_of_the_store(data: Path) -> None:
    bytes_of = {}
    for name, pseudo in (("hard", None), ("graded", {})):
        run = config(data, stage={"pseudo": pseudo})
        bytes_of[name] = needs(run, open_cohorts(run))["store_bytes"]
    voxels = math.prod(config(data).grid.size)
    assert bytes_of["graded"] - bytes_of["hard"] == 2 * voxels  # k = 2


def test_a_new_folder_records_its_settings(data: Path) -> None:
    run = config(data)
    folder = open_folder(run)
    assert folder == data / "runs" / "test"
    assert load([str(folder / "config.yaml")]) == run
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_the_same_settings_go_on(data: Path) -> None:
    folder = open_folder(config(data))
    (folder / "round-00").mkdir()
    assert open_folder(config(data)) == folder
    assert (folder / "round-00").is_dir()


def test_machines_may_change(data: Path) -> None:
    folder = open_folder(config(data))
    moved = config(data, compute={"train_workers": 2}, tracking={"every": 7})
    assert open_folder(moved) == folder
    assert load([str(folder / "config.yaml")]) == moved


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 5}, "seed"),
        ({"grid": {"spacing_mm": 3}}, "grid"),
        ({"stage": {"steps": 2}}, "stages"),
        ({"seed": 5, "network": {"convs": 2}}, "seed and network"),
    ],
    ids=str,
)
def test_other_settings_need_another_name(data: Path, changes: dict[str, Any], named: str) -> None:
    folder = open_folder(config(data))
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        open_folder(config(data, **changes))
    message = str(caught.value)
    assert f"another {named};" in message and "name=NAME" in message and str(folder) in message
    assert (folder / "config.yaml").read_bytes() == before
    assert open_folder(config(data, name="other", **changes)) != folder


@pytest.mark.parametrize("record", ["", "[]", "name: [", "text"])
def test_a_record_that_cannot_be_read(data: Path, record: str) -> None:
    folder = open_folder(config(data))
    (folder / "config.yaml").write_text(record)
    with pytest.raises(ConfigError) as caught:
        open_folder(config(data))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_storage_that_is_a_file(data: Path) -> None:
    (data / "runs").write_text("")
    with pytest.raises(ClusterError) as caught:
        open_folder(config(data))
    message = str(caught.value)
    assert str(data / "runs") in message and "not writable" in message and "storage=FOLDER" in message


def test_a_runs_folder_that_is_a_file(data: Path) -> None:
    (data / "runs").mkdir()
    (data / "runs" / "test").write_text("")
    with pytest.raises(ClusterError, match="not writable"):
        open_folder(config(data))


def test_storage_without_permission(data: Path) -> None:
    folder = data / "runs"
    folder.mkdir(mode=0o500)
    try:
        (folder / "probe").touch()
    except PermissionError:
        with pytest.raises(ClusterError, match="not writable"):
            open_folder(config(data))
    else:
        pytest.skip("this user may write anywhere: permissions cannot be tested")


def test_errors_of_data_are_data_errors(data: Path) -> None:
    (data / "labelled" / "one.nii.gz").unlink()
    with pytest.raises(DataError):
        open_cohorts(config(data))

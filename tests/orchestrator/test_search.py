"""Searches whose trials are done before, or fail at once: all but the training."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from onelabel.configs.load import load
from onelabel.configs.schema import RunConfig
from onelabel.errors import ClusterError, ConfigError
from onelabel.orchestrator import search, trials
from onelabel.orchestrator.rounds import plan
from onelabel.orchestrator.tracking import Tracker, open_client
from onelabel.orchestrator.trials import Trial

K, BINS = "stages.*.select.k", "synthesis.bins.background"
SPACE = [f"search.space.{K}=[2, 3]", f"search.space.{BINS}=[[3, 4], [6, 8]]"]
OPTUNA = ["search.sampler=optuna", "search.trials=6", "search.halving={grace: 1, keep: 2}"]


def searched(folder: Path, *items: str) -> tuple[RunConfig, RunConfig]:
    """The settings of a search of scans that do not exist, and those of its trials."""
    data = "data={labelled: /nowhere/one.nii.gz, unlabelled: /nowhere}"
    config = load(["singlestrip", data, "name=wide", f"storage={folder}", *SPACE, *items])
    return config, config.model_copy(update={"search": None, "storage": str(folder / "wide")})


def finish(one: Trial, value: float) -> None:
    """Leave what a run leaves of its rounds' figures."""
    one.keep()
    for now in plan(one.config, one.folder):
        now.folder.mkdir(parents=True)
        now.commit({"unlabelled": {"expected_dice_mean": value}})
    (one.folder / "report.html").touch()


def tried(config: RunConfig, common: RunConfig) -> list[Trial]:
    """Ray Tune's part of a search, and all trials of it."""
    search._tune(config, common, trials.points(config), "expected_dice", 2)
    assert not (Path(common.storage) / "tune").exists()
    return search._ranked(trials.known(common), "expected_dice")


def test_trials_that_fail_are_rows_and_stop_nothing(ray_cluster: None, tmp_path: Path) -> None:
    config, common = searched(tmp_path, "search.space.synthesis.bins.method=[quantile]")
    points = trials.points(config)
    for place, point in enumerate(points[:2]):
        finish(trials.trial(common, point), 0.7 + 0.1 * place)
    found = tried(config, common)
    assert [one.point for one in found[:2]] == [points[1], points[0]]
    assert [bool(one.error) for one in found] == [False, False, True, True]
    assert all(one.error and "/nowhere/one.nii.gz" in one.error for one in found[2:])


@pytest.mark.parametrize("items", [OPTUNA, ["search.sampler=random", *OPTUNA[1:]], OPTUNA[2:]])
def test_what_was_tried_before_is_told_again(ray_cluster: None, tmp_path: Path, items: list[str]) -> None:
    config, common = searched(tmp_path, *items)
    points = trials.points(searched(tmp_path)[0])
    for place, point in enumerate(points):
        finish(trials.trial(common, point), 0.6 + 0.1 * place)
    found = tried(config, common)
    assert [one.point for one in found] == points[::-1]
    assert not any(one.error for one in found)


def test_the_best_settings_and_the_page_are_left(tmp_path: Path) -> None:
    config, common = searched(tmp_path)
    for place, point in enumerate(trials.points(config)[:3]):
        finish(trials.trial(common, point), 0.9 - 0.1 * place)
    with Tracker(config, tmp_path / "wide") as tracker:
        ranked = search._ranked(trials.known(common), "expected_dice")
        found = search.Found(tmp_path / "wide", "expected_dice", ranked, tracker.command())
        search._record(config, found, tracker)
    best = load([str(tmp_path / "wide" / "best.yaml")])
    assert best == trials.trial(common, trials.points(config)[0]).config.model_copy(
        update={"name": "wide-best", "storage": config.storage}
    )
    assert all(Path(place).exists() for name, place in found.places().items() if name != "losses and measures")
    run = open_client(tracker.uri).get_run(tracker.run_id)
    assert run.data.metrics == {"expected_dice": 0.9}


def test_a_search_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    config, common = searched(tmp_path)
    trials.trial(common, {K: 2, BINS: [3, 4]}).fail(ClusterError("no room"))
    (one,) = trials.known(common)
    with (
        Tracker(config, tmp_path / "wide") as tracker,
        pytest.raises(ClusterError, match="none of 1 trials .* no room"),
    ):
        search._record(config, search.Found(tmp_path / "wide", "expected_dice", [one], ""), tracker)


@pytest.fixture
def heads(tmp_path: Path, write_scan: Any) -> list[str]:
    """Settings that name a labelled scan and three others."""
    import nibabel as nib
    import numpy as np

    image = nib.load(write_scan(tmp_path / "one.nii.gz"))
    mask = (image.get_fdata() > 500).astype(np.uint8)
    nib.save(nib.Nifti1Image(mask, image.affine), tmp_path / "one_mask.nii.gz")
    for place in range(3):
        write_scan(tmp_path / "many" / f"{place}.nii.gz", seed=place)
    return [f"data={{labelled: {tmp_path}/one.nii.gz, unlabelled: {tmp_path}/many}}", f"storage={tmp_path}/runs"]


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        ([f"search.space.{K}=[2, 30]"], r"gives stages\.\*\.select\.k = 30.*: stage 'base' selects k = 30"),
        (
            ["search.space.sede=[1, 2]"],
            r"gives .*sede = 1.*: unknown config key 'sede'; the nearest known key is 'seed'",
        ),
        (["search.space.stages.*.ranker.steps=[1, 2]"], "one and the same run"),
        (["search.objective=test_dice"], "set data.test"),
        (["search=null"], "nothing to search"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(heads: list[str], items: list[str], problem: str) -> None:
    config = load(["singlestrip", *heads, *SPACE, *items])
    with pytest.raises(ConfigError, match=problem) as caught:
        search.search(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.storage).exists()


def test_what_would_end_with_a_job_is_refused(
    heads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterError, match="storage 'here' lies in the folder of a submitted job"):
        search.search(load(["singlestrip", *heads, *SPACE, "storage=here"]))
    assert not (tmp_path / "here").exists()


def test_a_folder_of_another_search_is_refused(heads: list[str], tmp_path: Path) -> None:
    record = tmp_path / "runs" / "singlestrip" / "search.yaml"
    record.parent.mkdir(parents=True)
    record.write_text(yaml.safe_dump({"seed": 99}))
    with pytest.raises(ConfigError, match="holds a run with another .*seed"):
        search.search(load(["singlestrip", *heads, *SPACE]))

"""A search on real Ray and two cores: killed, gone on with, robbed of a worker; and what its trials share."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from processes import wait_for

from onelabel.configs.load import load
from onelabel.orchestrator import trials
from onelabel.orchestrator.tracking import open_client

K, BINS = "stages.*.select.k", "synthesis.bins.background"
SPACE = {K: [2, 3, 4], BINS: [[6, 8]]}


@pytest.fixture(scope="module")
def settings(heads: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small search over a YAML file of its own, with the smoke preset stacked on it."""
    folder = tmp_path_factory.mktemp("search")
    data = {group: str(heads / f"{group}.csv") for group in ("labelled", "unlabelled")}
    search = {"search": {"space": SPACE}, "name": "tiny", "storage": str(folder), "data": data}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(search))
    return ["singlestrip", str(folder / "tiny.yaml"), "smoke", "stages.1.rounds=1", "compute.checkpoint_every_s=0"]


@pytest.fixture(scope="module")
def folder(settings: list[str]) -> Path:
    config = load(settings)
    return Path(config.storage) / config.name


@contextmanager
def started(settings: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A search that is killed at the end, if it goes on, with all that it started."""
    command = [sys.executable, "-m", "onelabel.orchestrator", "search", *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.kill()
            process.wait()
            for survivor in psutil.wait_procs(family, timeout=10)[1]:
                survivor.kill()  # Ray's agents outlive the node by minutes


@pytest.fixture(scope="module")
def output(settings: list[str], folder: Path) -> str:
    """What the last of two attempts printed. The first is killed, the second loses a worker; one trial is spoilt."""
    with started(settings) as first:
        wait_for(lambda: any(folder.glob("bases/*/round-00/done")), first)
    spoilt = spoilt_trial(settings, folder)
    assert not spoilt.exists()
    spoilt.mkdir(parents=True)
    (spoilt / "config.yaml").write_text("{seed: 99}")
    with started(settings) as second:
        family = wait_for(lambda: any(folder.glob("trials/*/round-01/training/checkpoint_*")), second)
        assert [worker for worker in family if lost(worker)]
        printed, _ = second.communicate(timeout=1800)
    assert second.returncode == 1, printed.decode()[-3000:]  # one trial is spoilt
    return printed.decode()


def lost(process: psutil.Process) -> bool:
    """Kill a process that leads a trial; whether it was one."""
    try:
        if "ImplicitFunc" not in " ".join(process.cmdline()):
            return False
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def spoilt_trial(settings: list[str], folder: Path) -> Path:
    """The folder of the trial that comes last."""
    common = load(settings).model_copy(update={"storage": str(folder), "search": None})
    return trials.trial(common, {K: 4, BINS: [6, 8]}).folder


def test_every_trial_is_a_row(output: str, folder: Path) -> None:
    assert len(list(folder.glob("trials/*/point.json"))) == 3
    assert len(list(folder.glob("trials/*/round-01/done"))) == 2
    assert "holds a run with another" in output
    assert "2 of 3" in (folder / "report.html").read_text(encoding="utf-8")
    assert not (folder / "tune").exists()


def test_the_first_stage_is_trained_once_for_all_k(output: str, folder: Path) -> None:
    client = open_client(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("onelabel")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    names = [run.info.run_name for run in runs if client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(names) == ["round-00 base"] + ["round-01 selftrain"] * 2


def test_trials_are_nested_runs(output: str, folder: Path) -> None:
    client = open_client(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("onelabel")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs["tiny"]
    nested = [run for run in runs.values() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    tried = [run for run in nested if run.info.run_name.startswith("k-")]
    assert {(run.data.params["stages.0.select.k"], run.info.status) for run in tried} == {
        ("[2]", "FINISHED"),
        ("[3]", "FINISHED"),
    }
    assert all("unlabelled_expected_dice_mean" in run.data.metrics for run in tried)
    assert {run.info.status for run in nested} == {"FINISHED"}
    assert parent.data.metrics["expected_dice"] == max(
        run.data.metrics["unlabelled_expected_dice_mean"] for run in tried
    )


def test_the_best_settings_are_those_of_the_best_trial(output: str, folder: Path) -> None:
    config = load([str(folder / "best.yaml")])
    assert config.search is None and config.tracking.parent is None
    best = next(line.split(": ", 1)[1] for line in output.splitlines() if line.startswith("best run: "))
    tried = load([str(Path(best) / "config.yaml")])
    own = {"name": tried.name, "storage": tried.storage, "tracking": tried.tracking}
    assert config.model_copy(update=own) == tried

"""The whole of a run on real Ray, real MLflow and real NIfTI; and what faults must not change."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pyarrow.parquet as pq
from processes import assert_same_run, kill_once, wait_for

from onelabel.orchestrator.tracking import open_client

Command = Callable[..., list[str]]
Finished = tuple[Path, subprocess.CompletedProcess[str]]


def test_run_leaves_every_round_complete(finished: Finished) -> None:
    folder, process = finished
    assert process.returncode == 1, process.stderr[-3000:]  # one scan is broken
    assert "2 of 2" in (folder / "report.html").read_text(encoding="utf-8")
    for number in ("round-00", "round-01"):
        scores = pq.read_table(folder / number / "scores.parquet").to_pylist()
        assert {row["key"] for row in scores} == {"broken", *(f"head{i}" for i in range(1, 6))}
        failed = [row for row in scores if row["error"]]
        assert [row["key"] for row in failed] == ["broken"]
        assert failed[0]["score"] is None
        assert "broken" in failed[0]["error"]
        selected = pq.read_table(folder / number / "selection.parquet").to_pylist()
        best = sorted((row for row in scores if not row["error"]), key=lambda row: (-row["score"], row["key"]))
        assert [row["key"] for row in selected] == [row["key"] for row in best[:2]]
        metrics = json.loads((folder / number / "metrics.json").read_text())
        assert metrics["test"]["scans"] == 2
        assert (folder / number / "best-and-worst.png").stat().st_size > 10_000
        for row in scores:
            if row["mask"]:
                mask, image = nib.load(row["mask"]), nib.load(row["image"])
                assert mask.shape == image.shape
                assert np.allclose(mask.affine, image.affine)


def test_run_learns(finished: Finished) -> None:
    folder, _ = finished
    metrics = json.loads((folder / "round-01/metrics.json").read_text())
    assert metrics["test"]["dice_mean"] > 0.7  # nothing learned gives 0.1 to 0.4


def test_run_is_logged(finished: Finished) -> None:
    folder, _ = finished
    client = open_client(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("onelabel")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {"singlestrip", "round-00 base", "round-01 selftrain", "ranker autoencoder"} <= set(runs)
    assert runs["singlestrip"].data.params["stages.0.steps"] == "40"
    base = runs["round-00 base"]
    assert base.data.tags["mlflow.parentRunId"] == runs["singlestrip"].info.run_id
    steps = [metric.step for metric in client.get_metric_history(base.info.run_id, "loss")]
    assert steps == list(range(5, 41, 5))
    assert {"wait_share", "steps_per_s", "test_dice_mean", "selection_score_mean"} <= set(base.data.metrics)
    artifacts = {item.path for item in client.list_artifacts(base.info.run_id)}
    assert {"checkpoint", "selection.parquet", "best-and-worst.png"} <= artifacts


def test_killed_actors_and_drivers_change_nothing(finished: Finished, command: Command, tmp_path: Path) -> None:
    """A run loses its synthesis actors, then its driver while the ranker trains; the same command completes it."""
    run = tmp_path / "singlestrip"
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: any(run.glob("round-00/training/checkpoint_*")), process)
    assert kill_actors(process)
    segmenter = "round-00/training/checkpoint_*/weights/round-00 base/weights.pt"
    kill_once(lambda: any(run.glob(segmenter)), process)
    assert not (run / "round-00/checkpoint").exists()
    last = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False, timeout=1200)
    assert last.returncode == 1, last.stderr[-3000:]
    assert_same_run(run, finished[0])
    assert not list(run.glob("**/training"))


def kill_actors(driver: "subprocess.Popen[bytes]") -> int:
    """End those that synthesise; how many."""
    family = psutil.Process(driver.pid).children(recursive=True)
    actors = [process for process in family if "SynthActor" in " ".join(process.cmdline())]
    for actor in actors:
        actor.kill()
    return len(actors)

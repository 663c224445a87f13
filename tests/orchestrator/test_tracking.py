import json
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onelabel.configs.load import dump, parse
from onelabel.configs.schema import RunConfig
from onelabel.errors import ClusterError
from onelabel.imaging.storage import path_of
from onelabel.orchestrator import database
from onelabel.orchestrator.tracking import MAX_VALUE, PastRun, Tracker, flatten, open_client


def config(**settings: object) -> RunConfig:
    stage = {"name": "base", "steps": 7, "start": "scratch", "streams": {"train": [{"type": "synthetic"}]}}
    return parse({"name": "trial", "data": {"labelled": "scan.nii.gz"}, "stages": [stage], **settings})


def loss(step: float) -> dict[str, float]:
    return {"step": step, "loss": 1 / step, "dice": math.nan}


def test_a_tracker_may_be_opened_while_mlflow_is_still_imported(tmp_path: Path) -> None:
    dump(config(), tmp_path / "config.yaml")
    program = (
        "from pathlib import Path; from onelabel.configs.load import load;"
        "from onelabel.orchestrator.tracking import Tracker, preload;"
        "config = load(['config.yaml']); preload(); Tracker(config, Path())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended well: a database takes a second to make."""
    folder = tmp_path_factory.mktemp("runs") / "trial"
    folder.mkdir()
    picture = folder / "picture.png"
    picture.write_bytes(b"png")
    with Tracker(config(), folder) as tracker:
        for index in range(2):
            with tracker.round(f"round-{index:02d}") as track:
                thread = threading.Thread(
                    target=lambda record: [record(loss(step)) for step in (1, 2)], args=[track.losses]
                )
                thread.start()
                thread.join()
                track.metrics({"dice": 0.5 + index / 10, "bad": math.inf})
                track.artifact(picture, "pictures")
                tracker.metrics({"dice": 0.5 + index / 10}, step=index)
    return folder


@pytest.fixture
def client(folder: Path) -> Any:
    return open_client(f"sqlite:///{folder}/mlflow.db")


@pytest.fixture
def runs(client: Any) -> dict[str, str]:
    """Names of all MLflow runs to their ids."""
    experiment = client.get_experiment_by_name("onelabel")
    assert experiment is not None
    return {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}


def history(client: Any, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def test_all_parameters_are_logged(client: Any, runs: dict[str, str]) -> None:
    logged = client.get_run(runs["trial"]).data.params
    assert logged == flatten(config().model_dump(mode="json"))
    assert logged["stages.0.steps"] == "7" and logged["grid.size"] == "[96, 128, 128]" and logged["seed"] == "0"


def test_rounds_are_nested(client: Any, runs: dict[str, str]) -> None:
    for name in ("round-00", "round-01"):
        run = client.get_run(runs[name])
        assert run.data.tags["mlflow.parentRunId"] == runs["trial"]
        assert run.info.status == "FINISHED"
    assert history(client, runs["trial"], "dice") == [(0, 0.5), (1, 0.6)]


def test_losses_stand_at_their_steps(client: Any, runs: dict[str, str]) -> None:
    assert history(client, runs["round-01"], "loss") == [(1, 1.0), (2, 0.5)]
    assert history(client, runs["round-01"], "dice") == [(0, 0.6)]  # what is not finite was left out
    assert set(client.get_run(runs["round-01"]).data.metrics) == {"loss", "dice"}


def test_artifacts_are_on_disk(client: Any, runs: dict[str, str], folder: Path) -> None:
    assert [file.path for file in client.list_artifacts(runs["round-00"], "pictures")] == ["pictures/picture.png"]
    assert len(list((folder / "mlartifacts").rglob("picture.png"))) == 2


def test_the_command_opens_the_record(folder: Path) -> None:
    tracker = Tracker(config(), folder)
    assert tracker.command() == f"mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db"
    tracker.close()


def test_the_record_of_a_job_outlives_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    run = path_of("s3://lab/runs/study")
    own, given = f"sqlite:///{database.home(run)}/mlflow.db", "postgresql://lab/records"
    assert [database.command(uri, run) for uri in (own, given)] == [
        f"mlflow ui --backend-store-uri {uri}" for uri in (own, given)
    ]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert database.command(own, run).endswith(f"a copy of {run}/mlflow.db")
    assert database.command(given, run).endswith(given)


def test_a_resumed_run_goes_on(folder: Path, client: Any, runs: dict[str, str]) -> None:
    killed = Tracker(config(), folder)
    killed.round("round-02").losses(loss(1))  # and nothing is closed
    with Tracker(config(compute={"ahead": 9}), folder) as tracker:
        assert tracker.run_id == killed.run_id == runs["trial"]
        with tracker.round("round-02") as again:
            again.losses(loss(2))
        assert tracker.round("round-00").run_id == runs["round-00"]
    assert history(client, again.run_id, "loss") == [(1, 1.0), (2, 0.5)]
    run = client.get_run(runs["trial"])
    assert run.data.params["compute.ahead"] == "6" and run.data.tags["changed.compute.ahead"] == "9"
    assert run.info.status == "FINISHED"


def test_a_failure_is_marked(folder: Path, client: Any) -> None:
    with pytest.raises(ZeroDivisionError), Tracker(config(), folder) as tracker, tracker.round("round-03") as track:
        raise ZeroDivisionError
    assert {client.get_run(item.run_id).info.status for item in (tracker, track)} == {"FAILED"}


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Path:
    """A folder with a database that is ready, which takes less time than another one."""
    shutil.copy(folder / "mlflow.db", tmp_path)
    return tmp_path


def test_lost_runs_begin_anew(other: Path, caplog: pytest.LogCaptureFixture) -> None:
    lost = "0" * 32
    (other / "mlflow.json").write_text(json.dumps({"run": lost, "rounds": {"round-00": lost}}))
    with Tracker(config(), other) as tracker, tracker.round("round-00") as track:
        assert lost not in {tracker.run_id, track.run_id}
    assert json.loads((other / "mlflow.json").read_text()) == {
        "run": tracker.run_id,
        "rounds": {"round-00": track.run_id},
    }
    assert caplog.text.count("a new one begins") == 1


def test_a_record_that_fails_is_only_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Tracker(config(), folder) as tracker:
        tracker.metrics({"no such $name": 1.0})
        tracker.artifact(folder / "missing")
    assert [record.levelname for record in caplog.records if record.name.startswith("onelabel")] == ["WARNING"] * 2
    assert not (folder / "mlflow-waiting.jsonl").exists()


@pytest.fixture
def deaf_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://user:secret@127.0.0.1:{server.getsockname()[1]}"


def test_what_a_server_that_is_not_there_should_know_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin = time.monotonic()
    with Tracker(config(tracking={"uri": "http://127.0.0.1:9"}), tmp_path) as tracker:
        with tracker.round("round-00") as track:
            track.losses(loss(1))
        assert (tracker.run_id, track.run_id) == (None, None)
    assert time.monotonic() - begin < 10
    waiting = [json.loads(line) for line in (tmp_path / "mlflow-waiting.jsonl").read_text().splitlines()]
    assert [(entry["run"], entry["what"]) for entry in waiting] == [
        *(("", what) for what in ("begin", "parameters")),
        *(("round-00", what) for what in ("begin", "metrics", "end")),
        ("", "end"),
    ]
    assert "MLflow does not answer (" in caplog.text and "Connection refused" in caplog.text
    assert "6 records for MLflow wait in" in caplog.text


def test_what_waited_is_handed_over_in_order_and_once(other: Path) -> None:
    away, there = {"uri": "http://127.0.0.1:9"}, {"uri": f"sqlite:///{other}/mlflow.db", "experiment": "late"}
    picture = other / "picture.png"
    picture.write_bytes(b"png")
    with Tracker(config(tracking=away), other) as tracker, tracker.round("round-00") as track:
        track.losses(loss(1))
        track.artifact(picture)
    with Tracker(config(tracking=there), other) as tracker, tracker.round("round-00") as track:
        track.losses(loss(2))
    assert not (other / "mlflow-waiting.jsonl").exists()
    client = open_client(there["uri"])
    assert history(client, str(track.run_id), "loss") == [(1, 1.0), (2, 0.5)]
    assert [file.path for file in client.list_artifacts(track.run_id)] == ["picture.png"]
    found = {
        run.info.run_name: run.info for run in client.search_runs([client.get_run(tracker.run_id).info.experiment_id])
    }
    assert set(found) == {"trial", "round-00"}
    assert {info.status for info in found.values()} == {"FINISHED"}


def test_a_server_that_does_not_answer(
    tmp_path: Path, deaf_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "onelabel.orchestrator.tracking.IMPATIENCE",
        {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"},
    )
    Tracker(config(tracking={"uri": deaf_server}), tmp_path)
    assert "timed out" in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize("uri", ["sqlite:///{}/config.yaml", "sqlite:////dev/null/no.db", "nonsense://x"])
def test_what_is_no_mlflow_is_refused(tmp_path: Path, uri: str) -> None:
    uri = uri.format(tmp_path)
    dump(config(), tmp_path / "config.yaml")
    with pytest.raises(ClusterError, match=f"MLflow at '{uri}' cannot be used"):
        Tracker(config(tracking={"uri": uri}), tmp_path)


def test_a_database_of_ones_own(other: Path) -> None:
    uri = f"sqlite:///{other}/mlflow.db"
    (other / "trial").mkdir()
    with Tracker(config(tracking={"uri": uri, "experiment": "another"}), other / "trial") as tracker:
        assert open_client(uri).get_experiment_by_name("another") is not None
    assert tracker.command().endswith(uri)
    assert not (other / "trial" / "mlflow.db").exists()


def test_values_stay_within_the_limits(other: Path) -> None:
    where = {f"column{i}": "x" * 2 * MAX_VALUE for i in range(150)}
    with Tracker(config(data={"labelled": {"path": "scan.nii.gz", "where": where}}), other) as tracker:
        logged = open_client(tracker.uri).get_run(tracker.run_id).data.params
    assert len(logged["data.labelled.where.column149"]) == MAX_VALUE


def test_flatten() -> None:
    nested = {"a": {"b": [1, 2], "c": []}, "d": [{"e": None}, {"e": "x"}], "f": {}}
    assert flatten(nested) == {"a.b": "[1, 2]", "a.c": "[]", "d.0.e": "None", "d.1.e": "x", "f": "{}"}


def test_a_past_run_is_read(folder: Path, client: Any, runs: dict[str, str]) -> None:
    before = client.get_run(runs["trial"]).info.status
    past = PastRun(config(), folder)
    found = past.histories(["loss", "no such"])
    assert found["round-01"] == {"loss": {1: 1.0, 2: 0.5}, "no such": {}}
    past.artifact(folder / "picture.png", "later")
    assert [file.path for file in client.list_artifacts(runs["trial"], "later")] == ["later/picture.png"]
    assert client.get_run(runs["trial"]).info.status == before and not past.copied


def test_of_a_step_that_was_repeated_the_later_value_counts(other: Path) -> None:
    with Tracker(config(), other) as tracker, tracker.round("round-00") as track:
        for value in (3.0, 2.0):
            track.losses({"step": 5, "loss": value})
            time.sleep(0.002)  # MLflow counts milliseconds
    assert PastRun(config(), other).histories(["loss"]) == {"round-00": {"loss": {5: 2.0}}}


def test_a_copy_is_known_as_one(folder: Path, tmp_path: Path) -> None:
    for name in ("mlflow.db", "mlflow.json"):
        shutil.copy(folder / name, tmp_path)
    assert PastRun(config(), tmp_path).copied


@pytest.mark.parametrize("left", [None, "mlflow.json", "mlflow.db"])
def test_a_record_that_is_not_there_is_not_made(left: str | None, folder: Path, tmp_path: Path) -> None:
    if left:
        shutil.copy(folder / left, tmp_path)
    with pytest.raises(ClusterError, match="has no record in MLflow"):
        PastRun(config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ([left] if left else [])

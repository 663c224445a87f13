"""Runs that log to MLflow's own server, on PostgreSQL; and what a server that dies costs them: nothing."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import assert_same_run, wait_for

from onelabel.orchestrator.tracking import open_client

pytestmark = pytest.mark.e2e

Command = Callable[..., list[str]]
BINARIES = (*map(Path, os.environ["PATH"].split(os.pathsep)), *sorted(Path("/usr/lib/postgresql").glob("*/bin")))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def await_true(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 600
    while not ready():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come up")
        time.sleep(0.2)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """The address of a database; PostgreSQL will not run as root."""
    found = next((folder for folder in BINARIES if (folder / "initdb").is_file()), None)
    if found is None:
        pytest.skip("PostgreSQL's initdb is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg2")
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    if user and not shutil.which("setpriv"):
        pytest.skip("PostgreSQL refuses root, and there is no setpriv to be another user")
    with tempfile.TemporaryDirectory(prefix="postgresql") as folder:
        if user:
            os.chown(folder, 65534, 65534)
        made = [found / "initdb", "--pgdata", f"{folder}/data", "--username=mlflow", "--auth=trust", "--no-sync"]
        subprocess.run([*user, *made], cwd=folder, check=True, capture_output=True)
        port = free_port()
        settings = ["-p", str(port), "-k", "", "-h", "127.0.0.1", "-F"]
        server = subprocess.Popen([*user, found / "postgres", "-D", f"{folder}/data", *settings], cwd=folder)
        try:
            await_true(lambda: listens(port), "PostgreSQL")
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()
            server.wait()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class Server:
    """MLflow's server, which can be killed and started again."""

    def __init__(self, database: str, folder: Path) -> None:
        self.port = free_port()
        self.uri, self._process = f"http://127.0.0.1:{self.port}", None
        self._command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database]
        self._command += ["--artifacts-destination", folder.as_uri(), "--host=127.0.0.1", f"--port={self.port}"]
        self._command += ["--workers=1"]

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, start_new_session=True)
        await_true(self._healthy, "MLflow's server")

    def kill(self) -> None:
        if self._process:
            os.killpg(self._process.pid, 9)
            self._process.wait()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture
def server(postgresql: str, tmp_path: Path) -> Iterator[Server]:
    started = Server(postgresql, tmp_path / "artifacts")
    started.start()
    yield started
    started.kill()


def assert_logged(uri: str, experiment: str) -> None:
    """All of a run: parameters, every loss, figures, artifacts, and that it has ended."""
    client = open_client(uri)
    known = client.get_experiment_by_name(experiment)
    assert known is not None
    runs = {run.info.run_name: run for run in client.search_runs([known.experiment_id])}
    assert set(runs) == {"singlestrip", "round-00 base", "round-01 selftrain", "ranker autoencoder"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    top = runs.pop("singlestrip")
    assert (
        top.data.params["stages.0.steps"] == "40"
        and len(client.get_metric_history(top.info.run_id, "test_dice_mean")) == 2
    )
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {top.info.run_id}
    for name, last in (("round-00 base", 40), ("round-01 selftrain", 20)):
        steps = {metric.step for metric in client.get_metric_history(runs[name].info.run_id, "loss")}
        assert steps == set(range(5, last + 1, 5))
        artifacts = {item.path for item in client.list_artifacts(runs[name].info.run_id)}
        assert {"checkpoint", "scores.parquet", "selection.parquet", "test.parquet", "best-and-worst.png"} <= artifacts
    assert {"report", "report.html"} <= {item.path for item in client.list_artifacts(top.info.run_id)}


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)


def test_a_server_that_is_killed_and_comes_back(
    server: Server, command: Command, finished: tuple[Path, object], tmp_path: Path
) -> None:
    """Down at the start, up, down in the middle, and up again when the same command is given once more."""
    folder = tmp_path / "singlestrip"
    asked = command(tmp_path, f"tracking.uri={server.uri}", "tracking.experiment=back")
    server.kill()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=log)
        wait_for(lambda: (folder / "mlflow-waiting.jsonl").is_file(), process)
        server.start()
        wait_for(lambda: (folder / "round-00" / "done").is_file(), process)
        server.kill()
        assert process.wait(timeout=3600) == 1, (tmp_path / "log").read_text()[-3000:]
    assert "records for MLflow wait in" in (tmp_path / "log").read_text()
    assert_same_run(folder, finished[0])
    server.start()
    again = run(asked)
    assert again.returncode == 1, again.stderr[-3000:]
    assert not (folder / "mlflow-waiting.jsonl").exists()
    assert run([sys.executable, "-m", "onelabel.orchestrator", "report", str(folder)]).returncode == 0
    assert_logged(server.uri, "back")
    assert not list(folder.glob("mlflow*.db*")) + list(folder.glob("*.jsonl"))

"""A run that lies in an object store, scans included: cut off from its store, gone on with, used."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import SETTINGS
from processes import assert_same_run, wait_for
from pyarrow import fs

from onelabel.imaging.storage import StorePath, path_of

pytestmark = pytest.mark.e2e

GROUPS = ("labelled", "unlabelled", "test")
Ended, Console = subprocess.CompletedProcess[str], Callable[..., int]


class Shop:
    """An S3 server that can be closed and opened again, with all that it holds."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self._open: Callable[[int], Any] = lambda port: ThreadedMotoServer("127.0.0.1", port, verbose=False)
        self.running, self.port = self._open(0), 0
        self.open()

    def open(self) -> None:
        self.running = self._open(self.port)
        self.running.start()
        self.port = self.running.get_host_and_port()[1]

    def close(self) -> None:
        self.running.stop()


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    shop = Shop()
    settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{shop.port}", "AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (settings | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}).items():
            patch.setenv(name, value)
        fs.FileSystem.from_uri("s3://lab?allow_bucket_creation=true")[0].create_dir("lab")
        yield shop
    shop.close()


@pytest.fixture(scope="module")
def scans(shop: Shop, heads: Path) -> StorePath:
    """The phantom heads and their manifests, in the store."""
    folder = path_of("s3://lab/heads")
    assert isinstance(folder, StorePath)
    for file in heads.rglob("*"):
        if file.is_file():
            (folder / file.relative_to(heads).as_posix()).upload(file)
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which commands are given: MLflow's database of a run in a store lies there."""
    return tmp_path_factory.mktemp("here")


def asked(scans: StorePath, storage: StorePath | str) -> list[str]:
    data = [f"data.{group}={scans / group}.csv" for group in GROUPS]
    # a store that is gone does not come back: no second try
    return ["run", *SETTINGS, *data, f"storage={storage}", "compute.max_failures=0"]


def done(command: list[str], here: Path) -> Ended:
    return subprocess.run(
        command, cwd=here, env=environment(), capture_output=True, text=True, check=False, timeout=3600
    )


def begun(command: list[str], here: Path) -> "subprocess.Popen[bytes]":
    with (here / "log").open("wb") as log:
        return subprocess.Popen(command, cwd=here, env=environment(), stdout=subprocess.DEVNULL, stderr=log)


def environment() -> dict[str, str]:
    """Commands are given in another folder than the checkout's."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def checkpoints(run: StorePath, number: int) -> bool:
    return any(True for _ in run.glob(f"round-{number:02d}/training/checkpoint_*"))


@pytest.fixture(scope="module")
def resumed(shop: Shop, scans: StorePath, here: Path) -> tuple[StorePath, Ended]:
    """A run cut off from its store in its second training, then gone on with."""
    storage = scans.parent / "runs"
    run, command = storage / "singlestrip", [sys.executable, "-m", "onelabel.orchestrator", *asked(scans, storage)]
    process = begun(command, here)
    wait_for(lambda: checkpoints(run, 1), process)
    shop.close()
    assert process.wait(timeout=1800) == 2
    shop.open()
    assert (run / "round-00" / "done").is_file() and not (run / "round-01" / "done").exists()
    return run, done(command, here)


def test_a_disturbed_run_in_a_store_ends_as_one_on_a_disk(
    resumed: tuple[StorePath, Ended], finished: tuple[Path, Any], tmp_path: Path
) -> None:
    run, last = resumed
    assert last.returncode == 1, last.stderr[-3000:]  # one scan is broken
    run.download(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished[0])
    for row in pq.read_table(tmp_path / "run/round-01/scores.parquet").to_pylist():
        assert row["image"].startswith("s3://lab/heads/")
        assert row["error"] or path_of(row["mask"]).is_file()
    assert not list((tmp_path / "run").glob("**/training"))
    ours, theirs = (
        {path.relative_to(folder) for path in folder.glob("round-*/**/*") if path.is_file()}
        for folder in (tmp_path / "run", finished[0])
    )
    assert ours == theirs


def test_its_record_lies_here_with_a_copy_there(resumed: tuple[StorePath, Ended], here: Path) -> None:
    run, last = resumed
    (database,) = (here / "mlruns").glob("singlestrip-*/mlflow.db")
    assert f"sqlite:///{database}" in last.stdout
    assert (run / "mlflow.db").is_file() and (run / "report.html").is_file()


def test_other_commands_take_the_run(
    resumed: tuple[StorePath, Ended],
    scans: StorePath,
    here: Path,
    console: Console,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = resumed
    monkeypatch.chdir(here)
    assert console("status", run) == 0
    assert capsys.readouterr().out.count("done") == 2
    monkeypatch.chdir(tmp_path)  # where no record lies
    assert console("report", run, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "2 of 2" in page and "Training of the network" in page and "cannot be shown" not in page
    out = scans.parent / "stripped"
    assert console("strip", scans / "head1.nii.gz", "--checkpoint", run, "--out", out) == 0
    for masks, truth in ((out / "head1_mask.nii.gz", scans / "head1_mask.nii.gz"), (run / "round-01/masks", scans)):
        assert console("evaluate", masks, truth, "--out", tmp_path / "agreement.csv") == 0


def test_a_store_that_goes_is_one_sentence(resumed: tuple[StorePath, Ended], here: Path) -> None:
    said = (here / "log").read_text()
    assert "Traceback" not in said and "the same command" in said.splitlines()[-1], said[-3000:]


@pytest.mark.parametrize(
    ("storage", "problem"),
    [("s3://no-such-bucket/runs", "NO_SUCH_BUCKET"), ("s3://KEY:secret@lab/runs", "password"), ("s4://lab", "s4")],
)
def test_storage_that_cannot_be_is_refused_at_once(
    storage: str, problem: str, scans: StorePath, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console(*asked(scans, storage)) == 2
    said = capsys.readouterr().err
    assert problem in said and "secret" not in said and len(said.strip().splitlines()) == 1, said

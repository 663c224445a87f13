"""Cohorts stripped by Ray: the same masks as one by one, whatever dies on the way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onelabel.imaging.places import HIDDEN
from onelabel.orchestrator.qc import NAME as PAGE
from onelabel.orchestrator.strip import strip
from onelabel.tasks import strip_pool
from onelabel.tasks.strip_record import TABLE

pytestmark = pytest.mark.e2e

REPO = Path(__file__).parent.parent.parent
SCANS = 40
WriteScan = Callable[..., Path]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory, write_scan: WriteScan) -> Path:
    """Scans that take some tenths of a second each."""
    folder = tmp_path_factory.mktemp("scans")
    for number in range(SCANS):
        write_scan(folder / f"{number:02d}.nii.gz", shape=(80, 90, 70), seed=number)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, write_scan: WriteScan) -> Path:
    """Four scans and one that is broken."""
    folder = tmp_path_factory.mktemp("few")
    for name in "abcd":
        write_scan(folder / f"{name}.nii.gz", seed=ord(name))
    (folder / "e.nii.gz").write_bytes(b"broken")
    return folder


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(out / TABLE).to_pylist()}


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}


def all_files(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*")}


def test_workers_write_the_same_masks_as_one_process(
    ray_cluster: None, trained: Path, few: Path, tmp_path: Path
) -> None:
    for workers in (1, 2):
        outcome = strip([str(few)], workers=workers, out=tmp_path / str(workers), checkpoint=trained)
        assert (outcome.scans, outcome.stripped, outcome.failed) == (5, 4, 1)
    alone, together = tmp_path / "1", tmp_path / "2"
    assert written(alone) == written(together)
    assert all_files(alone) == all_files(together) >= {TABLE, PAGE}
    same = ("key", "image", "volume_ml", "flags", "grid", "picture", "error_class", "error")
    for key, row in rows(alone).items():
        assert {name: row[name] for name in same} == {name: rows(together)[key][name] for name in same}
    assert strip([str(few)], workers=2, out=together, checkpoint=trained).kept == 4


@pytest.mark.parametrize("deaths", [1, 9])
def test_a_worker_that_dies_over_a_scan_costs_that_scan_at_most(
    ray_cluster: None, trained: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    died = tmp_path / "died"
    died.mkdir()

    class Dying(strip_pool.Worker):
        def __call__(self, batch: pa.Table) -> pa.Table:
            if batch["key"][0].as_py() == "b" and len(list(died.iterdir())) < deaths:
                (died / str(time.time_ns())).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return strip_pool.Worker.__call__(self, batch)

    monkeypatch.setattr(strip_pool, "Worker", Dying)
    outcome = strip([str(few)], workers=2, out=tmp_path / "out", checkpoint=trained)
    found = rows(tmp_path / "out")
    assert set(found) == set("abcde")
    if deaths == 1:
        assert (outcome.stripped, outcome.failed) == (4, 1)
    else:
        assert (outcome.stripped, outcome.failed) == (3, 2)
        assert len(list(died.iterdir())) == 2
        assert found["b"]["error_class"] == strip_pool.LOST
    assert HIDDEN not in all_files(tmp_path / "out")


# The command itself, and what is killed of it


def start(scans: Path, out: Path, trained: Path, workers: int) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(REPO)
    command = [sys.executable, "-m", "onelabel.orchestrator", "strip", str(scans), "--out", str(out)]
    options = ["--checkpoint", str(trained), "--workers", str(workers), "--threads", "1"]
    return subprocess.Popen(
        [*command, *options], cwd=out.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def until(happens: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Wait for something; the process must not end before."""
    end = time.monotonic() + 500
    while not (found := happens()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def masks(out: Path) -> list[Path]:
    return list(out.glob("*_mask.nii.gz"))


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes, which are ended with all that they started."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.terminate()
        process.communicate()


def test_a_killed_worker_is_replaced(
    trained: Path, scans: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out"
    process = start(scans, out, trained, workers=2)
    started.append(process)
    until(lambda: masks(out), process)
    children = psutil.Process(process.pid).children(recursive=True)
    worker = next(child for child in children if "MapWorker" in " ".join(child.cmdline()))
    worker.kill()
    said, warned = process.communicate(timeout=500)
    assert process.returncode == 0, warned
    assert f"{SCANS} stripped, " in said
    assert len(masks(out)) == SCANS
    assert all_files(out) == {*(path.name for path in masks(out)), TABLE, PAGE}


@pytest.mark.parametrize("workers", [1, 2])
def test_after_kill_9_the_same_command_does_only_what_is_missing(
    trained: Path, scans: Path, tmp_path: Path, started: list[subprocess.Popen[str]], workers: int
) -> None:
    out = tmp_path / "out"
    process = start(scans, out, trained, workers)
    started.append(process)
    until(lambda: list((out / HIDDEN).glob("part-*")) and len(masks(out)) >= 5, process)
    process.kill()
    process.communicate()
    recorded = [Path(row["mask"]) for part in (out / HIDDEN).glob("part-*") for row in pq.read_table(part).to_pylist()]
    assert recorded
    before = {path: path.stat().st_mtime_ns for path in recorded}
    assert len(before) < SCANS

    again = start(scans, out, trained, workers)
    started.append(again)
    said, warned = again.communicate(timeout=500)
    assert again.returncode == 0, warned
    assert f"{SCANS} stripped ({len(before)} of them before)" in said
    assert {path: path.stat().st_mtime_ns for path in recorded} == before
    assert len(masks(out)) == len(rows(out)) == SCANS
    assert all_files(out) == {*(path.name for path in masks(out)), TABLE, PAGE}

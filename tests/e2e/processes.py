"""Runs as processes, and what two of them must have in common."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch


def wait_for(reached: Callable[[], bool], process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """Until a condition holds; the processes that the run has started by then."""
    deadline = time.monotonic() + 900
    while not reached():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the run ended (exit code {process.poll()}) or stalled before what was waited for")
        time.sleep(0.02)
    return psutil.Process(process.pid).children(recursive=True)


def kill_once(reached: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Kill a run as soon as a condition holds."""
    family = wait_for(reached, process)
    process.kill()
    process.wait()
    for survivor in psutil.wait_procs(family, timeout=10)[1]:
        survivor.kill()  # Ray's agents outlive the node by minutes


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the network of a round."""
    loaded: dict[str, torch.Tensor] = torch.load(folder / "checkpoint/weights.pt", weights_only=True)
    return loaded


def assert_same_run(folder: Path, reference: Path) -> None:
    """Equal weights, bit for bit, and equal selections in all rounds."""
    rounds = sorted(path.name for path in reference.glob("round-*"))
    assert rounds and rounds == sorted(path.name for path in folder.glob("round-*"))
    for number in rounds:
        ours, theirs = weights(folder / number), weights(reference / number)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), number
        tables = [path / number / "selection.parquet" for path in (folder, reference)]
        assert tables[0].exists() == tables[1].exists(), number
        if tables[0].exists():
            selected = [pq.read_table(path)["key"].to_pylist() for path in tables]
            assert selected[0] == selected[1], number

"""What a run says when machines fail; whole runs stand in tests/e2e."""

import errno
from pathlib import Path

import pytest
import ray

from onelabel.errors import ClusterError, StorageError
from onelabel.orchestrator.driver import mendable


def test_a_full_disk_is_a_sentence() -> None:
    told = r"^storage 'runs' failed \(OSError: .*No space left.*\); mend it, and the same command goes on from here$"
    with pytest.raises(StorageError, match=told), mendable(Path("runs")):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/round-00/scores.parquet")


@pytest.mark.parametrize("error", [ray.exceptions.NodeDiedError("a node died"), ray.exceptions.GetTimeoutError("late")])
def test_a_cluster_that_fails_is_a_sentence(error: Exception) -> None:
    with pytest.raises(ClusterError, match=r"^the cluster failed \(.*\); the same command goes on") as caught:
        with mendable(Path("runs")):
            raise error
    assert not isinstance(caught.value, StorageError)


@pytest.mark.parametrize("error", [ZeroDivisionError("a mistake"), StorageError("said before")])
def test_mistakes_and_what_was_said_before_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=f"^{error}$"), mendable(Path("runs")):
        raise error

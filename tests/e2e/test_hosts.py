"""A run on three hosts that share nothing but an object store: it loses one in its training, another in its scoring."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SETTINGS
from hosts import Host, Net, net
from processes import assert_same_run, wait_for
from pyarrow import fs

from onelabel.imaging.storage import StorePath, path_of

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        "ONELABEL_HOSTS" not in os.environ,
        reason="three hosts on one machine take ten minutes: set ONELABEL_HOSTS=1",
    ),
]

GROUPS = ("labelled", "unlabelled", "test")
CLI = (sys.executable, "-m", "onelabel.orchestrator")


@pytest.fixture(scope="module")
def bridge() -> Iterator[Net]:
    try:
        with net() as bridge:
            yield bridge
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def environment(bridge: Net) -> Iterator[dict[str, str]]:
    """The way to an object store on this side of the bridge, for this process too; and the cluster's token."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(bridge.address, port=0, verbose=False)
    server.start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{bridge.address}:{server.get_host_and_port()[1]}",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fs.FileSystem.from_uri("s3://lab?allow_bucket_creation=true")[0].create_dir("lab")
        yield settings | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex()}
    server.stop()


@pytest.fixture(scope="module")
def scans(environment: dict[str, str], heads: Path) -> StorePath:
    folder = path_of("s3://lab/heads")
    assert isinstance(folder, StorePath)
    for file in heads.rglob("*"):
        if file.is_file():
            (folder / file.relative_to(heads).as_posix()).upload(file)
    return folder


def test_a_run_outlives_the_hosts_that_it_loses(
    bridge: Net,
    environment: dict[str, str],
    scans: StorePath,
    finished: tuple[Path, "subprocess.CompletedProcess[str]"],
    tmp_path: Path,
) -> None:
    head = bridge.host()
    head.ray(environment, tmp_path / "head.log", "--head", "--port=6379", "--num-cpus=0")

    def worker() -> Host:
        host = bridge.host()
        host.ray(environment, tmp_path / f"{host.address}.log", f"--address={head.address}:6379", "--num-cpus=2")
        return host

    workers = [worker(), worker()]

    def lose(title: str) -> None:
        """The power of the host on which such a process runs goes; another host takes its place."""
        place = next(place for place, host in enumerate(workers) if host.runs(title))
        workers[place].kill()
        workers[place] = worker()

    run, log = scans.parent / "runs/singlestrip", tmp_path / "run.log"
    data = [f"data.{group}={scans / group}.csv" for group in GROUPS]
    settings = [*SETTINGS, *data, f"storage={run.parent}", "compute.wait_s=600"]
    submitted = head.start([*CLI, "submit", *settings, "--address=http://127.0.0.1:8265"], environment, log)
    wait_for(lambda: any(True for _ in run.glob("round-00/training/checkpoint_*")), submitted)
    lose("RayTrainWorker")
    wait_for(anywhere(workers, "MapWorker"), submitted)
    lose("MapWorker")
    assert submitted.wait(timeout=3600) == 1, log.read_text()[-3000:]  # one scan is broken
    said = log.read_text()
    assert re.search(r"job \w+ failed", said) and "1 scans failed" in said, said[-3000:]
    assert f"a copy of {run}/mlflow.db" in said and (run / "mlflow.db").is_file()
    run.download(tmp_path / "run")
    assert_same_run(tmp_path / "run", finished[0])


def anywhere(hosts: list[Host], title: str) -> Callable[[], bool]:
    return lambda: any(host.runs(title) for host in hosts)

import logging
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from pyarrow import fs
    from ray_head import Head

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

REPO = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same global seeds before every test, from which networks are initialised; and one thread."""
    import torch

    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  libraries below may draw from it
    torch.manual_seed(0)


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The console script in this process; returns its exit code."""
    from onelabel.orchestrator import cli

    root = logging.getLogger()
    handlers, level = list(root.handlers), logging.getLogger("onelabel").level

    def call(*words: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["onelabel", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    yield call
    root.handlers = handlers
    logging.getLogger("onelabel").setLevel(level)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster of two CPUs for the whole session."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Head"]:
    """A Ray head that takes jobs from who holds its token."""
    pytest.importorskip("aiohttp_cors", reason="ray[default] is not installed")
    from ray_head import Head

    with tempfile.TemporaryDirectory(prefix="ray") as temp:  # sockets lie there: its path must be short
        started = Head(tmp_path_factory.mktemp("home"), Path(temp))
        yield started
        started.end()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 server on this machine: the environment that leads to it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    yield keys | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    running.stop()


@pytest.fixture
def bucket(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator["fs.FileSystem"]:
    """A bucket named `heads`, reached as the environment says; empty for each test."""
    from pyarrow import fs

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    store, _ = fs.FileSystem.from_uri("s3://heads?allow_bucket_creation=true")
    store.create_dir("heads")
    yield fs.SubTreeFileSystem("heads", store)
    store.delete_dir_contents("heads")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans: $ONELABEL_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("ONELABEL_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no scans at {folder}: set ONELABEL_DATA to a folder that holds them")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was never trained: of voxels of 8 mm, quick, and sure of nothing."""
    import torch

    from onelabel.configs.schema import UNetConfig
    from onelabel.models import checkpoint, networks

    config = UNetConfig(channels=(4, 4), patch=1)
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    grid = {"spacing_mm": (8.0, 8.0, 8.0), "size": (16, 16, 16)}
    meta = checkpoint.Meta(config.model_dump(mode="json"), "supervised", grid, step=0, seed=0, manifest_digest="")
    torch.manual_seed(22)  # its masks are neither empty nor full
    checkpoint.save(folder, networks.build(config), meta)
    return folder


@pytest.fixture(scope="session")
def write_scan() -> Callable[..., Path]:
    """Writes a small scan with an oblique affine whose qform and sform differ, and codes of their own."""
    import nibabel as nib

    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-6.0, 7.0, 9.0])
    affine[:3, 3] = (30, -40, 12.5)

    def write(path: Path, *, shape: tuple[int, ...] = (12, 14, 10), seed: int = 0, dtype: type = np.float32) -> Path:
        place = np.indices(shape[:3]) - (np.array(shape[:3]).reshape(3, 1, 1, 1) - 1) / 2
        head = (place**2).sum(0).reshape(*shape[:3], *(1 for _ in shape[3:])) < 16
        data = ((np.random.default_rng(seed).random(shape) + 2 * head) * 300).astype(dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".mgz":
            nib.save(nib.MGHImage(data, affine), path)
            return path
        image = nib.Nifti1Image(data, affine)
        image.set_qform(affine, code=1)
        image.set_sform(affine @ np.diag([1, 1, 1.01, 1]), code=4)
        nib.save(image, path)
        return path

    return write

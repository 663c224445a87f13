import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

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


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster of two CPUs for the whole session."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans: $ONELABEL_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("ONELABEL_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no scans at {folder}: set ONELABEL_DATA to a folder that holds them")
    return folder

import nibabel as nib
import numpy as np
import pytest

from onelabel.configs.load import parse
from onelabel.configs.schema import RunConfig
from onelabel.tasks.cohort import Cohort, open_cohort

SIZE = (28, 32, 30)


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Three small heads with masks, 7 mm voxels, on disk."""
    folder = tmp_path_factory.mktemp("heads")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        centre = (np.array(SIZE) - 1) / 2 + rng.uniform(-1, 1, 3)
        place = np.indices(SIZE) - centre[:, None, None, None]
        radius = np.sqrt((place**2).sum(0)) / 9
        image = np.select([radius < 0.6, radius < 1, radius < 1.2, radius < 1.4], [900.0, 600.0, 100.0, 800.0], 10.0)
        image = (image + rng.normal(0, 10, SIZE)).astype(np.float32)
        for name, data in (("", image), ("_mask", (radius < 1).astype(np.uint8))):
            nib.save(nib.Nifti1Image(data, np.diag([7.0, 7.0, 7.0, 1.0])), folder / f"head{seed}{name}.nii.gz")
    return open_cohort(folder)


@pytest.fixture(scope="session")
def config() -> RunConfig:
    """A run small enough for tests."""
    stage = {"name": "base", "steps": 6, "start": "scratch", "streams": {"train": [{"type": "synthetic"}]}}
    return parse(
        {
            "name": "small",
            "data": {"labelled": "unused"},
            "grid": {"spacing_mm": 7.0, "size": [32, 32, 32]},
            "network": {"channels": [8, 16], "dropout": 0.2},
            "stages": [stage],
            "compute": {"precision": "float32", "score_actors": 1},
        }
    )

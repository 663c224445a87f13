"""A cohort of phantom heads, and one run over it that several tests look at."""

import csv
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock

from onelabel.imaging.labels import IGNORE
from onelabel.imaging.scribbles import scribble

KINDS = ("structures", "scribbles")  # of labels beside masks: folders, and columns of the manifests
UNKNOWN = 255  # what no scribble touches
SETTINGS = [
    *("singlestrip", "stages.*.ranker={type: autoencoder}", "smoke"),
    *("stages.1.rounds=1", "stages.0.steps=40", "stages.1.steps=20", "stages.*.ranker.steps=40"),
    *("compute.checkpoint_every_s=0", "tracking.every=5"),
]


def phantom(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A head of 7 mm voxels, (30, 34, 32): scalp, skull and brain as nested ellipsoids; the brain's rind 1, core 2."""
    rng = np.random.default_rng(seed)
    size = np.array([30, 34, 32])
    centre = (size - 1) / 2 + rng.uniform(-1.5, 1.5, 3)
    radii = np.array([9, 11, 9]) * rng.uniform(0.9, 1.1, 3)
    place = (np.indices(size) - centre[:, None, None, None]) / radii[:, None, None, None]
    radius = np.sqrt((place**2).sum(0))
    image = np.select([radius < 0.6, radius < 1, radius < 1.15, radius < 1.35], [0.9, 0.6, 0.15, 0.8], 0.02)
    image = image + rng.normal(0, 0.02, size)
    return (1000 * np.clip(image, 0, None)).astype(np.float32), (radius < 1).astype(np.uint8) + (radius < 0.6)


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests labelled.csv, unlabelled.csv (with one broken file) and test.csv; labels of three kinds."""
    folder = tmp_path_factory.mktemp("heads")
    affine = np.diag([-7.0, 7.0, 7.0, 1.0])
    for kind in KINDS:
        (folder / kind).mkdir()
    groups = {"labelled": range(1), "unlabelled": range(1, 6), "test": range(6, 8)}
    for group, seeds in groups.items():
        rows = []
        for seed in seeds:
            image, structures = phantom(seed)
            lines = scribble(structures.astype(np.int32), spacing_mm=(7, 7, 7))
            labels = (structures > 0, structures, np.where(lines == IGNORE, UNKNOWN, lines))
            files = [f"head{seed}.nii.gz", f"head{seed}_mask.nii.gz", *(f"{kind}/head{seed}.nii.gz" for kind in KINDS)]
            for name, data in zip(files, (image, *(label.astype(np.uint8) for label in labels)), strict=True):
                nib.save(nib.Nifti1Image(data, affine), folder / name)
            rows.append([f"head{seed}", *files])
        if group == "unlabelled":
            (folder / "broken.nii.gz").write_bytes(b"not an image")
            rows.append(["broken", "broken.nii.gz", "", "", ""])
        with (folder / f"{group}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["key", "image", "label", *KINDS], *rows])
    return folder


Command = Callable[..., list[str]]


@pytest.fixture(scope="session")
def asked(heads: Path) -> Command:
    """What to ask for: a run over the phantom heads in a storage folder, with more settings."""

    def build(storage: Path, *more: str) -> list[str]:
        data = [f"data.{group}={heads / group}.csv" for group in ("labelled", "unlabelled", "test")]
        return [*SETTINGS, *data, f"storage={storage}", *more]

    return build


@pytest.fixture(scope="session")
def command(asked: Command) -> Command:
    """The shell command that asks for it."""

    def build(storage: Path, *more: str) -> list[str]:
        return [sys.executable, "-m", "onelabel.orchestrator", "run", *asked(storage, *more)]

    return build


@pytest.fixture(scope="session")
def finished(
    command: Command, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of an undisturbed run, and how its process ended; one run for all of pytest's workers."""
    own = tmp_path_factory.getbasetemp()
    storage = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "undisturbed"
    ended = storage / "ended.pickle"
    storage.mkdir(exist_ok=True)
    with FileLock(storage / "lock"):
        if not ended.is_file():
            done = subprocess.run(command(storage), capture_output=True, text=True, check=False, timeout=1200)
            ended.write_bytes(pickle.dumps(done))
    return storage / "singlestrip", pickle.loads(ended.read_bytes())

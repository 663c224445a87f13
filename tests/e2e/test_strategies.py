"""Every strategy on real Ray: it resumes, is blind to labels that it must not know, and is put to use."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from processes import assert_same_run

from onelabel.configs.load import load
from onelabel.orchestrator import driver
from onelabel.orchestrator.evaluate import evaluate
from onelabel.orchestrator.strip import strip

REPO = Path(__file__).parents[2]
GROUPS = ("labelled", "unlabelled", "test")
SETTINGS = ("stages.*.steps=10", "stages.0.steps=30")
STRUCTURES = ("data.classes=[background, rind, core]", *(f"data.{name}.label_column=structures" for name in GROUPS))
CASES = {
    "reciprocal": (),
    "curriculum": (*STRUCTURES, "stages.1.rounds=2"),
    "mlbseg": (),
    "scribsd": (*STRUCTURES, "data.labelled.label_column=scribbles", "data.ignore=255"),
}


def items(preset: str, heads: Path, storage: Path) -> list[str]:
    configs = [str(REPO / "configs" / f"{name}.yaml") for name in (preset, "smoke")]
    data = [f"data.{name}.path={heads / name}.csv" for name in GROUPS]
    return [*configs, *data, *SETTINGS, *CASES[preset], f"storage={storage}"]


def put_noise(heads: Path) -> None:
    """In place of all labels of the cohort to label."""
    rng = np.random.default_rng(0)
    for number in range(1, 6):
        for path in (heads / f"head{number}_mask.nii.gz", *heads.glob(f"*/head{number}.nii.gz")):
            image = nib.load(path)
            held = np.unique(np.asarray(image.dataobj))
            nib.save(nib.Nifti1Image(rng.choice(held, image.shape), image.affine), path)


@pytest.fixture(scope="module")
def own(heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads whose labels may be replaced."""
    return Path(shutil.copytree(heads, tmp_path_factory.mktemp("own") / "heads"))


Run = Callable[[str], Path]


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, own: Path, heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder of a preset's run, once for all tests."""
    folders: dict[str, Path] = {}

    def run(preset: str) -> Path:
        if preset not in folders:
            shutil.copytree(heads, own, dirs_exist_ok=True)
            folders[preset] = driver.run(load(items(preset, own, tmp_path_factory.mktemp(preset)))).folder
        return folders[preset]

    return run


def test_a_lost_round_is_made_again_whatever_the_labels_of_the_pool(
    undisturbed: Run, own: Path, tmp_path: Path
) -> None:
    first = undisturbed("curriculum")
    again = Path(shutil.copytree(first, tmp_path / "curriculum"))
    lost = max(again.glob("round-*"))
    shutil.rmtree(lost)
    put_noise(own)
    outcome = driver.run(load(items("curriculum", own, tmp_path)))
    assert outcome.folder == again
    assert outcome.failures == 1  # one scan of the pool is broken
    assert_same_run(again, first)


@pytest.mark.parametrize("preset", CASES)
def test_its_network_is_put_to_use(undisturbed: Run, heads: Path, preset: str, tmp_path: Path) -> None:
    """It strips, its masks are measured, and a page tells of it, structure by structure."""
    run = undisturbed(preset)
    several = STRUCTURES[0] in CASES[preset]
    names = ("rind", "core") if several else ()
    last = max(run.glob("round-*"))
    test = json.loads((last / "metrics.json").read_text())["test"]
    assert test["scans"] == 2
    means = {key for key in test if key.startswith("dice_") and key.endswith("_mean")}
    assert means == {"dice_mean", *(f"dice_{name}_mean" for name in names)}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(re.search(rf"\b{name} \d\.\d{{3}}", page) for name in names)
    scans = [str(heads / f"head{number}.nii.gz") for number in (6, 7)]
    assert strip(scans, out=tmp_path, checkpoint=run, workers=1).stripped == 2
    for row in pq.read_table(tmp_path / "strip.parquet").to_pylist():
        volumes = json.loads(row["structures_ml"] or "{}")
        assert tuple(volumes) == names
        assert not several or sum(volumes.values()) == pytest.approx(row["volume_ml"], abs=0.01)
    rows = evaluate(str(tmp_path), str(heads / "structures" / "head[67].nii.gz" if several else heads / "test.csv"))
    assert {row["class"] for row in rows} == ({"1", "2"} if several else {"foreground"})
    for row in pq.read_table(last / "test.parquet").to_pylist():
        measured = [each["dice"] for each in rows if each["key"] == row["key"]]
        assert np.mean(measured) == pytest.approx(row["dice"])

"""Every strategy on real Ray: cut off and resumed, blind to labels that it must not know, and put to use."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from processes import assert_same_run, kill_once

from onelabel.orchestrator.evaluate import evaluate
from onelabel.orchestrator.strip import strip

REPO = Path(__file__).parents[2]
GROUPS = ("labelled", "unlabelled", "test")
SETTINGS = ("stages.*.steps=30", "stages.1.rounds=1", "compute.checkpoint_every_s=0", "tracking.every=2")
STRUCTURES = ("data.classes=[background, rind, core]", *(f"data.{name}.label_column=structures" for name in GROUPS))
SCRIBBLES = (*STRUCTURES, "data.labelled.label_column=scribbles", "data.ignore=255")
CASES = {
    "singlestrip": (*SETTINGS, *STRUCTURES, "stages.*.ranker={type: autoencoder}"),
    "reciprocal": SETTINGS,
    "curriculum": (*SETTINGS, *STRUCTURES),
    "mlbseg": (*SETTINGS, "stages.1.steps=10"),
    "scribsd": (*SETTINGS[:1], *SETTINGS[2:], *SCRIBBLES),
}


def command(preset: str, heads: Path, storage: Path) -> list[str]:
    configs = [f"configs/{name}.yaml" for name in (preset, "smoke")]
    data = [f"data.{name}.path={heads / name}.csv" for name in GROUPS]
    program = [sys.executable, "-m", "onelabel.orchestrator", "run"]
    return [*program, *configs, *data, *CASES[preset], f"storage={storage}"]


@pytest.mark.parametrize("preset", CASES)
def test_a_strategy(preset: str, heads: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(heads, tmp_path / "heads"))
    resumed, blind = tmp_path / "resumed" / preset, tmp_path / "blind" / preset
    learning = "round-00" if preset == "scribsd" else "round-01"
    first = subprocess.Popen(
        command(preset, own, resumed.parent), cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    kill_once(lambda: any(resumed.glob(f"{learning}/training/checkpoint_*")), first)
    finish(command(preset, own, resumed.parent), failures=preset != "scribsd")
    put_noise(own)
    finish(command(preset, own, blind.parent), failures=preset != "scribsd")
    assert_same_run(blind, resumed)
    assert_put_to_use(resumed, own, tmp_path / "masks", several="data.classes" in " ".join(CASES[preset]))


def finish(words: list[str], *, failures: bool) -> None:
    """Run to the end; the cohort that is scored holds one broken scan."""
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == failures, done.stderr[-3000:]


def put_noise(heads: Path) -> None:
    """In place of all labels of the cohort to label."""
    rng = np.random.default_rng(0)
    for number in range(1, 6):
        for path in (heads / f"head{number}_mask.nii.gz", *heads.glob(f"*/head{number}.nii.gz")):
            image = nib.load(path)
            held = np.unique(np.asarray(image.dataobj))
            nib.save(nib.Nifti1Image(rng.choice(held, image.shape), image.affine), path)


def assert_put_to_use(run: Path, heads: Path, out: Path, *, several: bool) -> None:
    """The network strips, its masks are measured, and a page tells of all of it, structure by structure."""
    names = ("rind", "core") if several else ()
    last = max(run.glob("round-*"))
    test = json.loads((last / "metrics.json").read_text())["test"]
    assert test["scans"] == 2
    assert {f"dice_{name}_mean" for name in names} == {key for key in test if key.startswith("dice_")} - {
        "dice_mean",
        "dice_min",
    }
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(f"Dice, {name}" in page for name in names)
    tests = [str(heads / f"head{number}.nii.gz") for number in (6, 7)]
    assert strip(tests, out=out, checkpoint=run, workers=1).stripped == 2
    truth = heads / "structures" if several else heads / "test.csv"
    rows = evaluate(str(out), str(truth / "head[67].nii.gz") if several else str(truth))
    assert {row["class"] for row in rows} == ({"1", "2"} if several else {"foreground"})
    scored = {row["key"]: row["dice"] for row in pq.read_table(last / "test.parquet").to_pylist()}
    for key, dice in scored.items():
        measured = [row["dice"] for row in rows if row["key"] == key]
        assert np.mean(measured) == pytest.approx(dice), key

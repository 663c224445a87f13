"""Damaged and odd scans: each ends as a mask in its own grid or as a sentence, and nothing else happens."""

import csv
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from nibabel.orientations import apply_orientation, io_orientation

from onelabel.configs.schema import UNetConfig
from onelabel.models import checkpoint, networks

REPO = Path(__file__).parents[2]
Ended = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def mangled(heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of what is made from a phantom."""
    out = tmp_path_factory.mktemp("mangled")
    script = REPO / "benchmarks" / "mangle.py"
    subprocess.run([sys.executable, script, heads / "head0.nii.gz", "--out", out], check=True, timeout=300)
    return out / "manifest.csv"


@pytest.fixture(scope="module")
def stripped(mangled: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """What a network that was never trained makes of it."""
    out = tmp_path_factory.mktemp("stripped")
    config = UNetConfig(channels=(4, 4), patch=1)
    grid = {"spacing_mm": (8.0, 8.0, 8.0), "size": (32, 32, 32)}
    meta = checkpoint.Meta(config.model_dump(mode="json"), "supervised", grid, 0, 0, "")
    checkpoint.save(out / "checkpoint", networks.build(config), meta)
    command = [sys.executable, "-m", "onelabel.orchestrator", "strip", str(mangled), "--out", str(out / "masks")]
    command += ["--checkpoint", str(out / "checkpoint"), "--threads", "1"]
    return out / "masks", subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def expected(manifest: Path) -> dict[Path, str]:
    with manifest.open(encoding="utf-8", newline="") as file:
        return {manifest.parent / row["file"]: row["expectation"] for row in csv.DictReader(file)}


def test_there_are_enough_kinds(mangled: Path) -> None:
    kinds = [path for path in expected(mangled) if not path.name.startswith("turned_")]
    assert len(kinds) >= 40 and len(expected(mangled)) == len(kinds) + 48


def test_each_ends_as_a_mask_or_a_sentence(mangled: Path, stripped: Ended) -> None:
    out, process = stripped
    assert process.returncode == 1, process.stderr[-3000:]  # some scans failed
    assert "Traceback" not in process.stderr
    rows = {Path(row["image"]): row for row in pq.read_table(out / "strip.parquet").to_pylist()}
    assert set(rows) == set(expected(mangled))
    ended = {path: "error" if row["error"] else "mask" for path, row in rows.items()}
    assert {path.name: rows[path]["error"] for path, how in expected(mangled).items() if ended[path] != how} == {}
    for row in rows.values():
        assert (row["mask"] is None) == (row["error"] is not None)
        if row["error"]:
            assert len(row["error"]) < 1000 and "\n" not in row["error"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nibabel leaves .mgh files open
def test_masks_lie_in_the_grids_of_their_scans(stripped: Ended) -> None:
    masks = [row for row in pq.read_table(stripped[0] / "strip.parquet").to_pylist() if row["mask"]]
    for row in masks:
        image, mask = nib.load(row["image"]), nib.load(row["mask"])
        assert mask.shape[:3] == image.shape[:3], row["key"]
        np.testing.assert_allclose(mask.affine, image.affine, rtol=1e-6, atol=1e-4, err_msg=row["key"])
        assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}


def test_the_order_of_axes_does_not_matter(stripped: Ended) -> None:
    rows = pq.read_table(stripped[0] / "strip.parquet").to_pylist()
    turned = [nib.load(row["mask"]) for row in rows if row["key"].startswith("turned_")]
    masks = [apply_orientation(np.asarray(mask.dataobj), io_orientation(mask.affine)) for mask in turned]
    assert len(masks) == 48
    for mask in masks:
        assert np.mean(mask != masks[0]) < 0.01


def test_nothing_unfinished_is_left(mangled: Path, stripped: Ended) -> None:
    for folder in (mangled.parent, stripped[0]):
        assert [path for path in folder.rglob("*") if path.name.startswith(".")] == []
    written = {path for path in stripped[0].rglob("*") if path.is_file()}
    rows = pq.read_table(stripped[0] / "strip.parquet").to_pylist()
    assert {path for path in written if path.name.endswith(".nii.gz")} == {
        Path(row["mask"]) for row in rows if row["mask"]
    }

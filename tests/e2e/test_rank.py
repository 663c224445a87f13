"""Masks of another tool, judged by what one labelled scan and a trained run teach."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest

Console, Captured = Callable[..., int], pytest.CaptureFixture[str]
Finished = tuple[Path, subprocess.CompletedProcess[str]]


def other_tool(heads: Path, folder: Path) -> tuple[Path, Path]:
    """Five scans, and masks of them: two are true, one is shifted, one cut, one empty."""
    masks, scans = folder / "masks", folder / "scans"
    masks.mkdir()
    scans.mkdir()
    for number in range(1, 6):
        (scans / f"head{number}.nii.gz").write_bytes((heads / f"head{number}.nii.gz").read_bytes())
        true = nib.load(heads / f"head{number}_mask.nii.gz")
        mask = np.asarray(true.dataobj).copy()
        if number == 3:
            mask = np.roll(mask, 6, 1)
        if number == 4:
            mask[:, :, :15] = 0
        if number == 5:
            mask[:] = 0
        nib.save(nib.Nifti1Image(mask, true.affine), masks / f"head{number}_mask.nii.gz")
    return masks, scans


def test_bad_masks_of_another_tool_come_last(
    ray_cluster: None, finished: Finished, console: Console, heads: Path, tmp_path: Path, capsys: Captured
) -> None:
    run, _ = finished
    masks, scans = other_tool(heads, tmp_path)
    out = tmp_path / "trust.parquet"
    words = ["rank", masks, "--images", scans, "--checkpoint", run, "--out", out]
    words += ["--image", heads / "head0.nii.gz", "--mask", heads / "head0_mask.nii.gz"]
    for setting in ("smoke", "stages.0.expect.images=60", "stages.0.ranker.steps=80", "network.channels=[8, 16]"):
        words += ["--set", setting]
    assert console(*words) == 0
    assert "5 masks" in capsys.readouterr().out
    rows = {row["key"]: row for row in pq.read_table(out).to_pylist()}
    assert list(rows)[-1] == "head5" and rows["head5"]["flags"] == "empty" and rows["head5"]["flag"]
    good, bad = ([rows[f"head{n}"]["score_posterior"] for n in part] for part in ((1, 2), (3, 4)))
    assert min(good) > max(bad)
    # Sixty steps of training tell a mask that is cut from a whole one; what is shifted may be expected to be as good.
    expected = {n: rows[f"head{n}"]["expected_dice"] for n in (1, 2, 3, 4)}
    assert min(expected[1], expected[2]) >= expected[3] > 0 and min(expected[1], expected[2]) > expected[4]
    fitted = next((tmp_path / "trust.rank" / "rankers").iterdir()) / "weights.pt"
    before = fitted.stat().st_mtime_ns
    assert console(*words) == 0 and fitted.stat().st_mtime_ns == before
    assert {row["key"]: row for row in pq.read_table(out).to_pylist()} == rows


def test_a_run_leaves_what_strip_needs_to_say_whom_to_trust(
    finished: Finished, console: Console, heads: Path, tmp_path: Path
) -> None:
    run, _ = finished
    scores = pq.read_table(run / "round-01" / "scores.parquet").to_pylist()
    for row in scores:
        assert (row["expected_dice"] is None) == (row["error"] is not None)
    words = ("strip", heads / "head1.nii.gz", "--out", tmp_path, "--checkpoint", run)
    assert console(*words) == 0
    (row,) = pq.read_table(tmp_path / "strip.parquet").to_pylist()
    (known,) = [score for score in scores if score["key"] == "head1"]
    for name in ("expected_dice", "expected_low", "expected_high"):
        assert abs(row[name] - known[name]) < 1e-5
    assert row["flag"] == known["flag"]
    assert console(*words, "--no-trust", "--overwrite") == 0
    assert pq.read_table(tmp_path / "strip.parquet")["expected_dice"].to_pylist() == [None]

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from onelabel import __version__
from onelabel.configs.load import dump, load
from onelabel.configs.schema import RunConfig
from onelabel.orchestrator import cli
from onelabel.orchestrator.driver import Outcome
from onelabel.orchestrator.rounds import plan

HELP = """
import sys
import typer
import onelabel
from onelabel.orchestrator.cli import app
typer.main.get_command(app)
try:
    app(["--help"])
except SystemExit as ended:
    assert not ended.code
heavy = sys.modules.keys() & {"torch", "ray", "mlflow", "nibabel", "numpy", "pyarrow", "matplotlib", "pydantic"}
assert not heavy, heavy
"""

Console = Callable[..., int]


def write_image(path: Path, *, labels: bool = False) -> Path:
    data = np.random.default_rng(0).random((10, 12, 11), dtype=np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image((data > 0.5).astype(np.uint8) if labels else data, np.diag([8.0, 8.0, 8.0, 1.0])), path)
    return path


def test_help_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("run", "demo", "strip", "evaluate", "status", "report"):
        assert name in done.stdout


def test_version(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    assert console("--version") == 0
    assert capsys.readouterr().out.split() == ["onelabel", __version__]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["run", "no-such-preset"], "no-such-preset"),
        (["run", "singlestrip", "data.labelled=x", "sede=1"], "nearest known key is 'seed'"),
        (["status", "nowhere"], "'nowhere' is not the folder of a run"),
        (["report", "nowhere"], "'nowhere' is not the folder of a run"),
        (["strip", "nowhere", "--out", "out", "--checkpoint", "c"], "does not exist"),
        (["evaluate", "ours", "theirs", "--out", "table.txt"], "must end in .parquet or .csv"),
        (["evaluate", "ours", "theirs", "--out", "table.csv"], "holds no masks"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    words: list[str],
    problem: str,
    console: Console,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert console(*words) == 2
    said = capsys.readouterr()
    assert problem in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""


@pytest.mark.parametrize("words", [["nonsense"], ["strip"], ["strip", "x", "--nonsense"], ["strip", "x", "--out", "y"]])
def test_wrong_usage_exits_with_two(words: list[str], console: Console) -> None:
    assert console(*words) == 2


def test_an_interrupt_exits_with_130(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onelabel.orchestrator.status.read", interrupted)
    assert console("status", "x") == 130


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["onelabel", "status", "x"])
    monkeypatch.setattr("onelabel.orchestrator.status.read", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize("failures", [0, 3])
def test_run_and_status_show_the_rounds(
    failures: int,
    console: Console,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(config: RunConfig) -> Outcome:
        dump(config, tmp_path / "config.yaml")
        first, *_ = plan(config, tmp_path)
        first.folder.mkdir()
        first.commit({"selection": {"score_mean": 0.875}, "unlabelled": {"dice_mean": 0.91, "dice_min": 0.5}})
        (tmp_path / "report.html").touch()
        return Outcome(tmp_path, failures, [first.metrics()], "mlflow ui --backend-store-uri sqlite:///x.db")

    monkeypatch.setattr("onelabel.orchestrator.driver.run", train)
    assert console("run", "singlestrip", "data.labelled=x", "data.unlabelled=y", "stages.*.steps=77") == bool(failures)
    said = capsys.readouterr()
    assert "mlflow ui --backend-store-uri sqlite:///x.db" in said.out
    assert str(tmp_path) in said.out.replace("\n", "")
    assert f"report: {tmp_path / 'report.html'}" in said.out
    assert ("3 scans failed" in said.err) == bool(failures)
    assert console("status", tmp_path) == 0
    for text in (said.out, capsys.readouterr().out):
        (line,) = [line for line in text.splitlines() if "round-00" in line]
        assert all(part in line for part in ("base", "77", "done", "0.875", "0.910", "0.500"))


def test_strip_says_whether_scans_failed(
    console: Console,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trained: Path,
    write_scan: Callable[..., Path],
) -> None:
    good = write_scan(tmp_path / "good.nii.gz")
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"bad")
    options = ("--out", tmp_path / "out", "--checkpoint", trained)
    assert console("strip", good, *options) == 0
    assert "1 stripped, 0 flagged, 0 failed" in capsys.readouterr().out
    assert console("strip", good, bad, *options, "--threads", "1") == 1
    said = capsys.readouterr()
    assert "1 stripped (1 of them before), 0 flagged, 1 failed" in said.out
    assert "1 failed: … cannot be read as an image" in said.err
    assert console("strip", good, *options, "--border", "2") == 2
    assert "made with border 0.0, not 2.0" in capsys.readouterr().err
    assert console("strip", good, *options, "--border", "2", "--image", "--overwrite") == 0
    assert (tmp_path / "out" / "good_brain.nii.gz").is_file()


def test_strip_takes_what_is_asked_for_of_a_bids_dataset(
    console: Console, tmp_path: Path, trained: Path, write_scan: Callable[..., Path]
) -> None:
    for name in ("sub-1/anat/sub-1_T1w", "sub-2/anat/sub-2_T1w", "sub-2/anat/sub-2_T2w"):
        write_scan(tmp_path / "raw" / f"{name}.nii.gz")
    (tmp_path / "raw" / "dataset_description.json").write_text("{}")
    options = ("--out", tmp_path / "out", "--checkpoint", trained)
    assert console("strip", tmp_path / "raw", *options, "--subject", "sub-2", "--suffix", "T1w") == 0
    assert [path.name for path in (tmp_path / "out").rglob("*.nii.gz")] == ["sub-2_desc-brain_mask.nii.gz"]


def test_evaluate_says_whether_rows_have_errors(
    console: Console, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = write_image(tmp_path / "ours" / "a.nii.gz", labels=True).parent
    theirs = write_image(tmp_path / "theirs" / "a.nii.gz", labels=True).parent
    assert console("evaluate", ours, theirs, "--out", tmp_path / "t.csv") == 0
    said = capsys.readouterr().out
    assert "1 scans, 0 misses, 0 errors" in said
    assert "HD95" in said and "Paired" not in said
    again = write_image(tmp_path / "again" / "a.nii.gz", labels=True).parent
    assert console("evaluate", ours, theirs, "--against", again, "--out", tmp_path / "t.csv") == 0
    assert "Paired differences" in capsys.readouterr().out
    write_image(ours / "b.nii.gz")
    write_image(theirs / "b.nii.gz", labels=True)
    assert console("evaluate", ours, theirs, "--out", tmp_path / "t.parquet") == 1
    assert "whole numbers" in capsys.readouterr().err
    assert (tmp_path / "t.parquet").is_file()


def test_report_says_where_the_page_is(console: Console, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(["singlestrip", f"data.labelled={tmp_path / 'none'}", f"data.unlabelled={tmp_path / 'none'}"])
    dump(config, tmp_path / "config.yaml")
    for options, place in (
        ((), tmp_path / "report.html"),
        (("--out", tmp_path / "b" / "x.html"), tmp_path / "b" / "x.html"),
    ):
        assert console("report", tmp_path, *options) == 0
        assert capsys.readouterr().out == f"{place}\n"
        assert "singlestrip" in place.read_text()
    assert console("report", tmp_path, "--out", tmp_path) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1

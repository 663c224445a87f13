from pathlib import Path

import pytest

from onelabel.configs.load import dump, load
from onelabel.errors import DataError
from onelabel.orchestrator.rounds import plan
from onelabel.orchestrator.status import read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose first round is done and whose second was begun."""
    config = load(["singlestrip", "data.labelled=scan.nii.gz", "data.unlabelled=scans", "stages.1.rounds=2"])
    dump(config, tmp_path / "config.yaml")
    first, second, *_ = plan(config, tmp_path)
    first.folder.mkdir()
    first.commit({"stage": "base", "round": 0, "failures": 0, "test": {"dice_mean": 0.9}})
    second.folder.mkdir()
    (second.folder / "metrics.json").write_text("{torn")
    return tmp_path


def test_rounds_done_begun_and_to_come(folder: Path) -> None:
    rounds = read(folder)
    assert [now.name for now in rounds] == ["round-00", "round-01", "round-02"]
    assert [now.state for now in rounds] == ["done", "in progress", "planned"]
    assert [now.stage for now in rounds] == ["base", "selftrain", "selftrain"]
    assert rounds[0].steps > 0


def test_figures_are_there_or_none(folder: Path) -> None:
    done, begun, _ = read(folder)
    assert done.figure("test", "dice_mean") == 0.9
    assert done.figure("test", "dice_min") is None
    assert done.figure("selection", "score_mean") is None
    assert begun.metrics == {}


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not the folder of a run"):
        read(tmp_path)

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from onelabel.configs.load import parse
from onelabel.configs.schema import RunConfig
from onelabel.errors import DataError
from onelabel.orchestrator.rounds import MARKER, Round, plan, pseudo_labels
from onelabel.orchestrator.work import pseudo_of


def config(*rounds: int) -> RunConfig:
    """Stages s0, s1, ... of so many rounds each."""
    stages: list[dict[str, Any]] = [
        {"name": f"s{i}", "rounds": n, "steps": 1, "start": "scratch", "streams": {"train": [{"type": "mask"}]}}
        for i, n in enumerate(rounds)
    ]
    return parse({"name": "test", "data": {"labelled": "one.nii.gz"}, "stages": stages})


@pytest.fixture
def first(tmp_path: Path) -> Round:
    made = plan(config(1), tmp_path)[0]
    made.folder.mkdir()
    return made


def table(*values: float) -> pa.Table:
    return pa.table({"key": [f"k{i}" for i in range(len(values))], "score": list(values)})


def test_rounds_are_numbered_over_the_run_and_within_their_stage(tmp_path: Path) -> None:
    rounds = plan(config(1, 3, 2), tmp_path)
    assert [r.index for r in rounds] == [0, 1, 2, 3, 4, 5]
    assert [r.number for r in rounds] == [0, 0, 1, 2, 0, 1]
    assert [r.stage.name for r in rounds] == ["s0", "s1", "s1", "s1", "s2", "s2"]
    assert [r.folder for r in rounds] == [tmp_path / f"round-0{i}" for i in range(6)]
    assert rounds[3].name == "round-03 s1"
    assert len({r.checkpoint for r in rounds}) == 6


def test_a_plan_touches_nothing(tmp_path: Path) -> None:
    assert not any(r.done for r in plan(config(2), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_folders_sort_as_rounds_do(tmp_path: Path) -> None:
    rounds = plan(config(30), tmp_path)
    assert sorted(r.folder for r in rounds) == [r.folder for r in rounds]


def test_the_marker_is_written_last(first: Round) -> None:
    assert not first.done
    # Whatever cannot be recorded leaves the round open.
    with pytest.raises(TypeError):
        first.commit({"dice": object()})
    assert not first.done
    first.commit({"dice": 0.9, "training": {"seconds": 3.0}})
    assert first.done
    assert first.metrics() == {"dice": 0.9, "training": {"seconds": 3.0}}
    recorded, marker = (first.folder / name for name in ("metrics.json", MARKER))
    assert marker.stat().st_mtime_ns >= recorded.stat().st_mtime_ns
    assert sorted(path.name for path in first.folder.iterdir()) == [MARKER, "metrics.json"]


def test_a_round_is_open_without_its_marker(first: Round) -> None:
    first.write_table("scores", table(0.5))
    first.checkpoint.mkdir()
    (first.folder / "metrics.json").write_text("{}")
    assert not first.done


def test_a_second_commit_replaces_the_first(first: Round) -> None:
    first.commit({"dice": 0.1})
    first.commit({"dice": 0.2})
    assert first.done and first.metrics() == {"dice": 0.2}


def test_tables_come_back_as_they_were(first: Round) -> None:
    assert first.table("scores") is None
    path = first.write_table("scores", table(0.5, 0.25))
    assert path == first.folder / "scores.parquet"
    assert first.table("scores") == table(0.5, 0.25)
    assert first.table("selection") is None
    first.write_table("scores", table(0.75))
    assert first.table("scores") == table(0.75)
    assert [path.name for path in first.folder.iterdir()] == ["scores.parquet"]


def test_a_table_that_was_cut_off_is_not_there(first: Round) -> None:
    whole = first.write_table("scores", table(0.5)).read_bytes()
    (first.folder / "scores.parquet").unlink()
    (first.folder / "scores.part").write_bytes(whole[:40])
    assert first.table("scores") is None
    first.write_table("scores", table(0.25))
    assert first.table("scores") == table(0.25)


def test_a_failed_write_leaves_the_old_table(first: Round) -> None:
    first.write_table("scores", table(0.5))
    with pytest.raises((pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError, AttributeError)):
        first.write_table("scores", "no table")  # type: ignore[arg-type]
    assert first.table("scores") == table(0.5)


def selection(*keys: str) -> pa.Table:
    rows = [{"key": key, "image": f"/scans/{key}.nii", "mask": f"/masks/{key}.nii.gz", "weight": 0.5} for key in keys]
    columns = ("key", "image", "mask", "probability")
    schema = pa.schema([(name, pa.string()) for name in columns] + [("weight", pa.float64())])
    return pa.Table.from_pylist(rows, schema=schema)


def test_selected_masks_become_labels() -> None:
    rows = pseudo_labels(selection("a", "b")).rows()
    assert [row["key"] for row in rows] == ["a", "b"]
    assert rows[0] == {
        "key": "a",
        "image": "/scans/a.nii",
        "label": "/masks/a.nii.gz",
        "kind": "pseudo",
        "weight": 0.5,
    }
    with pytest.raises(DataError):
        pseudo_labels(selection("a", "a"))


def test_where_there_is_a_probability_it_is_the_label() -> None:
    table = selection("a", "b")
    table = table.set_column(3, "probability", pa.array(["/probabilities/a.nii.gz", None]))
    rows = pseudo_labels(table).rows()
    assert [row["label"] for row in rows] == ["/probabilities/a.nii.gz", "/masks/b.nii.gz"]
    assert [row["kind"] for row in rows] == ["probability", "pseudo"]


def test_pseudo_labels_are_of_the_last_rounds_there_are(tmp_path: Path) -> None:
    for count, expected in ((1, [[], [], []]), (2, [[], [0], [1]]), (9, [[], [0], [0, 1]])):
        stage = {"name": "s", "rounds": 3, "steps": 1, "start": "scratch", "streams": {"train": [{"type": "mask"}]}}
        stage |= {"ranker": {"type": "random"}, "pseudo": {"rounds": count}}
        data = {"labelled": "one.nii.gz", "unlabelled": "many"}
        rounds = plan(parse({"name": "test", "data": data, "stages": [stage]}), tmp_path)
        for now, places in zip(rounds, expected, strict=True):
            pseudo = pseudo_of(now, rounds[: now.index])
            assert pseudo and pseudo.out == now.folder / "probabilities"
            assert list(pseudo.earlier) == [rounds[place].checkpoint for place in places]
    first, second = plan(config(2), tmp_path)
    assert pseudo_of(second, [first]) is None


def test_an_empty_selection_is_an_empty_cohort() -> None:
    assert len(pseudo_labels(selection())) == 0

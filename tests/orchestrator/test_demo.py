from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from onelabel.configs.schema import RunConfig
from onelabel.orchestrator import demo, demo_data, driver
from onelabel.orchestrator.rounds import plan
from onelabel.tasks.score import SCHEMA

ROWS: list[dict[str, Any]] = [
    {"key": "poor", "score": 0.5, "volume_mm3": 9.0e5, "dice": 0.4},
    {"key": "broken", "error": "not an image"},
    {"key": "good", "score": 0.9, "volume_mm3": 1.5e6},
]


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> demo.Demo:
    """The demo with a driver that trains nothing."""

    def fetch(folder: Path) -> demo_data.DemoData:
        return demo_data.DemoData(folder, demo_data.HEADS, folder / "labelled.csv", folder / "unlabelled.csv")

    def run(config: RunConfig) -> driver.Outcome:
        folder = Path(config.storage) / config.name
        rounds = plan(config, folder)
        for now in rounds:
            now.folder.mkdir(parents=True)
            scores = pa.Table.from_pylist(ROWS, schema=SCHEMA)
            now.write_table("scores", scores)
            now.write_table("selection", scores.slice(2))
            now.commit({"unlabelled": {"scans": 3.0, "failed": 1.0, "score_mean": 0.7}, "seconds": {"round": 1.5}})
        return driver.Outcome(folder, 1, [now.metrics() for now in rounds], "mlflow ui")

    monkeypatch.setattr(demo_data, "fetch", fetch)
    monkeypatch.setattr(driver, "run", run)
    return demo.run_demo(storage=tmp_path)


def test_the_masks_are_ranked_with_failures_last(shown: demo.Demo) -> None:
    _, columns, rows = demo.tables(shown)[1]
    assert columns == ("scan", "score", "volume, ml", "Dice", "selected in", "error")
    assert rows == [
        ("good", 0.9, 1500, None, "round-00, round-01", ""),
        ("poor", 0.5, 900, 0.4, "", ""),
        ("broken", None, None, None, "", "not an image"),
    ]


def test_every_row_fits_its_columns(shown: demo.Demo) -> None:
    for title, columns, rows in demo.tables(shown):
        assert title and rows
        assert {len(row) for row in rows} == {len(columns)}


def test_places_lie_in_the_last_round(shown: demo.Demo, tmp_path: Path) -> None:
    places = dict(demo.places(shown))
    assert places["masks"] == tmp_path / "demo" / "round-01" / "masks"
    assert {path.parent for path in places.values()} == {tmp_path / "demo" / "round-01"}

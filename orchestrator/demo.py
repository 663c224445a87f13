"""The demo: from nothing to masks of real heads, learned from one of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from onelabel.configs.load import PRESETS, parse
from onelabel.errors import DataError
from onelabel.imaging.storage import AnyPath
from onelabel.orchestrator import demo_data, driver
from onelabel.orchestrator.rounds import Round, plan

# Title, columns, rows.
Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Demo:
    """What the demo leaves.

    data : the heads; outcome : of the run; rounds : in order; scores : rows of the last round, best first;
    selected_in : for a scan's key the rounds whose selection holds it
    """

    data: demo_data.DemoData
    outcome: driver.Outcome
    rounds: tuple[Round, ...]
    scores: list[dict[str, Any]]
    selected_in: dict[str, list[str]]

    @property
    def masks(self) -> AnyPath:
        """Folder of the last round's masks."""
        return self.rounds[-1].folder / "masks"

    @property
    def picture(self) -> AnyPath:
        """The last round's best and worst masks on their scans."""
        return self.rounds[-1].folder / "best-and-worst.png"


def run_demo(*, storage: Path, data: Path | None = None) -> Demo:
    """Fetch the heads, run the preset `demo` on them, or read what an earlier call left.

    Parameters
    ----------
    storage : folder of all runs
    data : folder of the heads; by default `demo-data` under storage

    Raises
    ------
    OnelabelError : the heads cannot be brought, or the run cannot begin.
    """
    heads = demo_data.fetch((data or storage / "demo-data").resolve())
    settings = yaml.safe_load((PRESETS / "demo.yaml").read_text(encoding="utf-8"))
    sources = {"labelled": str(heads.labelled), "unlabelled": str(heads.unlabelled)}
    config = parse(settings | {"storage": str(storage), "data": sources})
    outcome = driver.run(config)
    return read(heads, outcome, tuple(plan(config, outcome.folder)))


def read(data: demo_data.DemoData, outcome: driver.Outcome, rounds: tuple[Round, ...], /) -> Demo:
    """Collect what finished rounds wrote."""
    scores = rounds[-1].table("scores")
    if scores is None:
        raise DataError(f"'{rounds[-1].folder}' holds no scores; remove '{outcome.folder}' and run the demo again")
    ranked = sorted(scores.to_pylist(), key=lambda row: (row["score"] is None, -(row["score"] or 0.0), row["key"]))
    selected: dict[str, list[str]] = {}
    for now in rounds:
        table = now.table("selection")
        for key in table["key"].to_pylist() if table is not None else ():
            selected.setdefault(key, []).append(now.folder.name)
    return Demo(data, outcome, rounds, ranked, selected)


def tables(demo: Demo, /) -> list[Table]:
    """The licences of the heads, and their masks with the best score first."""
    terms: list[tuple[Any, ...]] = [*demo_data.licences(demo.data)]
    return [
        ("The scans, and whose terms apply", ("scan", "package", "licence", "what it shows"), terms),
        _ranking(demo),
    ]


def places(demo: Demo, /) -> list[tuple[str, AnyPath]]:
    """What lies where."""
    return [("masks", demo.masks), ("picture", demo.picture), ("network", demo.rounds[-1].checkpoint)]


def _ranking(demo: Demo) -> Table:
    columns: tuple[str, ...] = ("scan", "score", "volume, ml", "Dice", "selected in")
    rows: list[tuple[Any, ...]] = []
    for row in demo.scores:
        volume_ml = None if row["volume_mm3"] is None else round(row["volume_mm3"] / 1000)
        rows.append((row["key"], row["score"], volume_ml, row["dice"], ", ".join(demo.selected_in.get(row["key"], ()))))
    if any(row["error"] for row in demo.scores):
        columns += ("error",)
        rows = [(*cells, row["error"] or "") for cells, row in zip(rows, demo.scores, strict=True)]
    return f"Masks after {demo.rounds[-1].name}, best score first; Dice where a truth is known", columns, rows

"""How far a run is, read from its folder."""

from dataclasses import dataclass
from typing import Any, Literal

import yaml

from onelabel.configs.load import parse
from onelabel.configs.schema import RunConfig
from onelabel.errors import DataError
from onelabel.imaging.storage import AnyPath
from onelabel.orchestrator.rounds import plan

RECORD = "config.yaml"

_FIGURES = {"selected\nscore": ("selection", "score_mean")} | {
    f"{cohort}\n{part} Dice": (cohort, measure)
    for cohort in ("test", "unlabelled")
    for part, measure in (("mean", "dice_mean"), ("worst", "dice_min"))
}
COLUMNS = ("round", "stage", "steps", "state", *_FIGURES)


@dataclass(frozen=True)
class RoundStatus:
    """One round. metrics : as in its metrics.json, empty until it is done."""

    name: str
    stage: str
    steps: int
    state: Literal["done", "in progress", "planned"]
    metrics: dict[str, Any]

    def figure(self, group: str, name: str, /) -> float | None:
        """One of the metrics, such as `dice_mean` of `test`, if the round has it."""
        value = self.metrics.get(group, {}).get(name)
        return None if value is None else float(value)

    def cells(self) -> tuple[str | int | float | None, ...]:
        """A row of a table with the columns `COLUMNS`."""
        return self.name, self.stage, self.steps, self.state, *(self.figure(*place) for place in _FIGURES.values())


def settings(folder: AnyPath, /) -> RunConfig:
    """The settings that a run was started with.

    Raises
    ------
    DataError : the folder holds no run.
    ConfigError : the run's record does not fit this version.
    """
    record = folder / RECORD
    if not record.is_file():
        raise DataError(f"'{folder}' is not the folder of a run: it holds no {RECORD}")
    return parse(yaml.safe_load(record.read_text(encoding="utf-8")))


def read(folder: AnyPath, /) -> list[RoundStatus]:
    """All rounds of a run, those to come included; raises as `settings` does."""
    rounds = []
    for now in plan(settings(folder), folder):
        state: Literal["done", "in progress", "planned"] = "in progress" if now.folder.is_dir() else "planned"
        if now.done:
            state = "done"
        metrics = now.metrics() if now.done else {}
        rounds.append(RoundStatus(now.folder.name, now.stage.name, now.stage.steps, state, metrics))
    return rounds

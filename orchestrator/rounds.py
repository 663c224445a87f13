"""Rounds on disk: a folder each, committed by a marker that is written last."""

import io
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onelabel.configs.schema import RunConfig, StageConfig
from onelabel.imaging import storage
from onelabel.imaging.storage import AnyPath
from onelabel.tasks.cohort import PROBABILITY, Cohort

MARKER = "done"


@dataclass(frozen=True)
class Round:
    """One round of a run. index counts over the whole run, number within its stage, both from 0."""

    folder: AnyPath
    index: int
    number: int
    stage: StageConfig

    @property
    def name(self) -> str:
        """Shown in logs and MLflow."""
        return f"round-{self.index:02d} {self.stage.name}"

    @property
    def checkpoint(self) -> AnyPath:
        """The trained network."""
        return self.folder / "checkpoint"

    @property
    def done(self) -> bool:
        """Whether all of the round is there."""
        return (self.folder / MARKER).is_file()

    def table(self, name: str) -> pa.Table | None:
        """A table of this round (`scores`, `selection`, `test`), if it was written."""
        path = self.folder / f"{name}.parquet"
        return pq.read_table(io.BytesIO(path.read_bytes())) if path.is_file() else None

    def write_table(self, name: str, table: pa.Table) -> AnyPath:
        """Write a table as a whole or not at all."""
        path = self.folder / f"{name}.parquet"
        with storage.writing(path) as unfinished:
            pq.write_table(table, unfinished)
        return path

    def training(self, figures: dict[str, float] | None = None) -> dict[str, float]:
        """Keep what training came to, so that an attempt that finds it finished knows too; or read it."""
        path = self.folder / "training.json"
        if figures is not None:
            storage.write_text(path, json.dumps(figures))
        return json.loads(path.read_text()) if path.is_file() else {}

    def metrics(self) -> dict[str, Any]:
        """What a finished round recorded."""
        recorded: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text())
        return recorded

    def commit(self, metrics: dict[str, Any]) -> None:
        """Record the metrics, then mark the round as done."""
        storage.write_text(self.folder / "metrics.json", json.dumps(metrics, indent=1))
        storage.write_text(self.folder / MARKER, "")


def plan(config: RunConfig, folder: AnyPath, /) -> list[Round]:
    """All rounds of a run, in order."""
    rounds: list[Round] = []
    for stage in config.stages:
        for number in range(stage.rounds):
            index = len(rounds)
            rounds.append(Round(folder / f"round-{index:02d}", index, number, stage))
    return rounds


def pseudo_labels(selection: pa.Table, /) -> Cohort:
    """The selected scans with the probabilities, or else the masks, that were predicted as labels."""
    label = pc.coalesce(selection["probability"], selection["mask"])
    kind = pc.if_else(pc.is_valid(selection["probability"]), PROBABILITY, "pseudo")
    columns = {"key": selection["key"], "image": selection["image"], "label": label, "kind": kind}
    return Cohort(pa.table(columns | {"weight": selection["weight"]}))

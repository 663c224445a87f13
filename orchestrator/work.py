"""What a round is made of: training, ranking, scoring, recording."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.util.queue import Queue

from onelabel.configs.schema import AutoencoderRankerConfig, RunConfig, StreamConfig
from onelabel.errors import DataError
from onelabel.imaging.random import derive
from onelabel.models import checkpoint
from onelabel.orchestrator import report
from onelabel.orchestrator.console import bar
from onelabel.orchestrator.rounds import Round, pseudo_labels
from onelabel.orchestrator.setup import Cohorts
from onelabel.orchestrator.tracking import RoundTracker, Tracker
from onelabel.tasks import score as scoring
from onelabel.tasks import streams
from onelabel.tasks.cohort import Cohort
from onelabel.tasks.train import FitTask, Row, fit

log = logging.getLogger(__name__)

Scans = tuple[list[Any], list[float]]


@dataclass
class Work:
    """The parts of a run, and what they share: scans in the object store, fitted rankers, seconds by kind of work."""

    config: RunConfig
    cohorts: Cohorts
    folder: Path
    tracker: Tracker
    queue: Queue
    prepared: dict[str, list[Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def train(
        self, now: Round, previous: Round | None, selection: pa.Table | None, track: RoundTracker
    ) -> dict[str, float]:
        """Fit the stage's learner on its streams; leaves the round's checkpoint."""
        self.seconds.clear()
        if now.checkpoint.is_dir():
            return now.training()
        initial = None
        if previous and now.stage.start == "previous":
            initial = ray.put(checkpoint.load(previous.checkpoint)[0].state_dict())
        scans = {"labelled": self._scans("labelled", self.cohorts.labelled)}
        if selection is not None:
            if not len(selection):
                raise DataError(f"no usable mask was left for {now.name} to learn from; train the rounds before longer")
            scans["selected"] = self._scans(f"selected for {now.name}", pseudo_labels(selection))
        learner, network, seed = now.stage.learner, self.config.network, derive(self.config.seed, now.index)
        task = FitTask(
            *(learner, network, now.stage.steps, seed, self._meta(network.model_dump(mode="json"), learner.type, seed)),
            initial=initial,
            round=now.number,
            rounds=now.stage.rounds,
            every=self.config.tracking.every,
        )
        figures = self._fit(task, now.stage.streams, scans, now.checkpoint, now.name, track.losses)
        return now.training(figures)

    def score(self, now: Round, name: str, cohort: Cohort, ranker: AutoencoderRankerConfig | None = None) -> pa.Table:
        """Masks and scores of a cohort, unless an earlier attempt wrote them."""
        found = now.table(name)
        if found is None:
            fitted = self._ranker(ranker) if ranker else None
            log.info("%s: %s of %d scans", now.name, name, len(cohort))
            task = scoring.ScoreTask(
                now.checkpoint, fitted, now.folder / ("masks" if name == "scores" else f"{name}-masks")
            )
            with self._timed("scoring"):
                found = scoring.score(cohort, task, compute=self.config.compute)
            now.write_table(name, found)
        return found

    def record(
        self, now: Round, track: RoundTracker, metrics: Mapping[str, Any], tables: Mapping[str, pa.Table]
    ) -> None:
        """Tables, pictures and figures, in the folder and in MLflow."""
        for name, table in tables.items():
            track.artifact(now.write_table(name, table))
        if "scores" in tables:
            picture = now.folder / "best-and-worst.png"
            report.best_and_worst(tables["scores"].to_pylist(), picture, title=now.name)
            track.artifact(picture)
        track.artifact(now.checkpoint)
        groups = {name: part for name, part in metrics.items() if isinstance(part, dict)}
        flat = {f"{name}_{key}": float(value) for name, part in groups.items() for key, value in part.items()}
        track.metrics(flat)
        self.tracker.metrics(flat, step=now.index)

    def _ranker(self, config: AutoencoderRankerConfig) -> Path:
        """The checkpoint of the ranker's network, fitted on the labelled masks when first asked for."""
        out = self.folder / "rankers" / f"{config.type}-{derive(config.model_dump_json()):014x}"
        if not out.is_dir():
            out.parent.mkdir(exist_ok=True)
            seed = derive(self.config.seed, "ranker")
            meta = self._meta(config.network.model_dump(mode="json"), config.learner.type, seed)
            task = FitTask(config.learner, config.network, config.steps, seed, meta, every=self.config.tracking.every)
            source = {"train": (StreamConfig(type="mask", deform=config.deform),)}
            scans = {"labelled": self._scans("labelled", self.cohorts.labelled)}
            name = f"ranker {config.type}"
            with self.tracker.round(name) as track:
                self._fit(task, source, scans, out, name, track.losses)
        return out

    def _fit(
        self,
        task: FitTask,
        sources: Mapping[str, tuple[StreamConfig, ...]],
        scans: Mapping[str, Scans],
        out: Path,
        name: str,
        log_losses: Callable[[Row], None],
    ) -> dict[str, float]:
        """Train while a progress bar and MLflow listen."""
        built = {
            stream: streams.build(parts, self.config, scans=scans, seed=derive(task.seed, stream))
            for stream, parts in sources.items()
        }
        with bar(name, task.steps) as progress:

            def listen(row: Row) -> None:
                log_losses(row)
                progress.update(int(row["step"]), loss=row["loss"], waiting=row["wait_share"])

            folder = out.with_name(f"{out.name}.training")
            figures = fit(
                task, built, compute=self.config.compute, folder=folder, out=out, queue=self.queue, on_progress=listen
            )
        self.seconds["training"] += figures["seconds"]
        return figures

    def _scans(self, name: str, cohort: Cohort) -> Scans:
        """References to the cohort's scans on the grid, prepared once, and their weights."""
        if name not in self.prepared:
            # Of the selections only the newest is read again.
            self.prepared = {key: refs for key, refs in self.prepared.items() if key == "labelled"}
            with self._timed("preparing"):
                self.prepared[name] = streams.prepare(cohort, self.config)
        return self.prepared[name], [row["weight"] for row in cohort.rows()]

    def _meta(self, network: dict[str, Any], learner: str, seed: int) -> checkpoint.Meta:
        grid = self.config.grid.model_dump(mode="json")
        return checkpoint.Meta(network, learner, grid, 0, seed, self.cohorts.digest, **checkpoint.provenance())

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - begin

"""What a round is made of: training, ranking, scoring, recording."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray
from ray.util.queue import Queue

from onelabel.cluster import resources
from onelabel.configs.schema import (
    AutoencoderRankerConfig,
    ExpectConfig,
    RankerConfig,
    RunConfig,
    single_rankers,
)
from onelabel.configs.streams import StreamConfig
from onelabel.errors import DataError
from onelabel.imaging import storage
from onelabel.imaging.classes import Classes
from onelabel.imaging.random import derive
from onelabel.imaging.storage import AnyPath
from onelabel.models import checkpoint, quality
from onelabel.orchestrator import report
from onelabel.orchestrator.console import bar
from onelabel.orchestrator.rounds import Round, pseudo_labels
from onelabel.orchestrator.setup import Cohorts
from onelabel.orchestrator.summary import extremes
from onelabel.orchestrator.tracking import RoundTracker, Tracker
from onelabel.tasks import score as scoring
from onelabel.tasks import streams
from onelabel.tasks.cohort import Cohort
from onelabel.tasks.train import Job, fit
from onelabel.tasks.worker import FitTask, Row

log = logging.getLogger(__name__)

Scans = tuple[list[Any], list[float]]


@dataclass
class Work:
    """The parts of a run, and what they share: scans in the object store, fitted rankers, seconds by kind of work.

    joined : whether other runs may train on the same cluster
    """

    config: RunConfig
    cohorts: Cohorts
    folder: AnyPath
    tracker: Tracker
    queue: Queue
    joined: bool
    prepared: dict[str, Scans] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def train(
        self, now: Round, previous: Round | None, selection: pa.Table | None, track: RoundTracker
    ) -> dict[str, float]:
        """Fit the stage's learner on its streams, and its ranker if no round has yet; leaves their checkpoints."""
        self.seconds.clear()
        jobs: list[Job] = []
        with ExitStack() as stack:
            if not checkpoint.is_there(now.checkpoint):
                jobs.append(self._learning(now, previous, selection, track))
            if self.cohorts.unlabelled:
                jobs += self._rankings(now.stage.ranker, stack)
            if jobs:
                figures = self._fit(jobs, now.folder / "training")
                self.seconds["training"] += sum(row["seconds"] for row in figures.values())
                if now.name in figures:
                    return now.training(figures[now.name])
        return now.training()

    def fit_ranker(self, ranker: RankerConfig) -> tuple[AnyPath | None, ...]:
        """Fit a ranker's networks, if no earlier attempt has; their checkpoints, or None for what has no network."""
        with ExitStack() as stack:
            jobs = self._rankings(ranker, stack)
            if jobs:
                self._fit(jobs, self.folder / "training")
        return self.fitted(ranker)

    def _fit(self, jobs: Sequence[Job], folder: AnyPath) -> dict[str, dict[str, float]]:
        with resources.turn() if self.joined else nullcontext(lambda: None) as begun:
            return fit(jobs, compute=self.config.compute, folder=folder, queue=self.queue, begun=begun)

    def fitted(self, ranker: RankerConfig | None) -> tuple[AnyPath | None, ...]:
        """The checkpoints of a ranker's networks."""
        parts = single_rankers(ranker)
        return tuple(self._fitted(part) if isinstance(part, AutoencoderRankerConfig) else None for part in parts)

    def probes(self, config: ExpectConfig) -> scoring.Probes:
        """Synthetic images of the labelled scans."""
        return scoring.Probes(tuple(self._scans("labelled", self.cohorts.labelled)[0]), self.config.synthesis, config)

    def score(self, now: Round, earlier: Sequence[Round]) -> dict[str, pa.Table]:
        """Masks of the unlabelled cohort, ranked, as `scores`, and of that to `test` on, unless they were written."""
        cohorts = {"scores": self.cohorts.unlabelled if now.stage.ranker else None, "test": self.cohorts.test}
        tables = {name: now.table(name) for name, cohort in cohorts.items() if cohort}
        missing = {name: cohort for name, cohort in cohorts.items() if cohort and tables[name] is None}
        if missing:
            counts = ", ".join(f"{name} of {len(cohort)} scans" for name, cohort in missing.items())
            log.info("%s: %s", now.name, counts)
            ranker = now.stage.ranker if "scores" in missing else None
            task, (cohort, *rest) = self._scoring(now, ranker, earlier), missing.values()
            with self._timed("scoring"):
                scored = scoring.score(
                    cohort, task, aside=rest[0] if rest else None, compute=self.config.compute, keep=now.folder / "rows"
                )
            if scored.expectation and ranker:
                quality.save(now.checkpoint, ranker, task.fitted, scored.expectation, bad=now.stage.expect.bad)
            for name, table in zip(missing, (scored.table, scored.aside), strict=False):
                tables[name] = table
                now.write_table(name, table)
            storage.remove(now.folder / "rows")
        return tables

    def _scoring(self, now: Round, ranker: RankerConfig | None, earlier: Sequence[Round]) -> scoring.ScoreTask:
        """How a round's network is put to use; without a ranker on the cohort to test on alone."""
        expect, aside = now.stage.expect, now.folder / "test-masks"
        return scoring.ScoreTask(
            now.checkpoint,
            now.folder / "masks" if ranker else aside,
            ranker,
            self.fitted(ranker),
            self.config.seed,
            self.probes(expect) if single_rankers(ranker) and expect.images else None,
            pseudo_of(now, earlier) if ranker else None,
            self.config.data.names[1:] if self.config.data.classes else (),
            aside if self.cohorts.test else None,
        )

    def record(
        self, now: Round, track: RoundTracker, metrics: Mapping[str, Any], tables: Mapping[str, pa.Table]
    ) -> None:
        """Tables, pictures and figures, in the folder and in MLflow."""
        for name, table in tables.items():
            track.artifact(now.write_table(name, table))
        if "scores" in tables:
            picture = now.folder / "best-and-worst.png"
            shown = extremes(tables["scores"], report.SHOWN)
            with storage.writing(picture) as unfinished:
                report.best_and_worst(shown.to_pylist(), unfinished, title=now.name)
            track.artifact(picture)
        track.artifact(now.checkpoint)
        groups = {name: part for name, part in metrics.items() if isinstance(part, dict)}
        flat = {f"{name}_{key}": float(value) for name, part in groups.items() for key, value in part.items()}
        track.metrics(flat)
        self.tracker.metrics(flat, step=now.index)

    def _learning(self, now: Round, previous: Round | None, selection: pa.Table | None, track: RoundTracker) -> Job:
        """The stage's learner on its streams."""
        initial = None
        if previous and now.stage.start == "previous":
            initial = ray.put(checkpoint.load(previous.checkpoint)[0].state_dict())
        scans = {"labelled": self._scans("labelled", self.cohorts.labelled)}
        if selection is not None:
            scans["selected"] = self._scans(f"selected for {now.name}", pseudo_labels(selection))
            if not scans["selected"][0]:
                raise DataError(f"no usable mask was left for {now.name} to learn from; train the rounds before longer")
        learner, network, seed = now.stage.learner, self.config.segmenter, derive(self.config.seed, now.index)
        meta = self._meta(network.model_dump(mode="json"), learner.type, seed)
        task = FitTask(now.name, learner, network, now.stage.steps, seed, meta, initial, now.number, now.stage.rounds)
        return self._job(task, now.stage.streams, scans, now.checkpoint, track)

    def _rankings(self, ranker: RankerConfig | None, stack: ExitStack) -> list[Job]:
        """What of a ranker is still to be fitted."""
        jobs = []
        for place, part in enumerate(single_rankers(ranker)):
            if isinstance(part, AutoencoderRankerConfig) and not checkpoint.is_there(self._fitted(part)):
                name = f"ranker {part.type}" + (f" {place + 1}" if place else "")
                jobs.append(self._ranking(name, part, stack.enter_context(self.tracker.round(name))))
        return jobs

    def _ranking(self, name: str, config: AutoencoderRankerConfig, track: RoundTracker) -> Job:
        """The ranker's network on the labelled masks."""
        seed = derive(self.config.seed, "ranker")
        network = config.network.model_copy(update={"classes": len(self.config.data.names)})
        meta = self._meta(network.model_dump(mode="json"), config.learner.type, seed)
        task = FitTask(name, config.learner, network, config.steps, seed, meta)
        sources = {"train": (StreamConfig(type="mask", deform=config.deform),)}
        scans = {"labelled": self._scans("labelled", self.cohorts.labelled)}
        return self._job(task, sources, scans, self._fitted(config), track)

    def _job(
        self,
        task: FitTask,
        sources: Mapping[str, tuple[StreamConfig, ...]],
        scans: Mapping[str, Scans],
        out: AnyPath,
        track: RoundTracker,
    ) -> Job:
        """A task whose progress a bar and MLflow show."""
        built = {
            stream: streams.build(parts, self.config, scans=scans, seed=derive(task.seed, stream))
            for stream, parts in sources.items()
        }

        @contextmanager
        def shown() -> Iterator[Callable[[Row], None]]:
            with bar(task.name, task.steps) as progress:

                def show(row: Row) -> None:
                    track.losses(row)
                    progress.update(int(row["step"]), loss=row["loss"], waiting=row["wait_share"])

                yield show

        return Job(replace(task, every=self.config.tracking.every), built, out, shown)

    def _fitted(self, config: AutoencoderRankerConfig) -> AnyPath:
        """Where the checkpoint of the ranker's network is or will be."""
        return self.folder / "rankers" / f"{config.type}-{derive(config.model_dump_json()):014x}"

    def _scans(self, name: str, cohort: Cohort) -> Scans:
        """References to usable scans on the grid, prepared once, and their weights; of labelled ones all must be."""
        if name not in self.prepared:
            # Of the selections only the newest is read again.
            self.prepared = {key: scans for key, scans in self.prepared.items() if key == "labelled"}
            with self._timed("preparing"):
                refs = streams.prepare(cohort, self.config, spare=name != "labelled")
            usable = [(ref, row["weight"]) for ref, row in zip(refs, cohort.rows(), strict=True) if ref is not None]
            self.prepared[name] = [ref for ref, _ in usable], [weight for _, weight in usable]
        return self.prepared[name]

    def _meta(self, network: dict[str, Any], learner: str, seed: int) -> checkpoint.Meta:
        grid, labels = self.config.grid.model_dump(mode="json"), asdict(Classes.of(self.config.data))
        names, known = labels.pop("names"), checkpoint.provenance()
        return checkpoint.Meta(network, learner, grid, 0, seed, self.cohorts.digest, names, labels=labels, **known)

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - begin


def pseudo_of(now: Round, earlier: Sequence[Round]) -> scoring.Pseudo | None:
    """How a round's masks become the labels of the next one, if not as they are."""
    config = now.stage.pseudo
    if config is None:
        return None
    averaged = (*earlier, now)[-config.rounds : -1]
    return scoring.Pseudo(config, now.folder / "probabilities", tuple(one.checkpoint for one in averaged))

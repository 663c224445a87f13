"""The loop: for each round train, score, select, record. It knows no strategy by name."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.util.queue import Queue

from onelabel.cluster import resources, runtime
from onelabel.configs.schema import RunConfig
from onelabel.orchestrator.console import stage
from onelabel.orchestrator.rounds import Round, plan
from onelabel.orchestrator.select import select
from onelabel.orchestrator.setup import needs, open_cohorts, open_folder
from onelabel.orchestrator.summary import summarise
from onelabel.orchestrator.tracking import Tracker, preload
from onelabel.orchestrator.work import Work


@dataclass(frozen=True)
class Outcome:
    """What a run leaves.

    folder : of the run; failures : scans that ended as rows with an error; rounds : their metrics, in order;
    mlflow_command : opens what was logged
    """

    folder: Path
    failures: int
    rounds: list[dict[str, Any]]
    mlflow_command: str


def run(config: RunConfig, /) -> Outcome:
    """Run all stages, or what is left of them when the folder holds an unfinished run of the same settings.

    Raises
    ------
    OnelabelError : before any training, when the config, the data or the cluster cannot do it.
    """
    cohorts, folder = open_cohorts(config), open_folder(config)
    rounds = plan(config, folder)
    preload()
    with runtime.connect(config.compute) as joined, Tracker(config, folder) as tracker:
        demands = resources.of_stage(config.compute, **needs(config, cohorts))
        resources.check(demands, wait_s=config.compute.wait_s if joined else 0)
        work = Work(config, cohorts, folder, tracker, Queue(actor_options={"num_cpus": 0}))
        previous = selection = None
        for now in rounds:
            if not now.done:
                _run_round(work, now, previous, selection)
            previous, selection = now, now.table("selection") if now.stage.ranker else selection
        command = tracker.command()
    recorded = [now.metrics() for now in rounds]
    return Outcome(folder, recorded[-1]["failures"], recorded, command)


def _run_round(work: Work, now: Round, previous: Round | None, selection: pa.Table | None) -> None:
    """Train, score, select, record; what an earlier attempt finished is kept."""
    begin = time.perf_counter()
    stage(f"{now.name}: {now.stage.learner.type}, {now.stage.steps} steps")
    now.folder.mkdir(exist_ok=True)
    with work.tracker.round(now.name) as track:
        training = work.train(now, previous, selection, track)
        tables = {}
        if now.stage.ranker and work.cohorts.unlabelled:
            tables["scores"] = work.score(now, "scores", work.cohorts.unlabelled, now.stage.ranker)
            tables["selection"] = select(tables["scores"], now.stage.select, now.number)
        if work.cohorts.test:
            tables["test"] = work.score(now, "test", work.cohorts.test)
        metrics = {"stage": now.stage.name, "round": now.index, "training": training} | summarise(tables)
        metrics["seconds"] = {"round": time.perf_counter() - begin, **work.seconds}
        work.record(now, track, metrics, tables)
    now.commit(metrics)

"""The loop: for each round train, score, select, record. It knows no strategy by name."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from onelabel.cluster import resources, runtime
from onelabel.configs.schema import RunConfig
from onelabel.errors import SCAN_FAULTS, ClusterError, StorageError, last_line, sentence
from onelabel.imaging.storage import AnyPath
from onelabel.orchestrator import page
from onelabel.orchestrator.console import stage
from onelabel.orchestrator.rounds import Round, plan
from onelabel.orchestrator.select import select
from onelabel.orchestrator.setup import needs, open_cohorts, open_folder
from onelabel.orchestrator.summary import summarise
from onelabel.orchestrator.tracking import Tracker, preload
from onelabel.orchestrator.work import Work
from onelabel.tasks.train import row_queue

log = logging.getLogger(__name__)

# What may go wrong with a page, up to a mistake of ours, when there is a run that must not be lost.
_PAGE_FAULTS = (*SCAN_FAULTS, ArithmeticError, AttributeError, ImportError, LookupError, TypeError)


@dataclass(frozen=True)
class Outcome:
    """What a run leaves.

    folder : of the run; failures : scans that ended as rows with an error; rounds : their metrics, in order;
    mlflow_command : opens what was logged
    """

    folder: AnyPath
    failures: int
    rounds: list[dict[str, Any]]
    mlflow_command: str

    @property
    def report(self) -> AnyPath:
        """The page about the run, where it could be written."""
        return self.folder / page.NAME


def run(config: RunConfig, /, on_round: Callable[[dict[str, Any]], None] | None = None) -> Outcome:
    """Run all stages, or what is left of them when the folder holds an unfinished run of the same settings.

    Parameters
    ----------
    on_round : called with the metrics of every round, in order, as soon as they are known

    Raises
    ------
    OnelabelError : before any training, when the config, the data or the cluster cannot do it; later, when the
        cluster or its storage fails: what is finished is kept.
    """
    try:
        return _run(config, on_round)
    except ConnectionError as error:  # of a scan's store, outside of what costs one scan alone
        reason = sentence(error)
        raise StorageError(f"a store does not answer ({reason}); give the same command again to go on") from error


def _run(config: RunConfig, on_round: Callable[[dict[str, Any]], None] | None) -> Outcome:
    cohorts, folder = open_cohorts(config), open_folder(config)
    rounds = plan(config, folder)
    news = not all(now.done for now in rounds)
    preload()
    with runtime.connect(config.compute) as joined, Tracker(config, folder) as tracker, mendable(folder):
        demands = resources.of_stage(config.compute, **needs(config, cohorts))
        resources.check(demands, wait_s=config.compute.wait_s if joined else 0)
        if joined:
            runtime.check_shared(folder)
        work = Work(config, cohorts, folder, tracker, row_queue(), joined)
        selection = None
        with resources.watch(demands):
            for now in rounds:
                if not now.done:
                    _run_round(work, now, rounds[: now.index], selection)
                selection = now.table("selection") if now.stage.ranker else selection
                if on_round:
                    on_round(now.metrics())
        command = tracker.command()
    if news or not (folder / page.NAME).is_file():
        _report(folder)
    recorded = [now.metrics() for now in rounds]
    return Outcome(folder, recorded[-1]["failures"], recorded, command)


@contextmanager
def mendable(folder: AnyPath) -> Iterator[None]:
    """What is nobody's mistake becomes a sentence."""
    try:
        yield
    except (ray.exceptions.RayTaskError, ConnectionError):
        raise
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the cluster failed ({last_line(error)}); the same command goes on from here") from error
    except OSError as error:
        raise StorageError(
            f"storage '{folder}' failed ({sentence(error)}); mend it, and the same command goes on from here"
        ) from error


def _report(folder: AnyPath) -> None:
    """Write the report; a run without one is a run all the same."""
    log.info("writing the report")
    try:
        page.write(folder)
    except _PAGE_FAULTS as error:
        log.warning("there is no report (%s); try `onelabel report %s`", sentence(error), folder)


def _run_round(work: Work, now: Round, earlier: list[Round], selection: pa.Table | None) -> None:
    """Train, score, select, record; what an earlier attempt finished is kept."""
    begin = time.perf_counter()
    stage(f"{now.name}: {now.stage.learner.type}, {now.stage.steps} steps")
    now.folder.mkdir(exist_ok=True)
    with work.tracker.round(now.name) as track:
        training = work.train(now, earlier[-1] if earlier else None, selection, track)
        tables = work.score(now, earlier)
        if "scores" in tables:
            tables["selection"] = select(tables["scores"], now.stage.select, now.number)
        metrics = {"stage": now.stage.name, "round": now.index, "training": training} | summarise(tables)
        metrics["seconds"] = {"round": time.perf_counter() - begin, **work.seconds}
        work.record(now, track, metrics, tables)
    now.commit(metrics)

"""Strip a cohort over all machines by Ray Data: a pool of actors, one scan a task."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
import ray.data

from onelabel.errors import ClusterError
from onelabel.imaging.places import Folder
from onelabel.imaging.storage import AnyPath
from onelabel.tasks.strip_plan import Job
from onelabel.tasks.strip_worker import SCHEMA, Row, Settings, Stripper

LOST = "WorkerLost"
WINDOW = 10_000  # scans that Ray is told of at a time: each costs memory here, and has a block of its own
_LOST_SENTENCE = (
    "the worker died or failed twice over this scan, perhaps for want of memory: give it alone to a machine with more"
    " of it, or see the worker's log"
)


class Worker:
    """An actor of the pool."""

    def __init__(self, checkpoint: AnyPath | None, settings: Settings, out: Folder) -> None:
        self.stripper = Stripper(checkpoint, settings, out)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Strip a batch of one scan."""
        rows = [self.stripper(Job(**job)) for job in batch.to_pylist()]
        return pa.Table.from_pylist(rows, schema=SCHEMA)


def over_ray(
    jobs: Sequence[Job], checkpoint: AnyPath | None, settings: Settings, out: Folder, /, *, workers: int, memory: float
) -> Iterator[Row]:
    """Strip scans on a cluster that is connected; yields rows as they are done.

    A worker that dies is started again, and its scan is tried once more; a scan over which it dies again is a row too.

    Parameters
    ----------
    workers : actors
    memory : bytes that each of them is promised

    Raises
    ------
    ClusterError : the cluster fails.
    """
    for begin in range(0, len(jobs), WINDOW):
        yield from _window(jobs[begin : begin + WINDOW], checkpoint, settings, out, workers=workers, memory=memory)


def _window(
    jobs: Sequence[Job], checkpoint: AnyPath | None, settings: Settings, out: Folder, /, *, workers: int, memory: float
) -> Iterator[Row]:
    """Try all, then what died once more, when no scan waits behind another that may end its worker."""
    missing = {job.image: job for job in jobs}
    made = {"checkpoint": checkpoint, "settings": settings, "out": out}
    for at_a_time in (2, 1):
        left = list(missing.values())
        for row in _tried(left, made, workers=workers, memory=memory, at_a_time=at_a_time) if left else ():
            del missing[row["image"]]
            yield row
    for job in missing.values():
        lost = {"key": job.key, "image": job.image, "error_class": LOST, "error": _LOST_SENTENCE}
        yield dict.fromkeys(SCHEMA.names) | lost


def _tried(
    jobs: Sequence[Job], made: dict[str, Any], /, *, workers: int, memory: float, at_a_time: int
) -> Iterator[Row]:
    """The rows of scans whose worker did not die; each worker is given several, so that it need not wait for more."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # we say ourselves what failed
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a scan that kills its worker stops no other
    settings: Settings = made["settings"]
    with warnings.catch_warnings():
        # There is no other way yet to say how often a task is tried again.
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = ray.data.from_items([asdict(job) for job in jobs], override_num_blocks=len(jobs)).map_batches(
            Worker,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(jobs)), max_tasks_in_flight_per_actor=at_a_time),
            num_cpus=settings.threads or 1,
            num_gpus=1 if settings.device == "cuda" else None,
            memory=memory,
            max_restarts=-1,
            max_task_retries=0,
            fn_constructor_kwargs=made,
        )
    batch: pa.Table
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch.to_pylist()
    except ray.exceptions.RayError as error:
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
        raise ClusterError(f"the cluster failed ({reason}): the same command goes on from here") from error

"""Fit learners by Ray Train: any number of workers, CPU or GPU, resumed from the last periodic checkpoint."""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.util.queue import Empty, Queue

from onelabel.configs.schema import ComputeConfig
from onelabel.errors import ClusterError, last_line
from onelabel.imaging import storage
from onelabel.imaging.storage import AnyPath
from onelabel.models.checkpoint import META
from onelabel.tasks import streams
from onelabel.tasks.streams import Stream, SynthPool
from onelabel.tasks.worker import WEIGHTS, FitTask, Row, work

log = logging.getLogger(__name__)

_TELLING_S = 30
_MUCH_WAITING, _LITTLE_WAITING, _MUCH_IDLING = 0.1, 0.02, 0.5


@dataclass(frozen=True)
class Job:
    """A task and what surrounds it.

    sources : the learner's streams by name
    out : the checkpoint folder to write
    shown : entered in another thread when the task begins, left when it ends; what it gives is called with rows of
        step, losses, steps_per_s, wait_share and idle_share
    """

    task: FitTask
    sources: Mapping[str, Stream]
    out: AnyPath
    shown: Callable[[], AbstractContextManager[Callable[[Row], None]]]


def row_queue() -> Queue:
    """For rows from workers; on the driver's node, so that it is not lost with another."""
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": streams.this_node()})


def fit(
    jobs: Sequence[Job],
    /,
    *,
    compute: ComputeConfig,
    folder: AnyPath,
    queue: Queue,
    begun: Callable[[], None] = lambda: None,
) -> dict[str, Row]:
    """Train one task after the other in the same workers, for to start them takes long, and leave the checkpoints.

    Parameters
    ----------
    folder : Ray Train's state; a run that was cut off goes on from it. Removed at the end.
    queue : for rows from the workers; used by one call at a time
    begun : called in another thread when the first steps are made, so that all processes are there

    Returns
    -------
    By task, the figures of the whole: seconds, steps_per_s, wait_share and, of the synthesis actors, idle_share.

    Raises
    ------
    ClusterError : training failed more often than Ray Train may try again, or the store of the folder does not answer.
    """
    memory = streams.actor_bytes(max(stream.voxels for job in jobs for stream in job.sources.values()))
    # Elastic workers make their own.
    actors = 0 if compute.min_train_workers else compute.synth_actors * compute.train_workers
    pool = SynthPool(actors, cpus=compute.synth_cpus, gpus=compute.synth_gpus, memory=memory)
    settings = {
        "tasks": [(job.task, {name: ray.put(stream) for name, stream in job.sources.items()}) for job in jobs],
        "compute": compute,
        "actors": pool.actors,
        "queue": queue,
    }
    forget_torn(folder)
    try:
        with storage.answering(folder), _Listening(queue, jobs, begun):
            result = _trainer(settings, compute, folder, memory).fit()
    except ray.train.TrainingFailedError as error:
        raise ClusterError(f"training in '{folder}' failed: {last_line(error)}; the same command resumes it") from error
    finally:
        pool.close()
    if result.checkpoint is None or result.metrics is None:
        raise ClusterError(f"training in '{folder}' left no checkpoint; the same command tries again")
    with storage.answering(folder), result.checkpoint.as_directory() as kept:
        for job in jobs:
            with storage.building(job.out, last=META) as unfinished:
                shutil.copytree(Path(kept) / WEIGHTS / job.task.name, unfinished, dirs_exist_ok=True)
    storage.remove(folder)
    figures: dict[str, Row] = result.metrics["figures"]
    for name, row in figures.items():
        _advise(name, row)
    return figures


def forget_torn(folder: AnyPath, /) -> None:
    """Where the last attempt died while Ray Train wrote which checkpoints there are, training begins anew."""
    known = folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    try:
        if known.is_file():
            json.loads(known.read_text())
    except ValueError:
        log.warning("'%s' was cut off while it was written: this training begins anew", known)
        known.unlink()


def _advise(name: str, figures: Row) -> None:
    """Say which side holds the other up."""
    if figures["seconds"] < _TELLING_S:
        return
    waiting, idle = (f"{figures[key]:.0%}" for key in ("wait_share", "idle_share"))
    if figures["wait_share"] > _MUCH_WAITING:
        log.warning("%s waited %s of the time for images: raise compute.synth_actors", name, waiting)
    elif figures["idle_share"] > _MUCH_IDLING and figures["wait_share"] < _LITTLE_WAITING:
        log.info(
            "%s: synthesis actors idled %s of the time: more train workers or a smaller compute.synth_cpus", name, idle
        )


def _trainer(settings: dict[str, Any], compute: ComputeConfig, folder: AnyPath, memory: int) -> TorchTrainer:
    resources = {"CPU": compute.cpus_per_worker}
    if compute.gpus_per_worker:
        resources["GPU"] = compute.gpus_per_worker
    workers: int | tuple[int, int] = compute.train_workers
    if compute.min_train_workers:
        # Ray Train counts whole nodes, not what is free on them: a worker must hold all that it needs.
        resources["CPU"] += compute.synth_actors * compute.synth_cpus
        resources["memory"] = compute.synth_actors * memory
        workers = (compute.min_train_workers, compute.train_workers)
    return TorchTrainer(
        work,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # its base class knows no pairs
            use_gpu=compute.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )


def _free() -> str:
    """What others leave of the cluster, in words."""
    there, free = ray.cluster_resources(), ray.available_resources()
    kinds = [kind for kind in ("CPU", "GPU") if kind in there]
    return " and ".join(f"{free.get(kind, 0):g} of {there[kind]:g} {kind}s are free" for kind in kinds)


class _Listening:
    """Shows each task's rows from a thread of its own."""

    def __init__(self, queue: Queue, jobs: Sequence[Job], begun: Callable[[], None]) -> None:
        self.queue, self.jobs, self.over = queue, {job.task.name: job for job in jobs}, threading.Event()
        self.begun = begun
        self.thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _listen(self) -> None:
        with ExitStack() as stack:
            shown, show, told = "", None, time.monotonic()
            while True:
                over = self.over.is_set()
                try:
                    name, row = self.queue.get(timeout=0.5)
                except Empty:
                    if over:
                        return
                    if show is None and time.monotonic() - told > _TELLING_S:
                        told = time.monotonic()
                        log.info("no step of training yet: it is starting, or waits for resources (%s)", _free())
                    continue
                if show is None:
                    self.begun()
                if name != shown or show is None:
                    stack.close()
                    shown, show = name, stack.enter_context(self.jobs[name].shown())
                show(row)

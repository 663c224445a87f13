"""Fit a learner by Ray Train: any number of workers, CPU or GPU, resumed from the last periodic checkpoint."""

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue
from torch import nn

from onelabel.configs.schema import AutoencoderNetworkConfig, ComputeConfig, LearnerConfig, UNetConfig
from onelabel.errors import ClusterError
from onelabel.imaging.random import derive
from onelabel.models import checkpoint, networks
from onelabel.models.learners import LEARNERS, Learner, Progress, Samples
from onelabel.models.precision import use_bf16
from onelabel.tasks import streams
from onelabel.tasks.streams import Stream, SynthPool, Times

log = logging.getLogger(__name__)

Row = dict[str, float]
_STATE = "state.pt"
_WEIGHTS = "checkpoint"
_TELLING_S = 30
_MUCH_WAITING, _LITTLE_WAITING, _MUCH_IDLING = 0.1, 0.02, 0.5


@dataclass(frozen=True)
class FitTask:
    """What to fit. initial: reference to a state dict to start from, or None for fresh weights."""

    learner: LearnerConfig
    network: UNetConfig | AutoencoderNetworkConfig
    steps: int
    seed: int
    meta: checkpoint.Meta
    initial: Any = None
    round: int = 0
    rounds: int = 1
    every: int = 20


def fit(
    task: FitTask,
    sources: Mapping[str, Stream],
    /,
    *,
    compute: ComputeConfig,
    folder: Path,
    out: Path,
    queue: Queue,
    on_progress: Callable[[Row], None],
) -> Row:
    """Train until `task.steps` and leave a checkpoint.

    Parameters
    ----------
    sources : the learner's streams by name
    folder : Ray Train's state; a run that was cut off goes on from it. Removed at the end.
    out : the checkpoint folder to write
    queue : for rows from the workers; used by one call at a time
    on_progress : called from another thread with rows of step, losses, steps_per_s, wait_share and idle_share

    Returns
    -------
    The last row, of the whole: seconds, steps_per_s, wait_share and, of the synthesis actors, idle_share.

    Raises
    ------
    ClusterError : training failed more often than Ray Train may try again.
    """
    actors = compute.synth_actors * compute.train_workers
    memory = streams.actor_bytes(max(stream.voxels for stream in sources.values()))
    pool = SynthPool(actors, cpus=compute.synth_cpus, gpus=compute.synth_gpus, memory=memory)
    settings = {
        "task": task,
        "compute": compute,
        "streams": {name: ray.put(stream) for name, stream in sources.items()},
        "actors": pool.actors,
        "queue": queue,
    }
    trainer = _trainer(settings, compute, folder)
    try:
        with _Listening(queue, on_progress):
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise ClusterError(f"training in '{folder}' failed: {_cause(error)}; the same command resumes it") from error
    finally:
        pool.close()
    if result.checkpoint is None or result.metrics is None:
        raise ClusterError(f"training in '{folder}' left no checkpoint; the same command tries again")
    with result.checkpoint.as_directory() as kept:
        _move(Path(kept) / _WEIGHTS, out)
    shutil.rmtree(folder, ignore_errors=True)
    figures = {key: result.metrics[key] for key in ("seconds", "steps_per_s", "wait_share", "idle_share")}
    _advise(figures)
    return figures


def _advise(figures: Row) -> None:
    """Say which side holds the other up."""
    if figures["seconds"] < _TELLING_S:
        return
    waiting, idle = (f"{figures[key]:.0%}" for key in ("wait_share", "idle_share"))
    if figures["wait_share"] > _MUCH_WAITING:
        log.warning("training waited %s of the time for images: raise compute.synth_actors", waiting)
    elif figures["idle_share"] > _MUCH_IDLING and figures["wait_share"] < _LITTLE_WAITING:
        log.info("synthesis actors idled %s of the time: more train workers or a smaller compute.synth_cpus", idle)


def _trainer(settings: dict[str, Any], compute: ComputeConfig, folder: Path) -> TorchTrainer:
    resources = {"CPU": compute.cpus_per_worker}
    if compute.gpus_per_worker:
        resources["GPU"] = compute.gpus_per_worker
    return TorchTrainer(
        _work,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.train_workers, use_gpu=compute.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )


def loop(
    learner: Learner,
    batches: Mapping[str, Iterator[tuple[Samples, Times]]],
    task: FitTask,
    /,
    *,
    first: int,
    rank: int,
    on_step: Callable[[int, dict[str, float], Times], None],
) -> None:
    """The training loop of every method: it knows no Ray.

    Parameters
    ----------
    batches : endless batches by stream name, each with the times that it took
    first : the step to begin with
    on_step : called after each step with the step, what the learner logs and the times of its batches
    """
    parts = task.learner.accumulate
    for step in range(first, task.steps):
        logged: dict[str, list[float]] = {}
        times = []
        for part in range(parts):
            # What is random in a step depends on the step alone, so a resumed run equals an undisturbed one.
            torch.manual_seed(derive(task.seed, "step", rank, step, part))
            drawn = {name: next(iterator) for name, iterator in batches.items()}
            row = learner.step(
                {name: samples for name, (samples, _) in drawn.items()},
                Progress(step, task.steps, task.round, task.rounds, part, parts),
            )
            for key, value in row.items():
                logged.setdefault(key, []).append(value)
            times += [each for _, each in drawn.values()]
        total = Times(sum(each.waited for each in times), sum(each.made for each in times))
        on_step(step, {key: sum(values) / len(values) for key, values in logged.items()}, total)


def make_learner(task: FitTask, compute: ComputeConfig, /, *, device: torch.device, average: Any = None) -> Learner:
    """The task's learner with its initial weights."""
    torch.manual_seed(derive(task.seed, "weights"))
    network = networks.build(task.network)
    if task.initial is not None:
        network.load_state_dict(ray.get(task.initial))
    if compute.channels_last:
        layout = torch.channels_last if task.network.dims == 2 else torch.channels_last_3d
        network = network.to(memory_format=layout)  # type: ignore[call-overload]
    if compute.compile:
        network.compile()
    extra = {"average": average} if average else {}
    bf16 = use_bf16(compute.precision, device)
    return LEARNERS[task.learner.type](task.learner, network, device=device, bf16=bf16, **extra)


class _Reporter:
    """Per-step accounts, rows for the driver, and checkpoints when due."""

    def __init__(self, learner: Learner, task: FitTask, compute: ComputeConfig, queue: Queue, rank: int) -> None:
        self.learner, self.task, self.compute, self.queue, self.rank = learner, task, compute, queue, rank
        self.begin = self.saved = self.logged = time.perf_counter()
        self.total = {"seconds": 0.0, "waited": 0.0, "made": 0.0}
        self.sums: Row = {}
        self.count = 0

    def state(self, step: int) -> dict[str, Any]:
        now = time.perf_counter()
        self.total["seconds"] += now - self.begin
        self.begin = now
        return {"learner": self.learner.state_dict(), "step": step, "total": dict(self.total)}

    def resume(self, state: Mapping[str, Any]) -> int:
        self.learner.load_state_dict(state["learner"])
        self.total = dict(state["total"])
        return int(state["step"])

    def __call__(self, step: int, logged: Mapping[str, float], times: Times) -> None:
        self.count += 1
        for key, value in (*logged.items(), ("waited", times.waited), ("made", times.made)):
            self.sums[key] = self.sums.get(key, 0.0) + value
        done = step + 1
        if done % self.task.every and done < self.task.steps:
            return
        now = time.perf_counter()
        self._send(done, now)
        if done == self.task.steps or _agree(now - self.saved >= self.compute.checkpoint_every_s):
            self.save(done)
            self.saved = time.perf_counter()

    def _send(self, done: int, now: float) -> None:
        elapsed = {"seconds": now - self.logged} | {key: self.sums.pop(key) for key in ("waited", "made")}
        self.total["waited"] += elapsed["waited"]
        self.total["made"] += elapsed["made"]
        if self.rank == 0:
            row = {key: value / self.count for key, value in self.sums.items()}
            self.queue.put({"step": done, "steps_per_s": self.count / elapsed["seconds"]} | row | self._shares(elapsed))
        self.logged, self.count, self.sums = now, 0, {}

    def _shares(self, spent: Row) -> Row:
        """Shares of the time: of the trainer waiting, and of this worker's synthesis actors idling."""
        busy = spent["made"] / (spent["seconds"] * self.compute.synth_actors)
        return {"wait_share": spent["waited"] / spent["seconds"], "idle_share": max(0.0, 1 - busy)}

    def save(self, done: int) -> None:
        """Report a checkpoint; the last one holds the weights to deploy."""
        state = self.state(done)
        seconds = state["total"]["seconds"]
        metrics = {"seconds": seconds, "steps_per_s": done / seconds} | self._shares(state["total"])
        if self.rank:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, os.path.join(folder, _STATE))
            if done == self.task.steps:
                meta = replace(self.task.meta, step=done)
                checkpoint.save(Path(folder) / _WEIGHTS, self.learner.predictor().cpu(), meta)
                self.learner.predictor().to(self.learner.device)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _work(settings: dict[str, Any]) -> None:
    task: FitTask = settings["task"]
    compute: ComputeConfig = settings["compute"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(compute.threads or max(1, int(compute.cpus_per_worker)))
    learner = make_learner(task, compute, device=device, average=_average if world > 1 else None)
    reporter = _Reporter(learner, task, compute, settings["queue"], rank)
    first = 0
    kept = ray.train.get_checkpoint()
    if kept is not None:
        with kept.as_directory() as folder:
            first = reporter.resume(torch.load(os.path.join(folder, _STATE), map_location=device, weights_only=True))
    if first == task.steps:
        reporter.save(first)
        return
    batches = {
        name: streams.read(
            settings["streams"][name],
            settings["actors"][rank::world],
            first=first * task.learner.batch * task.learner.accumulate * world + rank,
            every=world,
            batch=task.learner.batch,
            ahead=compute.ahead,
            device=device,
        )
        for name in learner.streams
    }
    loop(learner, batches, task, first=first, rank=rank, on_step=reporter)


def _average(parameters: list[nn.Parameter]) -> None:
    """Replace gradients by their mean over all workers, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _agree(due: bool) -> bool:
    """What the first worker says; clocks differ, and all must save together."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return due
    flag = torch.tensor(int(due), device=ray.train.torch.get_device())
    torch.distributed.broadcast(flag, src=0)
    return bool(flag.item())


class _Listening:
    """Hands the queue's rows to a function from a thread of its own."""

    def __init__(self, queue: Queue, on_progress: Callable[[Row], None]) -> None:
        self.queue, self.on_progress, self.over = queue, on_progress, threading.Event()
        self.thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _listen(self) -> None:
        while True:
            over = self.over.is_set()
            try:
                self.on_progress(self.queue.get(timeout=0.5))
            except Empty:
                if over:
                    return


def _cause(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _move(source: Path, destination: Path) -> None:
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(destination, ignore_errors=True)
    temporary.rename(destination)

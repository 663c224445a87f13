"""The process of a train worker: it fits one task after the other, and goes on from the last periodic checkpoint."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.util.queue import Queue
from torch import nn

from onelabel.configs.learners import LearnerConfig
from onelabel.configs.schema import AutoencoderNetworkConfig, ComputeConfig, UNetConfig
from onelabel.imaging.random import derive
from onelabel.models import checkpoint, networks
from onelabel.models.learners import LEARNERS, Learner, Progress, Samples
from onelabel.models.precision import use_bf16
from onelabel.tasks import streams
from onelabel.tasks.streams import SynthPool, Times

Row = dict[str, float]
WEIGHTS = "weights"
_STATE = "state.pt"


@dataclass(frozen=True)
class FitTask:
    """What to fit.

    name : unlike that of any other task of the same call
    initial : reference to a state dict to start from, or None for fresh weights
    """

    name: str
    learner: LearnerConfig
    network: UNetConfig | AutoencoderNetworkConfig
    steps: int
    seed: int
    meta: checkpoint.Meta
    initial: Any = None
    round: int = 0
    rounds: int = 1
    every: int = 20


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


@dataclass(frozen=True)
class _Ended:
    """The tasks that came to their end: their figures by name, and the folder of their checkpoints."""

    figures: dict[str, Row]
    folder: Path

    def report(self, state: Mapping[str, Any], *, rank: int) -> None:
        """Report what ended and, from the first worker, a checkpoint with the state of the task at hand."""
        metrics = {"figures": self.figures}
        if rank:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(metrics | dict(state), os.path.join(folder, _STATE))
            shutil.copytree(self.folder, os.path.join(folder, WEIGHTS))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


class _Reporter:
    """Per-step accounts, rows for the driver, and checkpoints when due."""

    def __init__(
        self, learner: Learner, task: FitTask, compute: ComputeConfig, queue: Queue, rank: int, ended: _Ended
    ) -> None:
        self.learner, self.task, self.compute, self.queue, self.rank = learner, task, compute, queue, rank
        self.ended = ended
        self.begin = self.saved = self.logged = time.perf_counter()
        self.drawn, self.world = 0, ray.train.get_context().get_world_size()
        self.total = {"seconds": 0.0, "waited": 0.0, "made": 0.0}
        self.sums: Row = {}
        self.count = 0

    def resume(self, state: Mapping[str, Any]) -> int:
        """Go on from a state; the step that comes next."""
        self.learner.load_state_dict(state["learner"])
        self.total, self.drawn = dict(state["total"]), int(state["drawn"])
        return int(state["step"])

    def __call__(self, step: int, logged: Mapping[str, float], times: Times) -> None:
        self.count += 1
        self.drawn += self.task.learner.batch * self.task.learner.accumulate * self.world
        for key, value in (*logged.items(), ("waited", times.waited), ("made", times.made)):
            self.sums[key] = self.sums.get(key, 0.0) + value
        done = step + 1
        if done % self.task.every and done < self.task.steps:
            return
        now = time.perf_counter()
        self._send(done, now)
        if done == self.task.steps or _agree(now - self.saved >= self.compute.checkpoint_every_s):
            self._save(done)
            self.saved = time.perf_counter()

    def _send(self, done: int, now: float) -> None:
        elapsed = {"seconds": now - self.logged} | {key: self.sums.pop(key) for key in ("waited", "made")}
        self.total["waited"] += elapsed["waited"]
        self.total["made"] += elapsed["made"]
        if self.rank == 0:
            row = {key: value / self.count for key, value in self.sums.items()}
            row |= {"step": done, "steps_per_s": self.count / elapsed["seconds"]} | self._shares(elapsed)
            self.queue.put((self.task.name, row))
        self.logged, self.count, self.sums = now, 0, {}

    def _shares(self, spent: Row) -> Row:
        """Shares of the time: of the trainer waiting, and of this worker's synthesis actors idling."""
        busy = spent["made"] / (spent["seconds"] * self.compute.synth_actors)
        return {"wait_share": spent["waited"] / spent["seconds"], "idle_share": max(0.0, 1 - busy)}

    def _save(self, done: int) -> None:
        """Report a checkpoint; the last one holds the weights to deploy instead of the learner's state."""
        now = time.perf_counter()
        self.total["seconds"] += now - self.begin
        self.begin = now
        state: dict[str, Any] = {}
        if done < self.task.steps:
            state = {"task": self.task.name, "learner": self.learner.state_dict(), "step": done, "total": self.total}
            state["drawn"] = self.drawn
        else:
            rate = {"seconds": self.total["seconds"], "steps_per_s": done / self.total["seconds"]}
            self.ended.figures[self.task.name] = rate | self._shares(self.total)
            if self.rank == 0:
                meta = replace(self.task.meta, step=done)
                checkpoint.save(self.ended.folder / self.task.name, self.learner.predictor().cpu(), meta)
        self.ended.report(state, rank=self.rank)


def work(settings: dict[str, Any], /) -> None:
    """Fit the tasks that have not ended yet; Ray Train calls it in each worker."""
    compute: ComputeConfig = settings["compute"]
    torch.set_num_threads(compute.threads or max(1, int(compute.cpus_per_worker)))
    with tempfile.TemporaryDirectory() as temporary:
        ended = _Ended({}, Path(temporary) / WEIGHTS)
        ended.folder.mkdir()
        state = _kept(ended)
        settings = settings | {"actors": _actors(settings)}
        left = [part for part in settings["tasks"] if part[0].name not in ended.figures]
        for task, sources in left:
            _fit(task, sources, settings, ended, state if state.get("task") == task.name else None)
        if not left:
            ended.report({}, rank=ray.train.get_context().get_world_rank())


def _actors(settings: dict[str, Any]) -> list[Any]:
    """The synthesis actors of this worker."""
    compute: ComputeConfig = settings["compute"]
    if compute.min_train_workers:
        return SynthPool(compute.synth_actors, cpus=0, here=True).actors
    context = ray.train.get_context()
    actors: list[Any] = settings["actors"]
    return actors[context.get_world_rank() :: context.get_world_size()]


def _kept(ended: _Ended) -> dict[str, Any]:
    """What the last checkpoint holds of the task at hand; what ended goes to its place."""
    kept = ray.train.get_checkpoint()
    if kept is None:
        return {}
    with kept.as_directory() as folder:
        device = ray.train.torch.get_device()
        state: dict[str, Any] = torch.load(os.path.join(folder, _STATE), map_location=device, weights_only=True)
        shutil.copytree(os.path.join(folder, WEIGHTS), ended.folder, dirs_exist_ok=True)
    ended.figures.update(state.pop("figures"))
    return state


def _fit(
    task: FitTask, sources: Mapping[str, Any], settings: dict[str, Any], ended: _Ended, state: dict[str, Any] | None
) -> None:
    """Fit one task, from the beginning or from a state."""
    compute: ComputeConfig = settings["compute"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    learner = make_learner(task, compute, device=device, average=_average if world > 1 else None)
    reporter = _Reporter(learner, task, compute, settings["queue"], rank, ended)
    first = reporter.resume(state) if state else 0
    batches = {
        name: streams.read(
            sources[name],
            settings["actors"],
            first=reporter.drawn + rank,
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

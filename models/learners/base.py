"""What every learner is: it reads streams, steps, and hands over the network to deploy."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from onelabel.configs.learners import OptimiserConfig


@dataclass(frozen=True)
class Samples:
    """image (B, 1, *size) float32; label (B, *size) int8 with IGNORE; weight (B,) float32."""

    image: Tensor
    label: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Progress:
    """The step that is being taken, of how many; the round, of how many in its stage; the part of the step's batch."""

    step: int
    steps: int
    round: int = 0
    rounds: int = 1
    part: int = 0
    parts: int = 1


def keep(parameters: list[nn.Parameter]) -> None:
    """Leave gradients as they are: there is one worker."""


class Learner(ABC):
    """A method. `average` makes gradients the mean over all workers, in place; `segments`: its network takes images."""

    streams: ClassVar[tuple[str, ...]] = ("train",)
    segments: ClassVar[bool] = True

    def __init__(
        self,
        config: OptimiserConfig,
        network: nn.Module,
        *,
        device: torch.device,
        bf16: bool,
        average: Callable[[list[nn.Parameter]], None] = keep,
    ) -> None:
        self.network = network.to(device)
        self.device, self.bf16, self.average = device, bf16, average
        self.base = config
        self.held: list[tuple[Progress, Mapping[str, Samples]]] = []
        self.optimiser = optimiser_of(self.network, config)
        average_of = get_ema_multi_avg_fn(config.ema)
        self.mean = AveragedModel(self.network, multi_avg_fn=average_of, use_buffers=True) if config.ema else None

    @abstractmethod
    def step(self, batch: Mapping[str, Samples], progress: Progress) -> dict[str, float]:
        """Learn from one batch of each stream; returns what to log."""

    def predictor(self) -> nn.Module:
        """The network to deploy."""
        return self.mean.module if self.mean else self.network

    def state_dict(self) -> dict[str, Any]:
        """All that a restart needs."""
        state = {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}
        return state | {"mean": self.mean.state_dict()} if self.mean else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.mean:
            self.mean.load_state_dict(state["mean"])

    def autocast(self) -> torch.autocast:
        """Mixed precision where the hardware has it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def logits(self, image: Tensor, network: nn.Module | None = None, /) -> Tensor:
        """What a network in training, else its own, says of images: (B, classes, *size) float32."""
        network = self.network if network is None else network
        network.train()
        with self.autocast():
            said: Tensor = network(image)
        return said.float()

    def parts(self, batch: Mapping[str, Samples], progress: Progress) -> list[tuple[Progress, Mapping[str, Samples]]]:
        """All parts of a step's batch once the last is there, none before: for steps that need them more than once."""
        if progress.part == 0:
            self.held = []
        self.held.append((progress, batch))
        return self.held if progress.part == progress.parts - 1 else []

    def descend(self, loss: Tensor, progress: Progress) -> dict[str, float]:
        """One optimiser step of the network down a loss, or a part of one; returns what to log."""
        logged = self.minimise(loss, progress, self.network, self.optimiser)
        if self.mean and math.isfinite(logged.get("gradient_norm", math.nan)):
            self.mean.update_parameters(self.network)
        return logged

    def minimise(
        self, loss: Tensor, progress: Progress, network: nn.Module, optimiser: torch.optim.Optimizer
    ) -> dict[str, float]:
        """One step of any optimiser down a loss, or a part of one; a gradient that is not finite is skipped."""
        if progress.part == 0:
            optimiser.zero_grad()
        (loss / progress.parts).backward()
        if progress.part < progress.parts - 1:
            return {"loss": loss.item()}
        rate = learning_rate(self.base, progress)
        for group in optimiser.param_groups:
            group["lr"] = rate
        parameters = list(network.parameters())
        self.average(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.base.clip, error_if_nonfinite=False)
        if torch.isfinite(norm):
            optimiser.step()
        return {"loss": loss.item(), "gradient_norm": norm.item(), "learning_rate": rate}


def optimiser_of(network: nn.Module, config: OptimiserConfig, /) -> torch.optim.AdamW:
    """A fresh optimiser of all parameters of a network."""
    return torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)


def ramp(between: tuple[float, float], progress: Progress, /) -> float:
    """From 0 to 1 between two shares of the steps, as exp(-5 (1 - t)^2) (Laine and Aila 2017)."""
    start, end = between
    done = progress.step / progress.steps
    if done < start:
        return 0.0
    left = max(end - done, 0.0) / (end - start) if end > start else 0.0
    return math.exp(-5 * left**2)


def learning_rate(config: OptimiserConfig, progress: Progress, /) -> float:
    """Linear warm-up, then half a cosine from the peak to the final rate."""
    warmup = config.warmup * progress.steps
    if progress.step < warmup:
        return config.learning_rate * (progress.step + 1) / (warmup + 1)
    done = (progress.step - warmup) / max(progress.steps - warmup, 1)
    return config.learning_rate * (config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2)

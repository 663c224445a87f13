"""Learn from a teacher that hears how much its pseudo-labels helped (Reciprocal Learning, Zeng et al., MICCAI 2021)."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from onelabel.configs.learners import ReciprocalConfig
from onelabel.models import losses
from onelabel.models.learners.base import Learner, Progress, Samples, optimiser_of
from onelabel.models.predictor import likeliest

Part = tuple[Progress, Samples, Samples]


class ReciprocalLearner(Learner):
    """The student learns from pseudo-labels alone, the teacher from labels and from what they did to the student.

    The student is the network that is deployed; both start from the same weights. No label of the stream `unlabelled`
    is read.
    """

    streams: ClassVar[tuple[str, ...]] = ("labelled", "unlabelled")
    base: ReciprocalConfig

    def __init__(self, config: ReciprocalConfig, network: nn.Module, **options: Any) -> None:
        super().__init__(config, network, **options)
        self.teacher = deepcopy(self.network)
        self.teacher_optimiser = optimiser_of(self.teacher, config)

    def step(self, batch: Mapping[str, Samples], progress: Progress) -> dict[str, float]:
        """One step of the student, one of the teacher, at the last part of a batch.

        The student S descends CE(S(x_u), p) with p = argmax T(x_u). Then the teacher T descends
        CE(T(x_l), y) + h CE(T(x_u), p), where h says how much the student's step lowered CE(S(x_l), y).
        """
        parts = [(part, each["labelled"], each["unlabelled"]) for part, each in self.parts(batch, progress)]
        if not parts:
            return {}
        labels = [self._pseudo_label(unlabelled.image) for _, _, unlabelled in parts]
        logged: dict[str, float] = {}
        for (part, _, unlabelled), label in zip(parts, labels, strict=True):
            logged = self.descend(self._cost(self.network, unlabelled, label), part)
        pseudo_loss = logged["loss"]
        step = adam_step(self.optimiser)
        loss = self._feel(parts)
        gain = self._gain(step)
        for (part, labelled, unlabelled), label in zip(parts, labels, strict=True):
            taught = self._cost(self.teacher, labelled, labelled.label)
            heard = self._cost(self.teacher, unlabelled, label)
            told = self.minimise(taught + self.base.feedback * gain * heard, part, self.teacher, self.teacher_optimiser)
        return logged | {"loss": loss, "pseudo_loss": pseudo_loss, "teacher_loss": told["loss"], "gain": gain}

    def state_dict(self) -> dict[str, Any]:
        state = {"teacher": self.teacher.state_dict(), "teacher_optimiser": self.teacher_optimiser.state_dict()}
        return super().state_dict() | state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.teacher.load_state_dict(state["teacher"])
        self.teacher_optimiser.load_state_dict(state["teacher_optimiser"])

    @torch.no_grad()
    def _pseudo_label(self, image: Tensor) -> Tensor:
        self.teacher.eval()
        with self.autocast():
            logits: Tensor = self.teacher(image)
        return likeliest(logits)

    def _cost(self, network: nn.Module, samples: Samples, label: Tensor) -> Tensor:
        return losses.cross_entropy(self.logits(samples.image, network), label, samples.weight)

    def _feel(self, parts: list[Part]) -> float:
        """Leave the gradient of the student's loss on labels in its parameters, which stay; returns the loss."""
        self.optimiser.zero_grad()
        total = 0.0
        for _, labelled, _ in parts:
            loss = self._cost(self.network, labelled, labelled.label) / len(parts)
            loss.backward()
            total += loss.item()
        self.average(list(self.network.parameters()))
        return total

    def _gain(self, step: list[Tensor | None]) -> float:
        """To first order the drop of the loss on labels, h = <step, g_l>; 0 if there is no telling."""
        pairs = zip(step, self.network.parameters(), strict=True)
        gain = float(sum((move * p.grad).sum() for move, p in pairs if move is not None and p.grad is not None))
        return gain if abs(gain) < float("inf") else 0.0


def adam_step(optimiser: torch.optim.AdamW, /) -> list[Tensor | None]:
    """How far the last gradient alone moves each parameter, downhill: lr g / (sqrt(v) + eps).

    With plain gradient descent the gain is h = lr <g_u, g_l>. Adam moves along another direction than g_u, so g_u is
    scaled as Adam scales it. Momentum from earlier pseudo-labels is left out, for these have no merit in it; this
    gradient's own counts at once, though Adam spreads it over the steps to come.
    """
    moves: list[Tensor | None] = []
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            state, gradient = optimiser.state.get(parameter), parameter.grad
            if not state or gradient is None:
                moves.append(None)
                continue
            spread = (state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"].item())).sqrt()
            moves.append(group["lr"] * gradient / (spread + group["eps"]))
    return moves

"""Learn what an uncertainty-aware teacher is sure of, unlearn what it doubts (arXiv 2602.08797)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from onelabel.configs.learners import CurriculumConfig
from onelabel.imaging.labels import IGNORE
from onelabel.models import losses
from onelabel.models.learners.base import Learner, Progress, Samples, ramp
from onelabel.models.networks.unet import set_dropout
from onelabel.models.predictor import likeliest
from onelabel.models.rankers.views import sample_views, seen_by


class CurriculumLearner(Learner):
    """The teacher is the mean of the student's weights. No label of the stream `unlabelled` is read.

    Which scans are admitted, and when, is a matter of the stage's ranker and selection.
    """

    streams: ClassVar[tuple[str, ...]] = ("labelled", "unlabelled")
    base: CurriculumConfig

    def __init__(self, config: CurriculumConfig, network: nn.Module, **options: Any) -> None:
        super().__init__(config, network, **options)
        self.views = sample_views(config.views)

    def step(self, batch: Mapping[str, Samples], progress: Progress) -> dict[str, float]:
        """Dice and cross-entropy on labels, and the dual loss on pseudo-labels that teacher and student agree on.

        L = L_sup + r(t) (L_sup(S, y | c >= learn) + a U(S, y | c < unlearn)), U negative learning, y and c of `agreed`.
        """
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        known = _cost(self.logits(labelled.image), labelled.label, labelled.weight)
        logits = self.logits(unlabelled.image)
        label, confidence = agreed(self._taught(unlabelled.image), logits.detach().softmax(1), margin=self.base.margin)
        sure = label.where(confidence >= self.base.learn, IGNORE)
        doubtful = label.where(confidence < self.base.unlearn, IGNORE)
        learned = _cost(logits, sure, unlabelled.weight)
        unlearned = losses.negative(logits, doubtful, unlabelled.weight)
        gain = self.base.unlabelled_weight * ramp(self.base.ramp, progress)
        logged = self.descend(known + gain * (learned + self.base.unlearn_weight * unlearned), progress)
        shares = {
            f"{name}_share": (each != IGNORE).float().mean().item()
            for name, each in (("sure", sure), ("doubtful", doubtful))
        }
        return (
            logged
            | {"labelled_loss": known.item(), "learn_loss": learned.item(), "unlearn_loss": unlearned.item()}
            | shares
        )

    @torch.no_grad()
    def _taught(self, image: Tensor) -> Tensor:
        """The teacher's mean probability over its passes."""
        teacher = self.predictor().eval()
        set_dropout(teacher, self.base.of == "dropout")

        def predict(image: Tensor, /, *, dropout: bool = False) -> Tensor:
            with self.autocast():
                logits: Tensor = teacher(image)
            return logits.float().softmax(1)

        own = predict(image)
        seen = seen_by(predict, image, self.views, own=own)
        mean = own.clone()
        for each in seen if self.base.of == "views" else (predict(image) for _ in self.views):
            mean += each
        return mean / (1 + len(self.views))


def agreed(taught: Tensor, said: Tensor, /, *, margin: float) -> tuple[Tensor, Tensor]:
    """The pseudo-label that teacher and student agree on, and how sure it is.

    Where they differ, the one that is surer by more than `margin` is right, and the voxel is ignored if none is.

    Parameters
    ----------
    taught, said : probabilities (B, C, *size) of the teacher and the student

    Returns
    -------
    label : (B, *size) int with IGNORE; confidence : (B, *size), of `decided`
    """
    teacher, student = likeliest(taught), likeliest(said)
    confidence, own = decided(taught), decided(said)
    overruled = (teacher != student) & (own > confidence + margin)
    kept = (teacher == student) | (confidence > own + margin)
    label = student.where(overruled, teacher.where(kept, IGNORE))
    return label, own.where(overruled, confidence)


def decided(probability: Tensor, /) -> Tensor:
    """1 - H(p) / ln 2: (B, C, *size) -> (B, *size), at most 1; 0 between any two classes, below that among more."""
    return 1 - torch.special.entr(probability).sum(1) / math.log(2)


def _cost(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    return losses.soft_dice(logits, label, weight) + losses.cross_entropy(logits, label, weight)

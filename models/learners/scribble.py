"""Learn from scribbles with a teacher's soft predictions and features that tell classes apart (ScribSD+, Qu 2024)."""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from onelabel.configs.learners import ScribbleConfig
from onelabel.imaging.labels import IGNORE
from onelabel.models import losses
from onelabel.models.learners.base import Learner, Progress, Samples, ramp
from onelabel.models.networks.autoencoder import one_hot
from onelabel.models.networks.unet import UNet
from onelabel.models.predictor import likeliest


class ScribbleLearner(Learner):
    """The teacher is the mean of the student's weights; scales are the network's own and those of its `heads`."""

    base: ScribbleConfig
    network: UNet

    def step(self, batch: Mapping[str, Samples], progress: Progress) -> dict[str, float]:
        """Learn from the stream `train`, whose labels are IGNORE off the scribbles.

        L = L_pCE + r(t) (a L_KD + b L_CC): partial cross-entropy and distillation, each the mean over scales, and the
        contrast between the classes' mean features.
        """
        samples, base = batch["train"], self.base
        self.network.train()
        with self.autocast():
            logits, features = self.network.scales(samples.image)
        with torch.no_grad(), self.autocast():
            taught, shown = cast(UNet, self.predictor().eval()).scales(samples.image)
        pairs = [(said.float(), soft.float()) for said, soft in zip(logits, taught, strict=True)]
        partial = _mean([losses.cross_entropy(_upsampled(s, samples), samples.label, samples.weight) for s, _ in pairs])
        distilled = _mean(
            [losses.distillation(s, soft, samples.weight, temperature=base.temperature) for s, soft in pairs]
        )
        members = membership(pairs[0][1].softmax(1), samples.label, sure=base.sure)
        members = F.interpolate(members, features.shape[2:], mode="area")
        student, present = losses.prototypes(features.float(), members)
        teacher, _ = losses.prototypes(shown.float(), members)
        contrast = losses.contrast(student, teacher, present, samples.weight, temperature=base.contrast_temperature)
        gain = ramp(base.ramp, progress)
        loss = partial + gain * (base.distil_weight * distilled + base.contrast_weight * contrast)
        parts = {"partial": partial.item(), "distillation": distilled.item(), "contrast": contrast.item()}
        return self.descend(loss, progress) | parts


def membership(probability: Tensor, label: Tensor, /, *, sure: float) -> Tensor:
    """How much each voxel counts for the mean feature of each class.

    A scribbled one counts in full for its own; any other for the likeliest by its probability, if that is sure.

    Parameters
    ----------
    probability : (B, C, *size); label : (B, *size) int with IGNORE

    Returns
    -------
    (B, C, *size) float32, 0 for all voxels where a class is absent
    """
    best, winner = probability.amax(1), likeliest(probability)
    known = label != IGNORE
    share = torch.where(known, 1.0, best * (best >= sure))
    return one_hot(torch.where(known, label, winner), probability.shape[1]) * share.unsqueeze(1)


def _upsampled(logits: Tensor, samples: Samples) -> Tensor:
    size = samples.label.shape[1:]
    return F.interpolate(logits, size, mode="trilinear" if len(size) == 3 else "bilinear")


def _mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()

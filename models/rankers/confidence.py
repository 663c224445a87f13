"""How sure a network is of its mask: entropy in and around the structure."""

import math

import torch
from torch import Tensor

from onelabel.configs.schema import ConfidenceRankerConfig
from onelabel.imaging.random import derive
from onelabel.models.predictor import likeliest
from onelabel.models.rankers.base import Predict, Ranker
from onelabel.models.rankers.views import sample_views, seen_by


class ConfidenceRanker(Ranker):
    """A mask whose probabilities are far from 0 and 1 is not to be trusted."""

    def __init__(self, config: ConfidenceRankerConfig) -> None:
        self.config = config
        self.views = sample_views(config.views)

    @torch.inference_mode()
    def score(self, image: Tensor, probability: Tensor, predict: Predict) -> Tensor:
        """One less the mean entropy, as a share of the largest there can be, over the widened foreground."""
        mean = self._mean(image, probability, predict)
        masks = likeliest(probability) > 0
        return torch.stack([self._of_one(one, mask) for one, mask in zip(mean, masks, strict=True)])

    def _of_one(self, probability: Tensor, mask: Tensor) -> Tensor:
        """Of probabilities (classes, *size), and their foreground (*size)."""
        within = probability[:, _widened(mask, self.config.dilate)]
        return torch.where(mask.any(), certainty(within[None]).mean(), 0.0)

    def _mean(self, image: Tensor, probability: Tensor, predict: Predict) -> Tensor:
        if self.config.of == "prediction":
            return probability
        if self.config.of == "views":
            return torch.stack([probability, *seen_by(predict, image, self.views, own=probability)]).mean(0)
        total = torch.zeros_like(probability)
        for number in range(len(self.views)):
            torch.manual_seed(derive("dropout", number))  # dropout draws from nothing else
            total += predict(image, dropout=True)
        return total / len(self.views)


def certainty(probability: Tensor, /) -> Tensor:
    """One less the entropy, as a share of the largest there can be: (B, classes, *size) -> (B, *size)."""
    return 1 - torch.special.entr(probability).sum(1) / math.log(probability.shape[1])


def _widened(mask: Tensor, voxels: int) -> Tensor:
    """A mask (*size) bool and what lies within a cube of some voxels around it."""
    for axis, size in enumerate(mask.shape):
        wide = mask.clone()
        for shift in range(1, min(voxels, size - 1) + 1):
            wide.narrow(axis, shift, size - shift).logical_or_(mask.narrow(axis, 0, size - shift))
            wide.narrow(axis, 0, size - shift).logical_or_(mask.narrow(axis, shift, size - shift))
        mask = wide
    return mask

"""How sure a network is of its mask: entropy in and around the structure."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from onelabel.configs.schema import ConfidenceRankerConfig
from onelabel.imaging.random import derive
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
        entropy = torch.special.entr(mean).sum(1) / math.log(mean.shape[1])
        mask = probability.argmax(1) > 0
        region = _widened(mask, self.config.dilate)
        score = 1 - (entropy * region).flatten(1).sum(1) / region.flatten(1).sum(1).clamp(min=1)
        return torch.where(mask.flatten(1).any(1), score, 0.0)

    def _mean(self, image: Tensor, probability: Tensor, predict: Predict) -> Tensor:
        if self.config.of == "prediction":
            return probability
        if self.config.of == "views":
            return torch.stack([probability, *seen_by(predict, image, self.views)]).mean(0)
        total = torch.zeros_like(probability)
        for number in range(len(self.views)):
            torch.manual_seed(derive("dropout", number))  # dropout draws from nothing else
            total += predict(image, dropout=True)
        return total / len(self.views)


def _widened(mask: Tensor, voxels: int) -> Tensor:
    """A mask (B, *size) bool and what lies within some voxels of it."""
    wide = mask.float().unsqueeze(1)
    for _ in range(voxels):
        wide = F.max_pool3d(wide, 3, stride=1, padding=1)
    return wide.squeeze(1) > 0

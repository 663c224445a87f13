"""How far a mask agrees with the network's own probabilities."""

import torch
from torch import Tensor

from onelabel.configs.schema import PosteriorRankerConfig
from onelabel.models.predictor import likeliest
from onelabel.models.rankers.base import Predict, Ranker
from onelabel.models.rankers.views import sample_views, seen_by


class PosteriorRanker(Ranker):
    """The Dice that a mask can be expected to have if the probabilities, averaged over views, are right."""

    def __init__(self, config: PosteriorRankerConfig) -> None:
        self.views = sample_views(config)

    @torch.inference_mode()
    def score(self, image: Tensor, probability: Tensor, predict: Predict) -> Tensor:
        """Soft Dice of mask and mean probability, 2 sum(p m) / (sum(p) + sum(m)), mean of the mask's structures."""
        own = predict(image)
        mean = torch.stack([own, *seen_by(predict, image, self.views, own=own)]).mean(0)[:, 1:]
        label = likeliest(probability)[:, None]
        mask = label == torch.arange(1, probability.shape[1], device=label.device).view(-1, *[1] * (label.ndim - 2))
        overlap, total = (part.flatten(2).sum(2, dtype=torch.float64) for part in (mean * mask, mean + mask))
        scores = torch.where(mask.flatten(2).any(2), 2 * overlap / total, torch.nan)
        return scores.nanmean(1).nan_to_num(0.0).float()

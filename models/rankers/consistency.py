"""Agreement of the masks of several views (Specktor-Fadida 2023, arXiv 2308.10727)."""

import torch
from torch import Tensor

from onelabel.configs.schema import ConsistencyRankerConfig
from onelabel.models.predictor import likeliest
from onelabel.models.rankers.base import Predict, Ranker, agreement
from onelabel.models.rankers.views import sample_views, seen_by


class ConsistencyRanker(Ranker):
    """A mask that changes with contrast, side or angle is not to be trusted."""

    def __init__(self, config: ConsistencyRankerConfig) -> None:
        self.views = sample_views(config)

    @torch.inference_mode()
    def score(self, image: Tensor, probability: Tensor, predict: Predict) -> Tensor:
        """Median over the views, the image itself included, of the Dice with what most of them say."""
        classes = probability.shape[1]
        masks = [likeliest(each) for each in (probability, *seen_by(predict, image, self.views, own=probability))]
        votes = [torch.stack([mask == label for mask in masks]).sum(0) for label in range(classes)]
        most = likeliest(torch.stack(votes, 1))
        scores = [
            torch.stack([agreement(whole, mask) for whole, mask in zip(most, each, strict=True)]) for each in masks
        ]
        return torch.stack(scores).median(0).values

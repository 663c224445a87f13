"""Dice between a mask and its reconstruction (SingleStrip, arXiv 2508.10464, step 2)."""

import torch
from torch import Tensor, nn

from onelabel.models.networks.autoencoder import Autoencoder, one_hot, views
from onelabel.models.rankers.base import Predict, Ranker, agreement


class AutoencoderRanker(Ranker):
    """A mask that the autoencoder of the one true mask cannot reconstruct is unlike a true mask."""

    def __init__(self, network: nn.Module | None) -> None:
        if not isinstance(network, Autoencoder):
            raise TypeError(f"an autoencoder ranker needs an Autoencoder, not a {type(network).__name__}")
        self.network = network.eval()

    @torch.inference_mode()
    def score(self, image: Tensor, probability: Tensor, predict: Predict) -> Tensor:
        """3D Dice of the foreground between mask and reconstruction."""
        return torch.stack([self._score(mask) for mask in probability.argmax(1)])

    def _score(self, mask: Tensor) -> Tensor:
        seen = views(mask, self.network.config)
        again = torch.cat(
            [self.network(one_hot(part, self.network.config.classes)).argmax(1) for part in seen.split(32)]
        )
        return agreement(seen, again)

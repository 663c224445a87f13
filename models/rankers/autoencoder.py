"""Dice between a mask and its reconstruction (SingleStrip, arXiv 2508.10464, step 2)."""

import torch
from torch import Tensor, nn

from onelabel.models.networks.autoencoder import Autoencoder, views
from onelabel.models.rankers.base import Predict, Ranker

_SLICES = 16  # that the network sees at once


class AutoencoderRanker(Ranker):
    """A mask that the autoencoder of the one true mask cannot reconstruct is unlike a true mask."""

    def __init__(self, network: nn.Module | None, *, bf16: bool = False) -> None:
        if not isinstance(network, Autoencoder):
            raise TypeError(f"an autoencoder ranker needs an Autoencoder, not a {type(network).__name__}")
        self.network, self.bf16 = network.eval(), bf16

    @torch.inference_mode()
    def score(self, image: Tensor, probability: Tensor, predict: Predict) -> Tensor:
        """Soft Dice of the foreground between mask and reconstruction: 2 sum(min(m, r)) / (sum(m) + sum(r))."""
        return torch.stack([self._score(mask) for mask in probability.argmax(1)])

    def _score(self, mask: Tensor) -> Tensor:
        seen = views(mask, self.network.config)
        seen = seen[seen[:, 1:].flatten(1).any(1)]  # a slice without structure counts neither for nor against a mask
        with torch.autocast(mask.device.type, torch.bfloat16, enabled=self.bf16):
            again = torch.cat([self.network(part) for part in seen.split(_SLICES)])
        given, found = seen[:, 1:], again.float().softmax(1)[:, 1:]
        return 2 * torch.minimum(given, found).sum() / (given.sum() + found.sum()).clamp(min=1)

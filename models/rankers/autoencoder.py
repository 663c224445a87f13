"""Dice between a mask and its reconstruction (SingleStrip, arXiv 2508.10464, step 2)."""

import torch
from torch import Tensor, nn

from onelabel.models.networks.autoencoder import Autoencoder, unview, views
from onelabel.models.predictor import likeliest
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
        """Soft Dice between mask and reconstruction, 2 sum(min(m, r)) / (sum(m) + sum(r)), mean of its classes."""
        return torch.stack([self._score(mask) for mask in likeliest(probability)])

    @torch.inference_mode()
    def reconstruct(self, mask: Tensor) -> Tensor:
        """Probability of each structure (structures, *size) float32 in the reconstruction of a mask (*size) int.

        Slices without structure have none.
        """
        share = views(mask, self.network.config)
        held = share[:, 1:].flatten(1).any(1)
        share[held, 1:] = self._again(share[held])
        return torch.stack([unview(part, mask.shape, self.network.config) for part in share[:, 1:].unbind(1)])

    def _score(self, mask: Tensor) -> Tensor:
        seen = views(mask, self.network.config)
        seen = seen[seen[:, 1:].flatten(1).any(1)]  # a slice without structure counts neither for nor against a mask
        pairs = zip(seen[:, 1:].unbind(1), self._again(seen).unbind(1), strict=True)
        scores = [_agreement(given, found) for given, found in pairs if given.any()]
        return torch.stack(scores).mean() if scores else seen.new_zeros(())

    def _again(self, seen: Tensor) -> Tensor:
        """Shares of the structures (n, classes - 1, edge, ...) float32 in the reconstruction of views."""
        with torch.autocast(seen.device.type, torch.bfloat16, enabled=self.bf16):
            logits = torch.cat([self.network(part) for part in seen.split(_SLICES)])
        return logits.float().softmax(1)[:, 1:]


def _agreement(given: Tensor, found: Tensor) -> Tensor:
    return 2 * torch.minimum(given, found).sum() / (given.sum() + found.sum()).clamp(min=1)

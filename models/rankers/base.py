"""What every ranker is."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor


class Predict(Protocol):
    """Images (B, 1, *size) to probabilities (B, classes, *size); with dropout, if wanted, as in training."""

    def __call__(self, image: Tensor, /, *, dropout: bool = False) -> Tensor: ...


class Ranker(ABC):
    """Scores predictions; higher is better."""

    @abstractmethod
    def score(self, image: Tensor, probability: Tensor, predict: Predict) -> Tensor:
        """Score a batch.

        Parameters
        ----------
        image : (B, 1, *size) float32
        probability : (B, classes, *size) float32
        predict : images to probabilities, for rankers that look again

        Returns
        -------
        (B,) float32; 0 for an empty mask
        """


def agreement(one: Tensor, other: Tensor, /) -> Tensor:
    """Mean Dice of the structures that either of two label maps of any equal shape holds; 0 if the first is empty."""
    found = []
    for index in range(1, max(1, int(torch.maximum(one.max(), other.max()))) + 1):
        mine, others = one == index, other == index
        found.append(2 * (mine & others).sum() / (mine.sum() + others.sum()))
    return torch.where((one > 0).any(), torch.stack(found).nanmean(), 0.0)

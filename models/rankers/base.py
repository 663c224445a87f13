"""What every ranker is."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

Predict = Callable[[Tensor], Tensor]


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

"""Prediction of a volume in windows that overlap."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

_OVERLAP = 0.5  # share of a window, at least
_SD = 1 / 8  # of the weights, as a share of a window's edge


def slide(predict: Callable[[Tensor], Tensor], image: Tensor, window: Sequence[int], /) -> Tensor:
    """Mean over windows, each weighted by a Gaussian about its centre, where predictions are best.

    Parameters
    ----------
    predict : images (B, 1, *window) to probabilities (B, classes, *window)
    image : (B, 1, *size)
    window : (3,), cut to `size`

    Returns
    -------
    (B, classes, *size) float32
    """
    size = image.shape[2:]
    window = tuple(map(min, window, size))
    if window == tuple(size):
        return predict(image)
    weight = _weight(window, image.device)
    total, weights = torch.zeros(0), torch.zeros(size, device=image.device)
    for place in _places(size, window):
        found = predict(image[..., *place])
        if not total.numel():
            total = found.new_zeros(*found.shape[:2], *size)
        total[..., *place] += found * weight
        weights[place] += weight
    return total / weights


def _places(size: Sequence[int], window: Sequence[int]) -> Iterator[tuple[slice, slice, slice]]:
    """Windows that cover a volume, evenly."""
    starts = []
    for whole, part in zip(size, window, strict=True):
        steps = math.ceil((whole - part) / (part * (1 - _OVERLAP)))
        starts.append([round((whole - part) * step / max(steps, 1)) for step in range(steps + 1)])
    for x, y, z in product(*starts):
        yield slice(x, x + window[0]), slice(y, y + window[1]), slice(z, z + window[2])


def _weight(window: Sequence[int], device: torch.device) -> Tensor:
    x, y, z = (
        torch.exp(-0.5 * ((torch.arange(n, device=device) - (n - 1) / 2) / (_SD * n)).square()).clamp(min=1e-3)
        for n in window
    )
    return x[:, None, None] * y[:, None] * z

"""Changed copies of an image, and the way back for what a network says of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onelabel.configs.streams import ViewsConfig
from onelabel.imaging import random
from onelabel.imaging.random import uniform
from onelabel.models.rankers.base import Predict


@dataclass(frozen=True)
class View:
    """low, high : where the ends of the range [0, 1] go; flip : axes that are mirrored; angle : in the axial plane."""

    low: float
    high: float
    flip: tuple[int, ...]
    angle: float


def sample_views(config: ViewsConfig, /) -> list[View]:
    """Draw views; always the same, so that all scans are seen alike."""
    generator = random.generator("views")
    return [
        View(
            uniform(-config.contrast, config.contrast, generator),
            1 + uniform(-config.contrast, config.contrast, generator),
            tuple(axis for axis in config.flip_axes if uniform(0, 1, generator) < 0.5),
            math.radians(uniform(-config.rotate_deg, config.rotate_deg, generator)),
        )
        for _ in range(config.passes)
    ]


def look(image: Tensor, view: View, /) -> Tensor:
    """An image (B, 1, *size) float32 in [0, 1] as the view shows it."""
    seen = ((image - view.low) / (view.high - view.low)).clamp(0, 1)
    return _rotate(_flip(seen, view), view.angle)


def back(probability: Tensor, view: View, /, *, own: Tensor) -> Tensor:
    """Probabilities (B, classes, *size) of a view on the image's own grid; `own` where the view did not show it."""
    known = _flip(_rotate(probability, -view.angle), view)
    unseen = (1 - known.sum(1, keepdim=True)).clamp(min=0)
    return known + unseen * own


def seen_by(predict: Predict, image: Tensor, views: Sequence[View], /, *, own: Tensor) -> Iterator[Tensor]:
    """What a network says of each view of an image: probabilities (B, classes, *size) on the image's own grid.

    own : what it says of the image itself, which stands where a view does not show it
    """
    return (back(predict(look(image, view)), view, own=own) for view in views)


def _flip(volume: Tensor, view: View) -> Tensor:
    return volume.flip([axis + 2 for axis in view.flip]) if view.flip else volume


def _rotate(volume: Tensor, angle: float) -> Tensor:
    """Turn by an angle in the plane of the first two axes, in voxels; zero outside."""
    if angle == 0:
        return volume
    ratio = volume.shape[2] / volume.shape[3]
    cos, sin = math.cos(angle), math.sin(angle)
    # Rows and columns stand for the axes from last to first.
    matrix = torch.tensor([[1, 0, 0, 0], [0, cos, sin * ratio, 0], [0, -sin / ratio, cos, 0]], device=volume.device)
    grid = F.affine_grid(matrix.expand(len(volume), 3, 4), list(volume.shape), align_corners=False)
    return F.grid_sample(volume, grid, align_corners=False)

"""A checkpoint as a function: a scan in, its mask out, in the scan's own grid."""

from dataclasses import dataclass
from pathlib import Path

import cc3d
import fill_voids
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onelabel.imaging import volume
from onelabel.imaging.prepare import image_on_grid
from onelabel.imaging.volume import Grid, Volume
from onelabel.models.checkpoint import load_segmenter
from onelabel.models.precision import use_bf16


@dataclass(frozen=True)
class Prediction:
    """What the network says of a scan.

    mask : Volume (*native) uint8; image (1, 1, *size) and probability (1, classes, *size) float32 on the network's
    grid, whose affine (4, 4) leads to mm
    """

    mask: Volume
    image: Tensor
    probability: Tensor
    affine: NDArray[np.float64]


class Predictor:
    """Segments scans with a checkpoint."""

    def __init__(self, checkpoint: Path, /, *, device: str = "cpu", precision: str = "auto") -> None:
        self.network, self.meta = load_segmenter(checkpoint)
        self.device = torch.device(device)
        self.network.to(self.device)
        self.bf16 = use_bf16(precision, self.device)
        self.grid = Grid(tuple(self.meta.grid["spacing_mm"]), tuple(self.meta.grid["size"]))

    def __call__(self, scan: Volume, /) -> Prediction:
        """Segment a scan of any orientation and spacing."""
        conformed = image_on_grid(scan, self.grid)
        image = torch.from_numpy(conformed.data)[None, None].to(self.device)
        probability = self.probability(image)
        mask = _in_grid_of(scan, probability[0, 1:].cpu().numpy(), conformed.affine)
        return Prediction(mask, image, probability, conformed.affine)

    @torch.inference_mode()
    def probability(self, image: Tensor, /, *, dropout: bool = False) -> Tensor:
        """Class probabilities (B, classes, *size) float32 of images (B, 1, *size) on the network's grid.

        dropout : features are dropped as in training
        """
        _set_dropout(self.network, dropout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits: Tensor = self.network(image)
        return logits.float().softmax(1)


def _set_dropout(network: nn.Module, on: bool) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout2d | nn.Dropout3d):
            module.train(on)


def _in_grid_of(scan: Volume, foreground: NDArray[np.float32], affine: NDArray[np.float64]) -> Volume:
    """The cleaned mask (*native) of class probabilities (classes - 1, *size): what together exceeds one half."""
    mask = np.zeros(scan.shape, np.uint8)
    box = volume.box(foreground.sum(0) > 0.5, affine, scan)
    if box:
        corner = scan.affine.copy()
        corner[:3, 3] = (scan.affine @ [*(part.start for part in box), 1])[:3]
        native = volume.restore(foreground, affine, mask[box].shape, corner)
        label = native.argmax(0).astype(np.uint8) + np.uint8(1) if len(native) > 1 else np.uint8(1)
        mask[box] = clean(np.where(native.sum(0) > 0.5, label, np.uint8(0)))
    return Volume(mask, scan.affine)


def likeliest(probability: Tensor, /) -> Tensor:
    """The class (B, *size) int64 with the highest of the values (B, classes, *size); of equal ones the first.

    What argmax gives, which takes fifty times as long where the values of a voxel lie far apart in memory.
    """
    best, label = probability[:, 0], torch.zeros_like(probability[:, 0], dtype=torch.int64)
    for place in range(1, probability.shape[1]):
        label.masked_fill_(probability[:, place] > best, place)
        best = torch.maximum(best, probability[:, place])
    return label


def clean(mask: np.ndarray, /) -> np.ndarray:
    """Keep the largest component of the foreground and fill its holes with the first class."""
    foreground = cc3d.largest_k(mask > 0, k=1, connectivity=6) > 0
    filled = fill_voids.fill(foreground)
    cleaned = np.where(foreground, mask, 0).astype(mask.dtype)
    cleaned[filled & ~foreground] = 1
    return cleaned

"""A checkpoint as a function: a scan in, its mask out, in the scan's own grid."""

from dataclasses import dataclass
from itertools import product

import cc3d
import fill_voids
import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onelabel.configs.schema import UNetConfig
from onelabel.imaging import edges, volume
from onelabel.imaging.classes import Classes
from onelabel.imaging.prepare import image_on_grid
from onelabel.imaging.resample import box
from onelabel.imaging.storage import AnyPath
from onelabel.imaging.volume import Grid, Volume
from onelabel.models.checkpoint import load_segmenter
from onelabel.models.networks.unet import set_dropout
from onelabel.models.precision import use_bf16
from onelabel.models.windows import slide


@dataclass(frozen=True)
class Prediction:
    """What the network says of a scan.

    mask : Volume (*native), the label values of the scans that were learned from, mostly uint8
    image, probability : (1, 1, *size) and (1, classes, *size) float32 on the network's grid, whose affine (4, 4) leads
    to mm
    cut : the mask reaches an end of that grid where the scan goes on
    """

    mask: Volume
    image: Tensor
    probability: Tensor
    affine: NDArray[np.float64]
    cut: bool = False


class Predictor:
    """Segments scans with a checkpoint."""

    def __init__(self, checkpoint: AnyPath, /, *, device: str = "cpu", precision: str = "auto") -> None:
        self.network, self.meta = load_segmenter(checkpoint)
        self.device = torch.device(device)
        self.network.to(self.device)
        self.bf16 = use_bf16(precision, self.device)
        self.classes = Classes(self.meta.classes, **self.meta.labels)
        self.window = self._window()
        self.grid = Grid(tuple(self.meta.grid["spacing_mm"]), tuple(self.meta.grid["size"]))

    def __call__(self, scan: Volume, /) -> Prediction:
        """Segment a scan of any orientation and spacing."""
        conformed = image_on_grid(scan, self.grid)
        image = torch.from_numpy(conformed.data)[None, None].to(self.device)
        probability = self.probability(image)
        structures = probability[0, 1:].cpu().numpy()
        found = _in_grid_of(scan, structures, conformed.affine, self.classes)
        cut = _is_cut(found > 0, scan.affine, structures.sum(0) > 0.5, conformed.affine)
        return Prediction(Volume(self.classes.write(found), scan.affine), image, probability, conformed.affine, cut)

    @torch.inference_mode()
    def probability(self, image: Tensor, /, *, dropout: bool = False) -> Tensor:
        """Class probabilities (B, classes, *size) float32 of images (B, 1, *size) on the network's grid.

        dropout : features are dropped as in training
        """
        set_dropout(self.network, dropout)
        return slide(self._seen_at_once, image, self.window or image.shape[2:])

    def _seen_at_once(self, image: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits: Tensor = self.network(image)
        return logits.float().softmax(1)

    def _window(self) -> tuple[int, ...] | None:
        """Voxels of a window, if it learned from patches; a network over slices sees all of them, one by one."""
        if not self.meta.patch:
            return None
        axes, size = UNetConfig.model_validate(self.meta.network).axes, self.meta.grid["size"]
        return tuple(n if axis in axes else size[axis] for axis, n in enumerate(self.meta.patch))


def _in_grid_of(
    scan: Volume, structures: NDArray[np.float32], affine: NDArray[np.float64], classes: Classes
) -> NDArray[np.uint8]:
    """The cleaned classes (*native) of probabilities (structures, *size) on a network's grid."""
    found = np.zeros(scan.shape, np.uint8)
    where = box(structures.sum(0) > 0.5, affine, scan.affine, scan.shape)
    if where:
        corner = scan.affine.copy()
        corner[:3, 3] = (scan.affine @ [*(part.start for part in where), 1])[:3]
        native = volume.restore(structures, affine, found[where].shape, corner)
        found[where] = clean(classes_of(native), classes)
    return found


def _is_cut(
    mask: NDArray[np.bool_], affine: NDArray[np.float64], seen: NDArray[np.bool_], seen_affine: NDArray[np.float64]
) -> bool:
    """Whether a mask (*native) reaches an end of the grid on which it was seen (*size) where the scan goes on."""
    to_native = np.linalg.inv(affine) @ seen_affine
    for axis, last in product(range(3), (False, True)):
        place = seen.shape[axis] - 1 if last else 0
        ends = np.insert(np.argwhere(seen.take(place, axis)), axis, place, axis=1)
        beyond = ends + np.eye(3, dtype=int)[axis] * (1 if last else -1)
        at, outside = (np.rint(nib.affines.apply_affine(to_native, places)).astype(int) for places in (ends, beyond))
        held = [((0 <= places) & (places < mask.shape)).all(1) for places in (at, outside)]
        if mask[tuple(at[held[0] & held[1]].T)].any():
            return True
    return False


def likeliest(probability: Tensor, /) -> Tensor:
    """The class (B, *size) int64 with the highest of the values (B, classes, *size); of equal ones the first.

    What argmax gives, which takes fifty times as long where the values of a voxel lie far apart in memory.
    """
    best, label = probability[:, 0], torch.zeros_like(probability[:, 0], dtype=torch.int64)
    for place in range(1, probability.shape[1]):
        label.masked_fill_(probability[:, place] > best, place)
        best = torch.maximum(best, probability[:, place])
    return label


def classes_of(structures: NDArray[np.float32], /) -> NDArray[np.uint8]:
    """The class of every voxel (*size), of the probabilities (structures, *size) of all but the background."""
    if len(structures) == 1:
        return (structures[0] > 0.5).view(np.uint8)
    found = np.where(structures.max(0) > 1 - structures.sum(0), structures.argmax(0) + 1, 0)
    return found.astype(np.uint8)


def clean(mask: NDArray[np.uint8], classes: Classes | None = None, /) -> NDArray[np.uint8]:
    """Keep the largest component, of each class or of all together, and fill holes with the class that is next to them.

    Parameters
    ----------
    mask : (*size), class of every voxel
    """
    several = classes is not None and len(classes) > 2 and classes.largest == "class"
    parts = [mask == index for index in np.unique(mask[mask > 0])] if several else [mask > 0]
    kept = np.zeros(mask.shape, bool)
    for part in parts:
        kept |= cc3d.largest_k(part, k=1, connectivity=6) > 0
    cleaned = np.where(kept, mask, np.uint8(0))
    holes = fill_voids.fill(kept) & ~kept
    return edges.extend(cleaned, holes) if holes.any() else cleaned

"""Graded damage to a mask, of the kinds that networks do: from one true mask to masks of known Dice."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, distance_transform_edt, shift

from onelabel.imaging import splines
from onelabel.imaging.random import integer, uniform

KINDS = ("erode", "dilate", "shift", "cut", "leak", "holes", "ragged")

_EDGE_MM = 12.0  # the farthest that erosion, dilation and raggedness move the edge
_SHIFT_MM = 25.0
_CUT_SHARE = 0.5  # the most that is cut off, as a share of the volume
_LEAK_MM, _HOLE_MM = 45.0, 25.0  # the largest radii
_RAGGED_MM = 20.0  # between the control points of a ragged edge
_AIR = 0.1  # leaks go where the image is brighter

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Damage:
    """kind : of `KINDS`; strength : 0 for none to 1; direction : (3,) unit vector; seed : of what else is random."""

    kind: str
    strength: float
    direction: tuple[float, float, float]
    seed: int


@dataclass(frozen=True)
class Subject:
    """A true mask (*size), its image (*size) in [0, 1], and the distance to the edge in mm, negative inside."""

    mask: Mask
    image: NDArray[np.float32]
    distance_mm: NDArray[np.float32]
    spacing_mm: tuple[float, float, float]


def subject(mask: Mask, image: NDArray[np.float32], spacing_mm: tuple[float, float, float], /) -> Subject:
    """Measure a mask once, for all that is done to it. The edge lies half-way between voxels inside and outside."""
    outside, inside = (distance_transform_edt(part, sampling=spacing_mm) for part in (~mask, mask))
    half = min(spacing_mm) / 2
    distance = np.where(mask, half - inside, outside - half).astype(np.float32)
    return Subject(mask, image, distance, spacing_mm)


def sample_damage(generator: torch.Generator, /) -> Damage:
    """Draw a kind and a strength."""
    kind = KINDS[integer(0, len(KINDS) - 1, generator)]
    strength = uniform(0, 1, generator)
    x, y, z = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0).tolist()
    return Damage(kind, strength, (x, y, z), integer(0, 2**31 - 1, generator))


def apply_damage(true: Subject, damage: Damage, /) -> Mask:
    """The damaged mask, (*size) bool."""
    if damage.strength == 0 or not true.mask.any():
        return true.mask.copy()
    if damage.kind in ("erode", "dilate"):
        by_mm = damage.strength * _EDGE_MM
        return np.asarray(true.distance_mm < (by_mm if damage.kind == "dilate" else -by_mm))
    return {"shift": _shifted, "cut": _cut, "leak": _leaked, "holes": _holed, "ragged": _ragged}[damage.kind](
        true, damage
    )


def _shifted(true: Subject, damage: Damage) -> Mask:
    by = np.array(damage.direction) * damage.strength * _SHIFT_MM / true.spacing_mm
    return np.asarray(shift(true.mask.view(np.uint8), np.rint(by), order=0) > 0)


def _cut(true: Subject, damage: Damage) -> Mask:
    """Without what lies farthest in a direction: a lobe, the cerebellum, the crown."""
    along = _places_mm(true) @ np.array(damage.direction)
    kept = true.mask.copy()
    kept[true.mask] = along <= np.quantile(along, 1 - damage.strength * _CUT_SHARE)
    return kept


def _leaked(true: Subject, damage: Damage) -> Mask:
    """With what is not air around a place of the edge: eyes, scalp, dura, neck."""
    edge = np.argwhere(binary_dilation(true.mask) & ~true.mask)
    if not len(edge):
        return true.mask.copy()
    centre = edge[np.random.default_rng(damage.seed).integers(len(edge))]
    near = _within(true, centre, damage.strength * _LEAK_MM)
    return true.mask | (near & (true.image > _AIR))


def _holed(true: Subject, damage: Damage) -> Mask:
    rng = np.random.default_rng(damage.seed)
    voxels, damaged = np.argwhere(true.mask), true.mask.copy()
    for centre in voxels[rng.integers(len(voxels), size=rng.integers(1, 5))]:
        damaged &= ~_within(true, centre, damage.strength * _HOLE_MM)
    return damaged


def _ragged(true: Subject, damage: Damage) -> Mask:
    """With an edge that is moved in and out, smoothly."""
    size = (true.mask.shape[0], true.mask.shape[1], true.mask.shape[2])
    points = [max(2, round(n * mm / _RAGGED_MM)) + 2 for n, mm in zip(size, true.spacing_mm, strict=True)]
    control = torch.randn(1, *points, generator=torch.Generator().manual_seed(damage.seed))
    field = splines.evaluate(control, size)[0].numpy()
    moved_mm = np.clip(field / field.std(), -2, 2) * (damage.strength * _EDGE_MM / 2)
    return np.asarray(true.distance_mm + moved_mm < 0)


def _places_mm(true: Subject) -> NDArray[np.float64]:
    """Where the voxels of the mask are, (voxels, 3)."""
    places: NDArray[np.float64] = np.argwhere(true.mask) * np.array(true.spacing_mm)
    return places


def _within(true: Subject, centre: NDArray[np.int64], radius_mm: float) -> Mask:
    """A ball around a voxel, (*size) bool."""
    axes = [
        ((np.arange(n) - middle) * mm) ** 2
        for n, middle, mm in zip(true.mask.shape, centre, true.spacing_mm, strict=True)
    ]
    return np.asarray(axes[0][:, None, None] + axes[1][:, None] + axes[2] < radius_mm**2)

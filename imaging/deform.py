"""Shape: affine and smooth displacement in mm, and the lookup of volumes through them."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onelabel.configs.augmentation import DeformConfig
from onelabel.imaging import splines
from onelabel.imaging.random import uniform

Spacing = tuple[float, float, float]
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Deformation:
    """matrix : (3, 3) in mm about the centre; shift_mm : (3,); control_mm : (3, a, b, c) displacement splines."""

    matrix: Tensor
    shift_mm: Tensor
    control_mm: Tensor


def sample_deformation(
    config: DeformConfig, /, *, size: Size, spacing_mm: Spacing, generator: torch.Generator
) -> Deformation:
    """Draw a deformation for a grid; the generator lives on the CPU."""
    angles = [math.radians(uniform(-config.rotate_deg, config.rotate_deg, generator)) for _ in range(3)]
    scales = torch.tensor([uniform(*config.scale, generator) for _ in range(3)])
    if uniform(0, 1, generator) < config.flip:
        scales[0] *= -1
    shear = torch.eye(3)
    for row, column in ((0, 1), (0, 2), (1, 2)):
        shear[row, column] = uniform(-config.shear, config.shear, generator)
    shift = torch.tensor([uniform(-config.translate_mm, config.translate_mm, generator) for _ in range(3)])
    control = _sample_warp(config, size=size, spacing_mm=spacing_mm, generator=generator)
    return Deformation(_rotation(angles) @ shear @ torch.diag(scales), shift, control)


def control_points(deformation: Deformation, /, *, size: Size, spacing_mm: Spacing) -> Tensor:
    """Splines (3, a, b, c) of the voxel where each voxel of the new grid looks in the old one."""
    # Splines reproduce linear functions, so the affine part goes into the control points: one pass over the voxels.
    points = [n - 2 for n in deformation.control_mm.shape[1:]]
    spacing = torch.tensor(spacing_mm)
    axes = [splines.positions(n, length) - (length - 1) / 2 for n, length in zip(points, size, strict=True)]
    place_mm = torch.stack(torch.meshgrid(*axes, indexing="ij")) * spacing[:, None, None, None]
    moved = torch.einsum("ij,jabc->iabc", deformation.matrix, place_mm) + deformation.control_mm
    moved = moved + deformation.shift_mm[:, None, None, None]
    centre = (torch.tensor(size) - 1) / 2
    return moved / spacing[:, None, None, None] + centre[:, None, None, None]


def coordinates(deformation: Deformation, /, *, size: Size, spacing_mm: Spacing, device: torch.device) -> Tensor:
    """Where each voxel of the new grid looks in the old one, (3, *size) float32 voxel indices."""
    return splines.evaluate(
        control_points(deformation, size=size, spacing_mm=spacing_mm).to(device, non_blocking=True), size
    )


def nearest(place: Tensor, /, *, size: Size) -> tuple[Tensor, Tensor]:
    """Flat index of the voxel next to each place, and whether that lies inside the volume.

    Returns
    -------
    index : (voxels,) int32, clamped into the volume; inside : (voxels,) bool
    """
    index = torch.zeros(place[0].numel(), dtype=torch.int32, device=place.device)
    inside = torch.ones_like(index, dtype=torch.bool)
    for axis, length in enumerate(size):
        voxel = (place[axis].flatten() + 0.5).floor().to(torch.int32)
        clamped = voxel.clamp(0, length - 1)
        inside &= voxel == clamped
        index.mul_(length).add_(clamped)
    return index, inside


def linear(volume: Tensor, place: Tensor, /) -> Tensor:
    """Trilinear lookup, zero outside: volume (*size) float32 at place (3, *new) -> (*new) float32."""
    spans = [max(length - 1, 1) for length in volume.shape]
    grid = torch.stack([place[axis] * (2 / spans[axis]) - 1 for axis in (2, 1, 0)], dim=-1)
    return F.grid_sample(volume[None, None], grid[None], align_corners=True)[0, 0]


def jacobian_determinant(place: Tensor, /) -> Tensor:
    """Determinant of the map's derivative, (3, *size) -> (*size less one on each axis); negative where it folds."""
    corner = place[:, :-1, :-1, :-1]
    x = place[:, 1:, :-1, :-1] - corner
    y = place[:, :-1, 1:, :-1] - corner
    z = place[:, :-1, :-1, 1:] - corner
    return (torch.linalg.cross(x, y, dim=0) * z).sum(0)


def _sample_warp(config: DeformConfig, *, size: Size, spacing_mm: Spacing, generator: torch.Generator) -> Tensor:
    extent = [length * step for length, step in zip(size, spacing_mm, strict=True)]
    finest = min(config.warp_spacing_mm, default=max(extent))
    points = [max(2, math.ceil(length / finest) + 1) for length in extent]
    total = torch.zeros(3, *[n + 2 for n in points])
    for spacing in config.warp_spacing_mm:
        coarse = [max(2, math.ceil(length / spacing) + 1) + 2 for length in extent]
        noise = torch.randn(1, 3, *coarse, generator=generator)
        # Displacement in proportion to its wavelength keeps the strain of all scales alike.
        total += spacing * F.interpolate(noise, total.shape[1:], mode="trilinear", align_corners=True)[0]
    largest = uniform(*config.warp_mm, generator)
    # What counts is the displacement, which is smoother than its control points.
    fine = (3 * points[0], 3 * points[1], 3 * points[2])
    norm = splines.evaluate(total, fine).square().sum(0).max().sqrt()
    return total * (largest / norm) if norm > 0 else total


def _rotation(angles: list[float]) -> Tensor:
    matrix = torch.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    return matrix

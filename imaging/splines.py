"""Smooth functions on a grid from few control points: cubic B-splines, axis by axis, as small matrix products."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def basis(points: int, size: int, /) -> Tensor:
    """Cubic B-spline weights of `points + 2` control points at `size` equally spaced places, (size, points + 2).

    The control points 1 to `points` span the axis from end to end; one lies outside on each side. Control values that
    are linear in their position give a linear function.
    """
    place = torch.linspace(1, points, size, dtype=torch.float64)
    distance = (place[:, None] - torch.arange(points + 2)[None, :]).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far).float()


def evaluate(control: Tensor, size: tuple[int, int, int], /) -> Tensor:
    """Evaluate splines on a grid.

    Parameters
    ----------
    control : (C, a + 2, b + 2, c + 2) float32

    Returns
    -------
    (C, *size) float32
    """
    bases = [
        basis(n - 2, length).to(control.device, non_blocking=True)
        for n, length in zip(control.shape[1:], size, strict=True)
    ]
    values = torch.einsum("xa,nabc->nxbc", bases[0], control)
    values = torch.einsum("yb,nxbc->nxyc", bases[1], values)
    return torch.matmul(values, bases[2].T)


def positions(points: int, size: int, /) -> Tensor:
    """Voxel index at which each control point lies, (points + 2,) float32."""
    step = (size - 1) / (points - 1)
    return (torch.arange(points + 2) - 1) * step

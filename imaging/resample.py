"""The one place where arrays move between voxel grids."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import affine_grid, grid_sample

SLAB_VOXELS = 2**21  # resampled at a time: bounds the memory of the sampling grid
_TORCH_MODES = {"linear": "bilinear", "nearest": "nearest"}


def resample(
    data: NDArray[Any],
    affine: NDArray[np.float64],
    to_affine: NDArray[np.float64],
    to_shape: Sequence[int],
    /,
    *,
    mode: Literal["linear", "nearest"] = "linear",
    antialias: bool = False,
) -> NDArray[Any]:
    """Map an array from one voxel grid to another.

    Parameters
    ----------
    data : (*size) or (C, *size)
    affine, to_affine : (4, 4), mm
        Of the source and of the target grid.
    to_shape : (3,)
    mode : "linear" or "nearest"
    antialias : bool
        First blur along the axes that become coarser, with a Gaussian whose width (FWHM) makes up the difference
        between the two voxel sizes, in quadrature.

    Returns
    -------
    (*to_shape) or (C, *to_shape)
        float32 in linear mode, else the dtype of ``data``; 0 outside the field of view.
    """
    to_source = np.linalg.inv(affine) @ to_affine
    # Arrays that came through shared memory are read-only, and torch wants to own what it wraps.
    tensor = torch.from_numpy(np.require(data, np.float32, ["C", "W"]))
    tensor = tensor.reshape(-1, *data.shape[-3:])
    if antialias:
        steps = np.linalg.norm(to_source[:3, :3], axis=1)  # target voxel in source voxels, along each source axis
        for axis, step in enumerate(steps.tolist(), start=1):
            tensor = _blur(tensor, axis, sigma=0.425 * math.sqrt(max(0.0, step**2 - 1)))

    out = torch.empty(tensor.shape[0], *to_shape)
    depth = max(1, SLAB_VOXELS // math.prod(to_shape[1:]))
    for start in range(0, to_shape[0], depth):
        slab = out[:, start : start + depth]
        to_slab = to_source.copy()
        to_slab[:, 3] += start * to_source[:, 0]
        theta = _index_to_unit(tensor.shape[1:]) @ to_slab @ np.linalg.inv(_index_to_unit(slab.shape[1:]))
        theta = np.ascontiguousarray(theta[2::-1][:, [2, 1, 0, 3]], np.float32)  # torch counts axes from the last
        points = affine_grid(torch.from_numpy(theta)[None], [1, 1, *slab.shape[1:]], align_corners=False)
        slab[:] = grid_sample(tensor[None], points, mode=_TORCH_MODES[mode], align_corners=False)[0]
    result = out.numpy().reshape(*data.shape[:-3], *to_shape)
    return result if mode == "linear" else result.astype(data.dtype, copy=False)


def _index_to_unit(shape: Sequence[int]) -> NDArray[np.float64]:
    """(4, 4): voxel index -> torch's coordinates, where the field of view spans -1 to 1 along each axis."""
    matrix = np.diag([*(2 / n for n in shape), 1.0])
    matrix[:3, 3] = [1 / n - 1 for n in shape]
    return matrix


def _blur(tensor: torch.Tensor, axis: int, *, sigma: float) -> torch.Tensor:
    """Gaussian blur along one axis, sigma in voxels; the outermost voxels repeat beyond the edge."""
    if sigma < 0.2:  # the neighbours would weigh less than 1e-5
        return tensor
    radius, size = math.ceil(3 * sigma), tensor.shape[axis]
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    padded = tensor.index_select(axis, torch.arange(-radius, size + radius).clamp(0, size - 1))
    blurred = torch.zeros_like(tensor)
    for start, weight in enumerate((weights / weights.sum()).tolist()):
        blurred.add_(padded.narrow(axis, start, size), alpha=weight)
    return blurred

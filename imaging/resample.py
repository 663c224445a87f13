"""The one place where arrays move between voxel grids."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import affine_grid, grid_sample

SLAB_VOXELS = 2**21  # resampled at a time: bounds the memory of the sampling grid
_PARALLEL = 1e-3  # source voxels that axes may deviate from being parallel over the whole target grid
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
    steps = np.linalg.norm(to_source[:3, :3], axis=1)  # target voxel in source voxels, along each source axis
    sigmas = [0.425 * math.sqrt(max(0.0, step**2 - 1)) if antialias else 0.0 for step in steps.tolist()]
    channels = data if data.ndim == 4 else data[None]
    driver = _drivers(to_source, to_shape)
    if mode == "linear" and driver:
        out = _by_axis(channels, to_source, to_shape, driver, sigmas)
    else:
        out = _by_point(channels, to_source, to_shape, sigmas, mode)
    result = out if data.ndim == 4 else out[0]
    return result if mode == "linear" else result.astype(data.dtype, copy=False)


def box(
    inside: NDArray[np.bool_], affine: NDArray[np.float64], to_affine: NDArray[np.float64], to_shape: Sequence[int], /
) -> tuple[slice, slice, slice] | None:
    """Where a structure of one grid can lie on another one, interpolation and a margin of one voxel included.

    Parameters
    ----------
    inside : (*size) bool
        Where the structure is.
    affine, to_affine : (4, 4), mm
        Of its grid and of the target grid.
    to_shape : (3,)

    Returns
    -------
    Three slices; None where there is nothing.
    """
    ends = [np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in range(3) if inside.any()]
    if not ends:
        return None
    corners = np.array([(*corner, 1) for corner in product(*((low - 1, high + 1) for low, high in ends))])
    places = (corners @ (np.linalg.inv(to_affine) @ affine).T)[:, :3]
    low, high = np.floor(places.min(0)).astype(int) - 1, np.ceil(places.max(0)).astype(int) + 2
    parts = [slice(max(0, a), min(n, b)) for a, b, n in zip(low.tolist(), high.tolist(), to_shape, strict=True)]
    return (parts[0], parts[1], parts[2]) if all(part.start < part.stop for part in parts) else None


def _drivers(to_source: NDArray[np.float64], to_shape: Sequence[int]) -> list[int] | None:
    """For each source axis the target axis along which it runs, if the two grids are parallel."""
    moves = np.abs(to_source[:3, :3]) * np.array(to_shape) > _PARALLEL
    return moves.argmax(1).tolist() if (moves.sum(0) == 1).all() and (moves.sum(1) == 1).all() else None


def _by_axis(
    data: NDArray[Any], to_source: NDArray[np.float64], to_shape: Sequence[int], driver: list[int], sigmas: list[float]
) -> NDArray[np.float32]:
    """Between parallel grids: blur and interpolation are one small matrix for each axis."""
    weights = [
        _weights(n, to_shape[along], to_source[axis, along], to_source[axis, 3], sigma)
        for axis, (n, along, sigma) in enumerate(zip(data.shape[1:], driver, sigmas, strict=True))
    ]
    order = sorted(range(3), key=lambda axis: -abs(data.strides[axis + 1]))  # as it lies in memory
    tensor = _owned(data.transpose(0, *(axis + 1 for axis in order)))
    for place in sorted(range(3), key=lambda place: weights[order[place]].shape[0] / weights[order[place]].shape[1]):
        weight, sizes = weights[order[place]], list(tensor.shape)
        rest = math.prod(sizes[place + 2 :])
        flat = tensor.reshape(-1, sizes[place + 1], rest)
        flat = flat[..., 0] @ weight.T if rest == 1 else weight @ flat
        tensor = flat.reshape(*sizes[: place + 1], weight.shape[0], *sizes[place + 2 :])
    axes = [driver[axis] for axis in order]
    return np.ascontiguousarray(tensor.numpy().transpose(0, *(axes.index(axis) + 1 for axis in range(3))))


def _weights(size: int, to_size: int, step: float, start: float, sigma: float) -> torch.Tensor:
    """(to_size, size): what the voxels of a source axis give to each one of a target axis."""
    taps, places = _gaussian(sigma), np.arange(size)
    blur = np.zeros((size, size))
    for offset, tap in enumerate(taps, start=-(len(taps) // 2)):
        np.add.at(blur, (places, np.clip(places + offset, 0, size - 1)), tap)
    points = start + step * np.arange(to_size)
    linear = np.clip(1 - np.abs(points[:, None] - places), 0, None)
    return torch.from_numpy((linear @ blur).astype(np.float32))


def _by_point(
    data: NDArray[Any], to_source: NDArray[np.float64], to_shape: Sequence[int], sigmas: list[float], mode: str
) -> NDArray[np.float32]:
    """Between any two grids: the source is looked up at each target voxel."""
    tensor = _owned(data)
    for axis, sigma in enumerate(sigmas, start=1):
        tensor = _blur(tensor, axis, sigma)
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
    return np.asarray(out.numpy())


def _owned(data: NDArray[Any]) -> torch.Tensor:
    # Arrays that came through shared memory are read-only, and torch wants to own what it wraps.
    return torch.from_numpy(np.require(data, np.float32, ["C", "W"]))


def _index_to_unit(shape: Sequence[int]) -> NDArray[np.float64]:
    """(4, 4): voxel index -> torch's coordinates, where the field of view spans -1 to 1 along each axis."""
    matrix = np.diag([*(2 / n for n in shape), 1.0])
    matrix[:3, 3] = [1 / n - 1 for n in shape]
    return matrix


def _gaussian(sigma: float) -> list[float]:
    """Weights of a voxel and its neighbours, sigma in voxels."""
    if sigma < 0.2:  # the neighbours would weigh less than 1e-5
        return [1.0]
    radius = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return [float(weight) for weight in weights / weights.sum()]


def _blur(tensor: torch.Tensor, axis: int, sigma: float) -> torch.Tensor:
    """Gaussian blur along one axis; the outermost voxels repeat beyond the edge."""
    taps, size = _gaussian(sigma), tensor.shape[axis]
    if len(taps) == 1:
        return tensor
    radius = len(taps) // 2
    padded = tensor.index_select(axis, torch.arange(-radius, size + radius).clamp(0, size - 1))
    blurred = torch.zeros_like(tensor)
    for start, tap in enumerate(taps):
        blurred.add_(padded.narrow(axis, start, size), alpha=tap)
    return blurred

"""The CPU's engine: labels to images in few passes over the voxels, one core, compiled by numba.

Every function has a twin in torch (`deform`, `augment`, `synthesis`), which serves other devices and says in few words
what is computed here row by row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from onelabel.imaging.random import GOLDEN, NORMAL, NORMAL_SHIFT

Array = NDArray[Any]
Bases = tuple[Array, Array, Array]  # (x, a), (y, b), (c, z): splines on the axes of the new grid

_BLOCK = 64  # columns that are filtered together: what fits the nearest cache
_f, _i, _u = np.float32, np.int32, np.uint32


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile when first called; kept on disk for the next process, where there is a place to write to."""
    compiler: Any = partial(njit, fastmath=True, error_model="numpy", nogil=True)
    try:
        kernel: Callable[..., Any] = compiler(cache=True)(function)
    except RuntimeError:
        kernel = compiler()(function)
    return kernel


@compiled
def _normal(index, seed):  # type: ignore[no-untyped-def]
    """Standard normal number of a voxel: its index, hashed, is looked up."""
    x = _u(_u(_u(index) * _u(GOLDEN)) + _u(seed))
    x = _u(_u(x ^ _u(x >> _u(16))) * _u(0x7FEB352D))
    x = _u(_u(x ^ _u(x >> _u(15))) * _u(0x846CA68B))
    return NORMAL[_i(_u(x ^ _u(x >> _u(16))) >> _u(NORMAL_SHIFT))]


@compiled
def _contract(control: Array, weights: Array, out: Array) -> None:
    """`out` (c, b) = weights (a) times control (c, a, b)."""
    out[:] = 0
    for c in range(control.shape[0]):
        for a in range(control.shape[1]):
            if weights[a] != 0:
                for b in range(control.shape[2]):
                    out[c, b] += weights[a] * control[c, a, b]


@compiled
def _along(control: Array, basis: Array, out: Array) -> None:
    """`out` (c, z) = control (c, m) times basis (m, z)."""
    for c in range(control.shape[0]):
        row = out[c]
        row[:] = 0
        for m in range(control.shape[1]):
            weight, values = control[c, m], basis[m]
            for z in range(row.shape[0]):
                row[z] += weight * values[z]


@compiled
def _nearest(place: Array, size: tuple[int, int, int], index: Array, inside: Array) -> None:
    """Flat index of the voxel next to each place of a row (clamped), and whether the place lies in the volume."""
    ends = _i(size[0] - 1), _i(size[1] - 1), _i(size[2] - 1)
    steps = _i(size[1] * size[2]), _i(size[2])
    px, py, pz, half = place[0], place[1], place[2], _f(0.5)
    for z in range(index.shape[0]):
        i, j, k = _i(np.floor(px[z] + half)), _i(np.floor(py[z] + half)), _i(np.floor(pz[z] + half))
        ci, cj, ck = min(max(i, _i(0)), ends[0]), min(max(j, _i(0)), ends[1]), min(max(k, _i(0)), ends[2])
        inside[z] = (i == ci) & (j == cj) & (k == ck)
        index[z] = ci * steps[0] + cj * steps[1] + ck


@compiled
def _line(levels, k, w):  # type: ignore[no-untyped-def]
    return levels[k] * (1 - w) + levels[k + 1] * w


@compiled
def _trilinear(levels: Array, place: Array, row: Array) -> None:
    """Intensities in [0, 1] at the places of a row, zero outside."""
    sx, sy, sz = levels.shape
    for n in range(row.shape[0]):
        x, y, z = np.floor(place[0, n]), np.floor(place[1, n]), np.floor(place[2, n])
        u, v, w = place[0, n] - x, place[1, n] - y, place[2, n] - z
        i, j, k = _i(x), _i(y), _i(z)
        value = _f(0)
        if 0 <= i < sx - 1 and 0 <= j < sy - 1 and 0 <= k < sz - 1:
            a = _line(levels[i, j], k, w) * (1 - v) + _line(levels[i, j + 1], k, w) * v
            b = _line(levels[i + 1, j], k, w) * (1 - v) + _line(levels[i + 1, j + 1], k, w) * v
            value = a * (1 - u) + b * u
        else:
            for dx in range(2):
                for dy in range(2):
                    for dz in range(2):
                        if 0 <= i + dx < sx and 0 <= j + dy < sy and 0 <= k + dz < sz:
                            share = (u if dx else 1 - u) * (v if dy else 1 - v) * (w if dz else 1 - w)
                            value += share * levels[i + dx, j + dy, k + dz]
        row[n] = value * _f(1 / 255)


@compiled
def look_up(
    levels: Array,
    target: Array,
    distance_mm: Array,
    control: Array,
    bases: Bases,
    mean: Array,
    spread: Array,
    seed: int,
    cut_mm: float,
    outside: int,
    image: Array,
    label: Array,
) -> None:
    """Look up a scan through a deformation and paint it.

    Parameters
    ----------
    levels, target, distance_mm : (*source) of a BinnedScan
    control : (3, a, b, c) float32, `deform.control`
    bases : splines on the new grid
    mean, spread : (classes * 256,) float32, intensity by class (of what is unknown: the target's complement) and level;
    empty: the scan keeps its own
    seed : of the texture
    cut_mm : beyond this distance all is black; 127 for none
    outside : label of what is out of view
    image : (x, y, z) float32, written unless it is empty; label : (x, y, z) int8, written
    """
    x_basis, y_basis, z_basis = bases
    nx, ny, nz = label.shape
    a, b, c = control.shape[1:]
    plane, line, place = np.empty((3, b * c), _f), np.empty((3, c), _f), np.empty((3, nz), _f)
    index, inside = np.empty(nz, _i), np.empty(nz, np.uint8)
    all_levels, all_targets, all_mm = levels.reshape(-1), target.reshape(-1), distance_mm.reshape(-1)
    for x in range(nx):
        _contract(control.reshape(3, a, b * c), x_basis[x], plane)
        for y in range(ny):
            _contract(plane.reshape(3, b, c), y_basis[y], line)
            _along(line, z_basis, place)
            _nearest(place, target.shape, index, inside)
            truth = label[x, y]
            for z in range(nz):
                truth[z] = all_targets[index[z]] if inside[z] else outside
            if not image.size:
                continue
            row, first = image[x, y], (x * ny + y) * nz
            if not mean.size:
                _trilinear(levels, place, row)
            for z in range(nz if mean.size else 0):
                code = max(_i(truth[z]), ~_i(truth[z])) * _i(256) + _i(all_levels[index[z]]) * inside[z]
                value = mean[code] + spread[code] * _normal(first + z, seed)
                row[z] = min(max(value, _f(0)), _f(1))
            if cut_mm < 127:
                for z in range(nz):
                    if all_mm[index[z]] > cut_mm:
                        row[z] = 0


@compiled
def multiply(image: Array, control: Array, bases: Bases) -> None:
    """Multiply an image by a spline, control (1, a, b, c), in place."""
    x_basis, y_basis, z_basis = bases
    a, b, c = control.shape[1:]
    plane, line, field = np.empty((1, b * c), _f), np.empty((1, c), _f), np.empty((1, image.shape[2]), _f)
    for x in range(image.shape[0]):
        _contract(control.reshape(1, a, b * c), x_basis[x], plane)
        for y in range(image.shape[1]):
            _contract(plane.reshape(1, b, c), y_basis[y], line)
            _along(line, z_basis, field)
            row, values = image[x, y], field[0]
            for z in range(row.shape[0]):
                row[z] *= values[z]


@compiled
def _apply(source: Array, start: Array, weight: Array, out: Array, width: int) -> None:
    """Each row of out is a weighted sum of successive rows of the source; four at a time, to spare memory traffic."""
    entries = weight.shape[1]
    for o in range(start.shape[0]):
        row = out[o]
        row[:width] = 0
        for t in range(0, entries - 3, 4):
            i = start[o] + t
            one, two, three, four = source[i], source[i + 1], source[i + 2], source[i + 3]
            w, x, y, z = weight[o, t], weight[o, t + 1], weight[o, t + 2], weight[o, t + 3]
            for column in range(width):
                row[column] += w * one[column] + x * two[column] + y * three[column] + z * four[column]
        for t in range(entries - entries % 4, entries):
            w, values = weight[o, t], source[start[o] + t]
            for column in range(width):
                row[column] += w * values[column]


@compiled
def spread_columns(image: Array, start: Array, weight: Array, back_start: Array, back_weight: Array) -> None:
    """Filter the first axis of an image (n, columns) in place: to a coarse grid, and back unless that is empty."""
    n, columns = image.shape
    block, coarse = np.empty((n, _BLOCK), _f), np.empty((start.shape[0], _BLOCK), _f)
    for first in range(0, columns, _BLOCK):
        width = min(_BLOCK, columns - first)
        for i in range(n):
            for column in range(width):
                block[i, column] = image[i, first + column]
        _apply(block, start, weight, coarse, width)
        result = coarse
        if back_start.size:
            _apply(coarse, back_start, back_weight, block, width)
            result = block
        for i in range(n):
            for column in range(width):
                image[i, first + column] = result[i, column]


@compiled
def spread_rows(image: Array, start: Array, weight: Array, back_start: Array, back_weight: Array) -> None:
    """The same for the last axis of an image (rows, n)."""
    rows, n = image.shape
    turned = np.empty((n, _BLOCK), _f)
    for first in range(0, rows, _BLOCK):
        width = min(_BLOCK, rows - first)
        for r in range(width):
            for i in range(n):
                turned[i, r] = image[first + r, i]
        spread_columns(turned[:, :width], start, weight, back_start, back_weight)
        for r in range(width):
            for i in range(n):
                image[first + r, i] = turned[i, r]


@compiled
def _finished(value, index, sd, seed):  # type: ignore[no-untyped-def]
    return abs(value + sd * _normal(index, seed)) if sd > 0 else value


@compiled
def sample(image: Array, every: int, sd: float, seed: int, box: Array, out: Array) -> None:
    """Every n-th voxel with its noise; zero out of view: box (3, 2), first and last voxel (exclusive) of each axis."""
    flat = image.reshape(-1)
    ny, nz = image.shape[1:]
    for n in range(out.shape[0]):
        i = n * every
        x, y, z = i // (ny * nz), i // nz % ny, i % nz
        seen = box[0, 0] <= x < box[0, 1] and box[1, 0] <= y < box[1, 1] and box[2, 0] <= z < box[2, 1]
        out[n] = _finished(flat[i], i, _f(sd), seed) if seen else _f(0)


@compiled
def finish(
    image: Array,
    sd: float,
    seed: int,
    box: Array,
    low: float,
    scale: float,
    outside: int,
    out: Array,
    label: Array,
) -> None:
    """Noise, field of view and scale: image float32 to out uint8, zero out of view, where the label is `outside`."""
    nx, ny, nz = image.shape
    for x in range(nx):
        for y in range(ny):
            row, result, truth = image[x, y], out[x, y], label[x, y]
            if not (box[0, 0] <= x < box[0, 1] and box[1, 0] <= y < box[1, 1]):
                result[:] = 0
                truth[:] = outside
                continue
            first = (x * ny + y) * nz
            for z in range(nz):
                value = (_finished(row[z], first + z, _f(sd), seed) - _f(low)) * _f(scale)
                result[z] = np.uint8(min(max(value, _f(0)), _f(1)) * _f(255) + _f(0.5))
            for z in range(nz):
                if z < box[2, 0] or z >= box[2, 1]:
                    result[z] = 0
                    truth[z] = outside

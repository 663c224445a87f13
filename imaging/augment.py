"""What scanners do to an image: bias field, blur, low resolution, gamma, noise, field of view.

Each effect is a pair: `sample` draws all parameters, `apply` uses them on any device. `kernels` does the same on a CPU.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onelabel.configs.augmentation import AugmentConfig, CropConfig, LowResolutionConfig
from onelabel.imaging import kernels, motion, splines
from onelabel.imaging.deform import Size, Spacing
from onelabel.imaging.motion import Lines, Motion, sample_lines, sample_motion
from onelabel.imaging.random import integer, normals, uniform

_FWHM_PER_SD = 2.3548
_REACH_SD = 3  # where a Gaussian is cut off
_SAMPLES = 16384  # voxels that tell an image's range


@dataclass(frozen=True)
class Band:
    """A matrix of few entries near its diagonal.

    start : (rows,) int32, column of a row's first entry; weight : (rows, entries) float32
    """

    start: np.ndarray
    weight: np.ndarray

    def matrix(self, columns: int, /) -> Tensor:
        """The same with all its zeros, (rows, columns) float32."""
        full = np.zeros((len(self.start), columns), np.float32)
        np.put_along_axis(full, self.start[:, None] + np.arange(self.weight.shape[1]), self.weight, axis=1)
        return torch.from_numpy(full)


@dataclass(frozen=True)
class Spread:
    """Along one axis: a filter that may lead to a coarse grid, and then back from there."""

    there: Band
    back: Band | None

    def matrix(self) -> Tensor:
        """Both as one matrix, (size, size) float32."""
        size = len(self.back.start) if self.back else len(self.there.start)
        there = self.there.matrix(size)
        return self.back.matrix(len(there)) @ there if self.back else there


@dataclass(frozen=True)
class Appearance:
    """Drawn parameters; None where an effect does not happen.

    bias : (1, a, b, c) control points of the field's splines
    spread : blur and low resolution of each axis
    motion, lines : of k-space, and lost slices
    gamma : exponent; noise_sd, noise_seed : of the Gaussian noise
    crop : axis, first and last voxel (exclusive) of what stays in view
    """

    bias: Tensor | None
    spread: tuple[Spread | None, ...]
    motion: Motion | None
    lines: Lines | None
    gamma: float
    noise_sd: float
    noise_seed: int
    crop: tuple[int, int, int] | None


def sample(config: AugmentConfig, /, *, size: Size, spacing_mm: Spacing, generator: torch.Generator) -> Appearance:
    """Draw the parameters for an image of a size; the generator lives on the CPU."""
    bias = None
    if _happens(config.bias.probability, generator):
        shape = [integer(*config.bias.points, generator) + 2 for _ in range(3)]
        field = torch.rand(1, *shape, generator=generator)
        # What counts is the field, which is smoother than its control points.
        seen = splines.evaluate(field, (3 * shape[0], 3 * shape[1], 3 * shape[2]))
        strength = uniform(*config.bias.strength, generator) / (seen.max() - seen.min()).clamp(min=1e-6)
        bias = 1 - strength * (field - seen.min())
    fwhm = [0.0, 0.0, 0.0]
    if _happens(config.blur.probability, generator):
        fwhm = [uniform(*config.blur.fwhm_mm, generator) for _ in range(3)]
    coarse = _sample_resolution(config.low_resolution, generator)
    spread = tuple(
        spread_of(n, fwhm=width / step, factor=spacing / step)
        for n, width, spacing, step in zip(size, fwhm, coarse, spacing_mm, strict=True)
    )
    moved = sample_motion(config.motion, size=size, spacing_mm=spacing_mm, generator=generator)
    lines = sample_lines(config.lines, size=size, generator=generator)
    gamma = 1.0
    if _happens(config.gamma.probability, generator):
        gamma = math.exp(uniform(*config.gamma.log_exponent, generator))
    noise = uniform(*config.noise.sd, generator) if _happens(config.noise.probability, generator) else 0.0
    seed = integer(0, 2**31 - 1, generator)
    return Appearance(bias, spread, moved, lines, gamma, noise, seed, _sample_crop(config.crop, size, generator))


def apply(image: Tensor, appearance: Appearance, /, *, whole: bool = True) -> Tensor:
    """Put the effects on an image, (*size) float32 in [0, 1] -> the same; if it is a whole one, scaled by `rescale`."""
    size = (image.shape[0], image.shape[1], image.shape[2])
    field = (
        1.0
        if appearance.bias is None
        else splines.evaluate(appearance.bias.to(image.device, non_blocking=True), size)[0]
    )
    image = acquire(spread(image * field, appearance.spread), appearance)
    if appearance.noise_sd > 0:
        noise = normals(size, appearance.noise_seed, device=image.device)
        image = noise.mul_(appearance.noise_sd).add_(image).abs_()
    image = crop(image, appearance.crop)
    return rescale(image) if whole else image.clamp_(0, 1)


def acquire(image: Tensor, appearance: Appearance, /) -> Tensor:
    """Motion, lost slices and gamma; may work in place."""
    if appearance.motion is not None:
        image = motion.move(image, appearance.motion)
    if appearance.lines is not None:
        image = motion.spoil(image, appearance.lines)
    return image if appearance.gamma == 1 else image.clamp_(min=1e-6).pow_(appearance.gamma)


def spread(image: Tensor, along: tuple[Spread | None, ...], /) -> Tensor:
    """Filter each axis."""
    x, y, z = (None if one is None else one.matrix().to(image.device, non_blocking=True) for one in along)
    if z is not None:
        image = torch.matmul(image, z.T)
    if y is not None:
        image = torch.matmul(y, image)
    if x is not None:
        image = torch.matmul(x, image.flatten(1)).reshape(image.shape)
    return image


def spread_in_place(image: np.ndarray, along: tuple[Spread | None, ...], /) -> None:
    """Filter each axis of an image (*size) float32, compiled."""
    nothing = Band(np.empty(0, np.int32), np.empty((0, 0), np.float32))
    for axis, one in enumerate(along):
        if one is None:
            continue
        back = one.back or nothing
        bands = one.there.start, one.there.weight, back.start, back.weight
        if axis == 0:
            kernels.spread_columns(image.reshape(len(image), -1), *bands)
        elif axis == 1:
            for plane in image:
                kernels.spread_columns(plane, *bands)
        else:
            kernels.spread_rows(image.reshape(-1, image.shape[2]), *bands)


def spread_of(size: int, /, *, fwhm: float, factor: float) -> Spread | None:
    """Blur by a Gaussian, sample at coarse voxels and interpolate back.

    Parameters
    ----------
    size : voxels of the axis
    fwhm : full width at half maximum, in voxels; none below a quarter of a voxel
    factor : coarse voxel size in voxels; none at one or below

    Returns
    -------
    Spread | None
        Its rows sum to one; None for the identity.
    """
    if factor <= 1:
        return Spread(_gaussian(np.arange(size), fwhm, size), None) if fwhm > 0.25 else None
    count = max(2, round((size - 1) / factor) + 1)
    centres = np.linspace(0, size - 1, count)
    # A thick slice averages what it covers.
    there = _gaussian(centres, math.hypot(fwhm, factor), size)
    place = np.arange(size) * ((count - 1) / (size - 1))
    start = np.minimum(place.astype(np.int32), count - 2)
    return Spread(there, Band(start, np.stack([1 - (place - start), place - start], axis=1).astype(np.float32)))


def _gaussian(centres: np.ndarray, fwhm: float, size: int) -> Band:
    sd = fwhm / _FWHM_PER_SD
    entries = min(size, 2 * math.ceil(_REACH_SD * sd) + 1)
    start = np.clip(np.rint(centres).astype(np.int32) - entries // 2, 0, size - entries)
    weight = np.exp(-0.5 * ((start[:, None] + np.arange(entries) - centres[:, None]) / sd) ** 2)
    return Band(start, (weight / weight.sum(1, keepdims=True)).astype(np.float32))


def crop(image: Tensor, box: tuple[int, int, int] | None, /, *, outside: int = 0) -> Tensor:
    """Blank what lies out of view."""
    if box is None:
        return image
    axis, first, last = box
    seen = torch.full_like(image, outside)
    seen.narrow(axis, first, last - first).copy_(image.narrow(axis, first, last - first))
    return seen


def box(size: Size, cropped: tuple[int, int, int] | None, /) -> np.ndarray:
    """What stays in view, (3, 2) first and last voxel (exclusive) of each axis."""
    view = np.array([(0, length) for length in size])
    if cropped is not None:
        view[cropped[0]] = cropped[1:]
    return view


def rescale(image: Tensor, /) -> Tensor:
    """Scale robustly to [0, 1], as `volume.scale` does before prediction."""
    voxels = image.flatten()
    low, scale = bounds(voxels[:: stride(len(voxels))])
    return image.sub(low).mul_(scale).clamp_(0, 1)


def stride(voxels: int, /) -> int:
    """Every how many voxels one is taken to tell an image's range; prime to all axes, so that no slice is skipped."""
    first = max(1, voxels // _SAMPLES)
    return next(n for n in range(first, first + voxels + 1) if math.gcd(n, voxels) == 1)


def bounds(sample: Tensor, /) -> tuple[Tensor, Tensor]:
    """Lower bound and reciprocal width of the range that is scaled to [0, 1], without waiting for the device."""
    ordered = sample.sort().values
    dark = (ordered <= ordered.mean()).sum().clamp(max=len(ordered) - 1)
    low = _at(ordered, torch.full_like(dark, 0.001 * (len(ordered) - 1), dtype=torch.float32))
    high = _at(ordered, dark + 0.995 * (len(ordered) - 1 - dark))
    return low, (high - low).clamp(min=1e-6).reciprocal()


def _at(ordered: Tensor, place: Tensor) -> Tensor:
    """Value between two of the ordered ones; taken, for an index in brackets would wait for the device."""
    below = place.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered.take(below), ordered.take(above), place - below)


def _happens(probability: float, generator: torch.Generator) -> bool:
    return uniform(0, 1, generator) < probability


def _sample_resolution(config: LowResolutionConfig, generator: torch.Generator) -> list[float]:
    if not _happens(config.probability, generator):
        return [0.0, 0.0, 0.0]
    coarse = uniform(*config.spacing_mm, generator)
    if _happens(config.one_axis, generator):
        axis = integer(0, 2, generator)
        return [coarse if i == axis else 0.0 for i in range(3)]
    return [coarse] * 3


def _sample_crop(config: CropConfig, size: Size, generator: torch.Generator) -> tuple[int, int, int] | None:
    if not _happens(config.probability, generator):
        return None
    axis = integer(0, 2, generator)
    lost = round(uniform(*config.share, generator) * size[axis])
    return (axis, lost, size[axis]) if _happens(0.5, generator) else (axis, 0, size[axis] - lost)

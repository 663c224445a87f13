"""What scanners do to an image: bias field, blur, low resolution, gamma, noise, field of view.

Each effect is a pair: `sample` draws all parameters, `apply` uses them and leaves its input alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onelabel.configs.augmentation import AugmentConfig, CropConfig, LowResolutionConfig
from onelabel.imaging import splines
from onelabel.imaging.deform import Size, Spacing
from onelabel.imaging.random import integer, uniform

_FWHM_PER_SD = 2.3548


@dataclass(frozen=True)
class Appearance:
    """Drawn parameters; None where an effect does not happen.

    bias : (1, a, b, c) logarithm of the field's control points
    spread : a matrix (n, n) an axis, which blurs it and takes it to a coarse grid and back
    gamma : exponent; noise_sd, noise_seed : of the Gaussian noise
    crop : axis, first and last voxel (exclusive) of what stays in view
    """

    bias: Tensor | None
    spread: tuple[Tensor | None, ...]
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
        bias = torch.log1p(-uniform(*config.bias.strength, generator) * field)
    fwhm = [0.0, 0.0, 0.0]
    if _happens(config.blur.probability, generator):
        fwhm = [uniform(*config.blur.fwhm_mm, generator) for _ in range(3)]
    coarse = _sample_resolution(config.low_resolution, generator)
    spread = tuple(
        spread_matrix(n, fwhm=width / step, factor=spacing / step)
        for n, width, spacing, step in zip(size, fwhm, coarse, spacing_mm, strict=True)
    )
    gamma = 1.0
    if _happens(config.gamma.probability, generator):
        gamma = math.exp(uniform(*config.gamma.log_exponent, generator))
    noise = uniform(*config.noise.sd, generator) if _happens(config.noise.probability, generator) else 0.0
    seed = integer(0, 2**31 - 1, generator)
    return Appearance(bias, spread, gamma, noise, seed, _sample_crop(config.crop, size, generator))


def apply(image: Tensor, appearance: Appearance, /) -> Tensor:
    """Put the effects on an image, (*size) float32 in [0, 1] -> the same; scaled to [0, 1] by `rescale`."""
    size = (image.shape[0], image.shape[1], image.shape[2])
    if appearance.bias is not None:
        image = image * splines.evaluate(appearance.bias.to(image.device), size)[0].exp_()
    image = spread(image, appearance.spread)
    if appearance.gamma != 1:
        image = image.clamp(min=1e-6).pow(appearance.gamma)
    if appearance.noise_sd > 0:
        generator = torch.Generator(image.device).manual_seed(appearance.noise_seed)
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        image = noise.mul_(appearance.noise_sd).add_(image).abs_()
    return rescale(crop(image, appearance.crop))


def spread(image: Tensor, matrices: tuple[Tensor | None, ...], /) -> Tensor:
    """Multiply each axis by its matrix."""
    x, y, z = (None if m is None else m.to(image.device) for m in matrices)
    if z is not None:
        image = torch.matmul(image, z.T)
    if y is not None:
        image = torch.matmul(y, image)
    if x is not None:
        image = torch.matmul(x, image.flatten(1)).reshape(image.shape)
    return image


def spread_matrix(size: int, /, *, fwhm: float, factor: float) -> Tensor | None:
    """Blur by a Gaussian, sample at coarse voxels and interpolate back, as one matrix.

    Parameters
    ----------
    size : voxels of the axis
    fwhm : full width at half maximum, in voxels; none below a quarter of a voxel
    factor : coarse voxel size in voxels; none at one or below

    Returns
    -------
    (size, size) float32 whose rows sum to one, or None for the identity.
    """
    if factor <= 1 and fwhm <= 0.25:
        return None
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.eye(size, dtype=torch.float64)
    if factor > 1:
        # A thick slice averages what it covers.
        fwhm = math.hypot(fwhm, factor)
    if fwhm > 0.25:
        matrix = torch.exp(-0.5 * ((place[:, None] - place[None]) * (_FWHM_PER_SD / fwhm)) ** 2)
        matrix = matrix / matrix.sum(1, keepdim=True)
    if factor > 1:
        count = max(2, round(size / factor))
        centres = torch.linspace(0, size - 1, count, dtype=torch.float64)
        down = (1 - (centres[:, None] - place[None]).abs()).clamp(min=0)
        up = (1 - (place[:, None] - centres[None]).abs() * ((count - 1) / (size - 1))).clamp(min=0)
        matrix = up @ down @ matrix
    return matrix.float()


def crop(image: Tensor, box: tuple[int, int, int] | None, /) -> Tensor:
    """Zero what lies out of view."""
    if box is None:
        return image
    axis, first, last = box
    seen = torch.zeros_like(image)
    seen.narrow(axis, first, last - first).copy_(image.narrow(axis, first, last - first))
    return seen


def rescale(image: Tensor, /, *, every: int = 61) -> Tensor:
    """Scale robustly to [0, 1], as `volume.scale` does before prediction."""
    sample = image.flatten()[::every]
    low = sample.quantile(0.001)
    lit = sample[sample > sample.mean()]
    high = (lit if lit.numel() else sample).quantile(0.995)
    return ((image - low) / (high - low).clamp(min=1e-6)).clamp_(0, 1)


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

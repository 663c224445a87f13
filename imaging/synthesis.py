"""Labels to images of random shape and contrast (SingleStrip, arXiv 2508.10464, step 1)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onelabel.configs.augmentation import DeformConfig, SynthesisConfig
from onelabel.imaging import augment, deform
from onelabel.imaging.labels import AIR, LEVELS, BinnedScan, label_table
from onelabel.imaging.random import integer, uniform


@dataclass(frozen=True)
class Paint:
    """table : (classes * 256,) label of a level; mean, spread : (labels,); seed of the texture."""

    table: Tensor
    mean: Tensor
    spread: Tensor
    seed: int


@dataclass(frozen=True)
class Params:
    """Everything drawn for one image. paint is None for a real one; cut_mm where a head is stripped, or None."""

    deformation: deform.Deformation
    paint: Paint | None
    cut_mm: float | None
    appearance: augment.Appearance


def sample_params(
    scan: BinnedScan,
    config: SynthesisConfig,
    /,
    *,
    spacing_mm: deform.Spacing,
    real: bool = False,
    deform_config: DeformConfig | None = None,
    generator: torch.Generator,
) -> Params:
    """Draw shape, labels, intensities and scanner effects for a scan."""
    size = scan.levels.shape
    deformation = deform.sample_deformation(
        deform_config or config.deform, size=size, spacing_mm=spacing_mm, generator=generator
    )
    real = uniform(0, 1, generator) < config.intensity.real or real
    paint = None if real else _sample_paint(scan, config, generator)
    stripped = uniform(0, 1, generator) < config.strip.probability
    cut = uniform(*config.strip.border_mm, generator) if stripped else None
    appearance = augment.sample(config.augment, size=size, spacing_mm=spacing_mm, generator=generator)
    return Params(deformation, paint, cut, appearance)


def synthesise(
    scan: BinnedScan, params: Params, /, *, spacing_mm: deform.Spacing, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Make one training pair.

    Returns
    -------
    image : (*size) float32 in [0, 1]; label : (*size) int8 with IGNORE
    """
    where = torch.device(device)
    size = scan.levels.shape
    place = deform.coordinates(params.deformation, size=size, spacing_mm=spacing_mm, device=where)
    index, inside = deform.nearest(place, size=size)
    target = _take(scan.target, index, inside, where)
    if params.paint is None:
        image = deform.linear(_tensor(scan.levels, where).float().div_(LEVELS - 1), place)
    else:
        levels = _take(scan.levels, index, inside, where)
        image = paint(levels, target, params.paint).reshape(size)
    if params.cut_mm is not None:
        distance = _take(scan.distance_mm, index, torch.ones_like(inside), where)
        image = image.masked_fill((distance > params.cut_mm).reshape(size), 0.0)
    image = augment.apply(image, params.appearance)
    return image, augment.crop(target.reshape(size), params.appearance.crop)


def paint(levels: Tensor, target: Tensor, params: Paint, /) -> Tensor:
    """Give every label its intensity: levels (voxels,) uint8 and target (voxels,) int8 -> (voxels,) float32."""
    code = target.clamp(min=0).to(torch.int32).mul_(LEVELS).add_(levels)
    table = params.table.to(levels.device)
    image = params.mean.to(levels.device)[table].index_select(0, code)
    generator = torch.Generator(levels.device).manual_seed(params.seed)
    texture = torch.randn(code.shape, generator=generator, device=levels.device)
    return image.addcmul_(texture, params.spread.to(levels.device)[table].index_select(0, code)).clamp_(0, 1)


def _sample_paint(scan: BinnedScan, config: SynthesisConfig, generator: torch.Generator) -> Paint:
    ranges = [config.bins.background] + [config.bins.foreground] * (scan.tables.shape[0] - 1)
    counts = tuple(integer(*bounds, generator) for bounds in ranges)
    table = torch.from_numpy(label_table(scan, counts).astype(np.int64))
    labels = sum(counts) + 1
    low, high = config.intensity.mean
    mean = low + (high - low) * torch.rand(labels, generator=generator)
    mean[AIR] = uniform(*config.intensity.air, generator)
    low, high = config.intensity.spread
    spread = low + (high - low) * torch.rand(labels, generator=generator)
    spread[AIR] *= mean[AIR]
    return Paint(table, mean, spread, integer(0, 2**31 - 1, generator))


def _take(volume: np.ndarray, index: Tensor, inside: Tensor, device: torch.device) -> Tensor:
    return _tensor(volume.reshape(-1), device).index_select(0, index).mul_(inside)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    # Arrays that come through shared memory are read-only, and torch wants to own what it wraps.
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)

"""Labels to images of random shape and contrast (SingleStrip, arXiv 2508.10464, step 1)."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from onelabel.configs.augmentation import DeformConfig, SynthesisConfig
from onelabel.imaging import augment, deform, kernels, random, splines
from onelabel.imaging.labels import AIR, FAR_MM, IGNORE, LEVELS, BinnedScan, label_table
from onelabel.imaging.random import integer, uniform


@dataclass(frozen=True)
class Paint:
    """table : (classes * 256,) label of a class and level; mean, spread : (labels,); seed of the texture."""

    table: Tensor
    mean: Tensor
    spread: Tensor
    seed: int


@dataclass(frozen=True)
class Patch:
    """What a sample shows of a scan. size : (3,) voxels; centre : (3,) in voxels of the scan."""

    size: deform.Size
    centre: tuple[float, float, float]


@dataclass(frozen=True)
class Params:
    """Everything drawn for one image.

    paint : None for a real one; cut_mm : where a head is stripped, or None
    size : (3,) voxels of the image; whole : it shows all of the scan, and is scaled by what it shows
    target : (*size) int8 of `read_probability`, which stands for the scan's own target; None: that
    """

    deformation: deform.Deformation
    paint: Paint | None
    cut_mm: float | None
    appearance: augment.Appearance
    size: deform.Size
    whole: bool = True
    target: np.ndarray | None = None


def sample_params(
    scan: BinnedScan,
    config: SynthesisConfig,
    /,
    *,
    spacing_mm: deform.Spacing,
    real: bool = False,
    patch: Patch | None = None,
    deform_config: DeformConfig | None = None,
    generator: torch.Generator,
) -> Params:
    """Draw shape, labels, intensities and scanner effects for a scan, or a patch of it."""
    size = patch.size if patch else scan.levels.shape
    deformation = deform.sample_deformation(
        deform_config or config.deform, size=size, spacing_mm=spacing_mm, generator=generator
    )
    if patch:
        moved = [(c - (n - 1) / 2) * mm for c, n, mm in zip(patch.centre, size, spacing_mm, strict=True)]
        deformation = replace(deformation, shift_mm=deformation.shift_mm + torch.tensor(moved))
    real = uniform(0, 1, generator) < config.intensity.real or real
    paint = None if real else _sample_paint(scan, config, generator)
    stripped = uniform(0, 1, generator) < config.strip.probability
    cut = uniform(*config.strip.border_mm, generator) if stripped else None
    appearance = augment.sample(config.augment, size=size, spacing_mm=spacing_mm, generator=generator)
    return Params(deformation, paint, cut, appearance, size, patch is None)


def synthesise(
    scan: BinnedScan, params: Params, /, *, spacing_mm: deform.Spacing, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Make one training pair: compiled on a CPU, in torch on any other device.

    Returns
    -------
    image : (*size) uint8, 255 for the brightest; label : (*size) int8 with IGNORE
    """
    if device == "cpu":
        return _compiled(scan, params, spacing_mm)
    image, label = in_torch(scan, params, spacing_mm=spacing_mm, device=torch.device(device))
    return image.mul_(LEVELS - 1).add_(0.5).to(torch.uint8), label


def move(target: np.ndarray, deformation: deform.Deformation, /, *, spacing_mm: deform.Spacing) -> np.ndarray:
    """Look up a label map, (*size) int8, through a deformation."""
    label, no_image, none = np.empty_like(target), np.empty((0, 0, 0), np.float32), np.empty(0, np.float32)
    where = _splines(deform.control_points(deformation, size=target.shape, spacing_mm=spacing_mm), target.shape)
    kernels.look_up(target.view(np.uint8), target, target, *where, none, none, 0, 0.0, 0, no_image, label)
    return label


def in_torch(
    scan: BinnedScan, params: Params, /, *, spacing_mm: deform.Spacing, device: torch.device
) -> tuple[Tensor, Tensor]:
    """One training pair on a device: image (*size) float32 in [0, 1], label (*size) int8 with IGNORE."""
    size = params.size
    levels, target, distance_mm = _on_device(scan, device)
    if params.target is not None:
        target = torch.from_numpy(params.target).to(device, non_blocking=True)
    place = deform.coordinates(params.deformation, size=size, spacing_mm=spacing_mm, device=device)
    index, inside = deform.nearest(place, size=scan.levels.shape)
    target = target.flatten().index_select(0, index).masked_fill_(~inside, scan.outside)
    if params.paint is None:
        image = deform.linear(levels.float().div_(LEVELS - 1), place)
    else:
        seen = levels.flatten().index_select(0, index).mul_(inside)
        image = paint(seen, target, params.paint).reshape(size)
    if params.cut_mm is not None:
        beyond = distance_mm.flatten().index_select(0, index) > params.cut_mm
        image = image.masked_fill(beyond.reshape(size), 0.0)
    image = augment.apply(image, params.appearance, whole=params.whole)
    label = target.clamp_(min=IGNORE).reshape(size)
    return image, augment.crop(label, params.appearance.crop, outside=scan.outside)


def paint(levels: Tensor, target: Tensor, params: Paint, /) -> Tensor:
    """Give every label its intensity: levels (voxels,) uint8 and target (voxels,) int8 -> (voxels,) float32.

    What is unknown looks like the class of which the target holds the complement: -1 like background.
    """
    code = torch.maximum(target, ~target).to(torch.int32).mul_(LEVELS).add_(levels)
    mean, spread = (part[params.table].to(levels.device, non_blocking=True) for part in (params.mean, params.spread))
    texture = random.normals(tuple(code.shape), params.seed, device=levels.device)
    return mean.index_select(0, code).addcmul_(texture, spread.index_select(0, code)).clamp_(0, 1)


def _compiled(scan: BinnedScan, params: Params, spacing_mm: deform.Spacing) -> tuple[Tensor, Tensor]:
    size, look = params.size, params.appearance
    target = scan.target
    if params.target is not None:
        target = params.target.view()
        target.setflags(write=scan.target.flags.writeable)  # or the kernel would be compiled once more
    image, label = np.empty(size, np.float32), np.empty(size, np.int8)
    where = _splines(deform.control_points(params.deformation, size=size, spacing_mm=spacing_mm), size)
    mean, spread, seed = np.empty(0, np.float32), np.empty(0, np.float32), 0
    if params.paint is not None:
        mean, spread = (part[params.paint.table].numpy() for part in (params.paint.mean, params.paint.spread))
        seed = params.paint.seed
    cut = FAR_MM if params.cut_mm is None else params.cut_mm
    kernels.look_up(scan.levels, target, scan.distance_mm, *where, mean, spread, seed, cut, scan.outside, image, label)
    if look.bias is not None:
        kernels.multiply(image, *_splines(look.bias, size))
    augment.spread_in_place(image, look.spread)
    image = augment.acquire(torch.from_numpy(image), look).numpy()
    noise, box = (look.noise_sd, look.noise_seed), augment.box(size, look.crop)
    low, scale = 0.0, 1.0
    if params.whole:
        seen = np.empty(-(-image.size // (every := augment.stride(image.size))), np.float32)
        kernels.sample(image, every, *noise, box, seen)
        low, scale = (bound.item() for bound in augment.bounds(torch.from_numpy(seen)))
    result = np.empty(size, np.uint8)
    kernels.finish(image, *noise, box, low, scale, scan.outside, result, label)
    return torch.from_numpy(result), torch.from_numpy(label).clamp_(min=IGNORE)


def _splines(control: Tensor, size: deform.Size) -> tuple[np.ndarray, kernels.Bases]:
    """Control points and their splines as the kernels take them."""
    x, y, z = (splines.basis(n - 2, length).numpy() for n, length in zip(control.shape[1:], size, strict=True))
    return control.contiguous().numpy(), (x, y, np.ascontiguousarray(z.T))


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


@lru_cache(maxsize=64)
def _on_device(scan: BinnedScan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, classes and distances of a scan, kept on the device from sample to sample."""
    # Arrays that come through shared memory are read-only, and torch wants to own what it wraps.
    arrays = [np.require(part, requirements=["C", "W"]) for part in (scan.levels, scan.target, scan.distance_mm)]
    levels, target, distance_mm = (torch.from_numpy(array).to(device) for array in arrays)
    return levels, target, distance_mm

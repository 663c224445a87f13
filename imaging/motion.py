"""Heads that move while lines of k-space are read, and slices that are lost."""

from dataclasses import dataclass

import torch
from torch import Tensor

from onelabel.configs.augmentation import DeformConfig, LinesConfig, MotionConfig
from onelabel.imaging import deform
from onelabel.imaging.deform import Deformation, Size, Spacing
from onelabel.imaging.random import integer, uniform


@dataclass(frozen=True)
class Motion:
    """axis : lines are read along it; moves : first and last line (exclusive) of each, and where the head was."""

    axis: int
    moves: tuple[tuple[int, int, Deformation], ...]
    spacing_mm: Spacing


@dataclass(frozen=True)
class Lines:
    """Slices of an axis, and the intensity that each gets."""

    axis: int
    places: tuple[int, ...]
    values: tuple[float, ...]


def sample_motion(
    config: MotionConfig, /, *, size: Size, spacing_mm: Spacing, generator: torch.Generator
) -> Motion | None:
    """Draw blocks of lines that were read with the head elsewhere; what is central, the coarse shape, stays."""
    if uniform(0, 1, generator) >= config.probability:
        return None
    axis = integer(0, 2, generator)
    blocks = integer(*config.blocks, generator)
    others = [block for block in range(blocks) if block not in (blocks // 2, (blocks - 1) // 2)]
    count = min(integer(*config.moves, generator), len(others))
    chosen = [others[int(i)] for i in torch.randperm(len(others), generator=generator)[:count]]
    rigid = DeformConfig(
        translate_mm=config.shift_mm, rotate_deg=config.rotate_deg, scale=(1, 1), shear=0, warp_mm=(0, 0), flip=0
    )
    edges = [block * size[axis] // blocks for block in range(blocks + 1)]
    moves = [
        (
            edges[block],
            edges[block + 1],
            deform.sample_deformation(rigid, size=size, spacing_mm=spacing_mm, generator=generator),
        )
        for block in chosen
    ]
    return Motion(axis, tuple(moves), spacing_mm)


def move(image: Tensor, motion: Motion, /) -> Tensor:
    """Replace blocks of lines of an image's k-space by those of the moved image, (*size) float32 -> the same."""
    size, n = (image.shape[0], image.shape[1], image.shape[2]), image.shape[motion.axis]
    # Along the other axes all of k-space is read at once, so that the transform there cancels out.
    lines = torch.fft.fft(image, dim=motion.axis)
    for first, last, where in motion.moves:
        place = deform.coordinates(where, size=size, spacing_mm=motion.spacing_mm, device=image.device)
        moved = torch.fft.fft(deform.linear(image, place), dim=motion.axis)
        # Lines are counted from the most negative frequency, the transform from zero.
        index = (torch.arange(first, last, device=image.device) - n // 2) % n
        lines.index_copy_(motion.axis, index, moved.index_select(motion.axis, index))
    return torch.fft.ifft(lines, dim=motion.axis).abs().contiguous()


def sample_lines(config: LinesConfig, /, *, size: Size, generator: torch.Generator) -> Lines | None:
    """Draw slices and what they hold."""
    if uniform(0, 1, generator) >= config.probability:
        return None
    axis = integer(0, 2, generator)
    count = min(integer(*config.count, generator), size[axis])
    places = torch.randperm(size[axis], generator=generator)[:count].tolist()
    return Lines(axis, tuple(places), tuple(uniform(0, 1, generator) for _ in places))


def spoil(image: Tensor, lines: Lines, /) -> Tensor:
    """Fill slices with their intensities, in place."""
    for place, value in zip(lines.places, lines.values, strict=True):
        image.select(lines.axis, place).fill_(value)
    return image

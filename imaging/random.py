"""Draws from an explicit generator."""

import hashlib

import numpy as np
import torch
from torch import Tensor

# Noise by hashing: any voxel's number by itself, the same on all devices. 4096 normal numbers of equal probability.
GOLDEN = 0x9E3779B1
NORMAL = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096).float().numpy()
NORMAL_SHIFT = 20


def uniform(low: float, high: float, generator: torch.Generator, /) -> float:
    """A number between low and high."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def integer(low: int, high: int, generator: torch.Generator, /) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator).item())


def derive(*parts: int | str) -> int:
    """A seed made of several parts: equal parts give equal seeds, on any machine and in any process."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive`."""
    return torch.Generator().manual_seed(derive(*parts))


def normals(size: tuple[int, ...], seed: int, /, *, device: torch.device) -> Tensor:
    """Standard normal noise (*size) float32; every voxel's number is a hash of its place and the seed."""
    low = 0xFFFFFFFF
    count = int(np.prod(size))
    x = torch.arange(count, device=device).mul_(GOLDEN).add_(seed).bitwise_and_(low)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)).mul_(factor).bitwise_and_(low)
    x ^= x >> 16
    return torch.from_numpy(NORMAL).to(device, non_blocking=True)[x >> NORMAL_SHIFT].reshape(size)

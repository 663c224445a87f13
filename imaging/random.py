"""Draws from an explicit generator."""

import hashlib

import torch


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

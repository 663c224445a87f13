from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from onelabel.configs.augmentation import BinsConfig
from onelabel.imaging.labels import HALF, BinnedScan, bin_scan

SIZE = (20, 24, 16)
SPACING_MM = (3.0, 2.5, 4.0)


@pytest.fixture(scope="session")
def head() -> tuple[np.ndarray, np.ndarray]:
    """A head in dark air: image (20, 24, 16) float32 in [0, 1], and the mask of its brain."""
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(SIZE, SPACING_MM, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt((x / 26) ** 2 + (y / 26) ** 2 + (z / 28) ** 2)
    brain = radius < 0.6
    image = np.where(radius < 1, 0.6 + 0.3 * np.sin(x / 5) * np.cos(z / 6), 0.02)
    image = np.where(brain, 0.75 + 0.2 * np.sin(y / 8), image)
    noise = np.random.default_rng(0).normal(0, 0.02, SIZE)
    return np.clip(image + noise, 0, 1).astype(np.float32), brain.astype(np.int32)


@pytest.fixture(scope="session")
def scan(head: tuple[np.ndarray, np.ndarray]) -> BinnedScan:
    """The head, binned."""
    return bin_scan(*head, spacing_mm=SPACING_MM, config=BinsConfig())


@pytest.fixture(scope="session")
def graded(scan: BinnedScan) -> BinnedScan:
    """The head with a probability that falls off across the edge of its brain."""
    probability = np.rint(255 * gaussian_filter((scan.target > 0).astype(float), 1.2)).astype(np.uint8)
    return replace(scan, probability=probability[None], target=(probability > HALF).astype(np.int8))

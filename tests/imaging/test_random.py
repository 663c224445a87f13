import math

import numpy as np
import pytest
import torch
from torch import Tensor

from onelabel.imaging import kernels
from onelabel.imaging.random import derive, generator, integer, normals, uniform

CPU = torch.device("cpu")
SEEDS = [0, 1, 2, 77, 2**20, 2**31 - 1]
NOISE = [-0.4454344, 0.7901446, 0.1570009, 0.8197590]


def correlation(one: Tensor, two: Tensor) -> float:
    return np.corrcoef(one.flatten(), two.flatten())[0, 1]


def test_draws_cover_their_range_and_nothing_else() -> None:
    source = generator("a test")
    wholes = [integer(-1, 2, source) for _ in range(200)]
    assert set(wholes) == {-1, 0, 1, 2}
    reals = [uniform(-3, 5, source) for _ in range(500)]
    assert -3 <= min(reals) < -2.8 and 4.8 < max(reals) <= 5
    assert np.histogram(reals, bins=8, range=(-3, 5))[0] == pytest.approx(500 / 8, abs=30)
    assert uniform(2, 2, source) == 2


@pytest.mark.parametrize("other", [(1, 2, 4), (1, 2), (1, 23), ("1/2", 4), (12, 3)])
def test_different_parts_give_different_seeds(other: tuple[int | str, ...]) -> None:
    assert derive(*other) != derive(1, 2, 3)
    assert derive(*other) == derive(*other)


def test_seeds_never_change() -> None:
    # Another value would give other samples to a run that is gone on with.
    assert derive(3, "train", 7) == 6248756495090153


def test_generators_of_equal_parts_draw_alike() -> None:
    one, two, other = generator(5, "x"), generator(5, "x"), generator(5, "y")
    assert torch.equal(torch.rand(8, generator=one), torch.rand(8, generator=two))
    assert not torch.equal(torch.rand(8, generator=two), torch.rand(8, generator=other))


def test_noise_never_changes() -> None:
    assert normals((2, 2), 3, device=CPU).flatten().tolist() == pytest.approx(NOISE, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_normal(seed: int) -> None:
    noise = normals((100, 100, 100), seed, device=CPU)
    assert noise.shape == (100, 100, 100)
    assert noise.dtype == torch.float32
    assert noise.mean().abs() < 0.005
    assert noise.std() == pytest.approx(1, abs=0.005)
    standard = (noise - noise.mean()) / noise.std()
    assert (standard**3).mean().abs() < 0.015
    assert (standard**4).mean() == pytest.approx(3, abs=0.04)
    for limit in (-2.0, -1.0, -0.1, 0.5, 1.5, 2.5):
        expected = (1 + math.erf(limit / math.sqrt(2))) / 2
        assert (noise < limit).float().mean() == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("seed", SEEDS[::2])
def test_neighbours_have_independent_noise(seed: int) -> None:
    noise = normals((90, 100, 110), seed, device=CPU)
    for axis, step in [(axis, step) for axis in range(3) for step in (1, 2, 3)]:
        length = noise.shape[axis] - step
        one, two = noise.narrow(axis, 0, length), noise.narrow(axis, step, length)
        assert abs(correlation(one, two)) < 0.006
        assert abs(correlation(one.square(), two.square())) < 0.006


def test_seeds_have_independent_noise() -> None:
    seeds = [*range(8), 2**16, 2**16 + 1, 2**31 - 2, 2**31 - 1]
    noise = torch.stack([normals((200_000,), seed, device=CPU) for seed in seeds])
    others = ~np.eye(len(seeds), dtype=bool)
    for values in (noise, noise.abs(), noise.square()):
        assert np.abs(np.corrcoef(values)[others]).max() < 0.012


@pytest.mark.parametrize("seed", SEEDS)
def test_the_compiled_noise_is_the_same(seed: int) -> None:
    noise = normals((64, 256, 257), seed, device=CPU).flatten()
    places = [*range(1500), 2**20, 2**22 + 1, len(noise) - 1]
    assert [kernels._normal(place, seed) for place in places] == noise[places].tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: CPU and GPU noise is not compared")
def test_the_gpu_makes_the_same_noise() -> None:
    for seed in SEEDS:
        noise = normals((100, 110, 120), seed, device=torch.device("cuda"))
        assert torch.equal(noise.cpu(), normals((100, 110, 120), seed, device=CPU))

import pytest
import torch

from onelabel.imaging.random import derive, generator, integer, uniform


def test_draws_cover_their_range_and_nothing_else() -> None:
    source = generator("a test")
    wholes = [integer(-1, 2, source) for _ in range(200)]
    assert set(wholes) == {-1, 0, 1, 2}
    reals = [uniform(-3, 5, source) for _ in range(500)]
    assert -3 <= min(reals) < -2.8 and 4.8 < max(reals) <= 5
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

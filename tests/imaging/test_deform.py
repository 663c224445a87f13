import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from onelabel.configs.augmentation import DeformConfig
from onelabel.imaging import deform, splines

SIZE = (20, 24, 16)
SPACING_MM = (3.0, 2.5, 4.0)
CPU = torch.device("cpu")
NOTHING: dict[str, Any] = {
    "translate_mm": 0,
    "rotate_deg": 0,
    "scale": (1, 1),
    "shear": 0,
    "warp_mm": (0, 0),
    "flip": 0,
}
GRIDS: list[dict[str, Any]] = [
    {"size": SIZE, "spacing_mm": SPACING_MM},
    {"size": (32, 32, 32), "spacing_mm": (2.0, 2.0, 2.0)},
    {"size": (48, 56, 56), "spacing_mm": (4.0, 4.0, 4.0)},
    {"size": (60, 20, 24), "spacing_mm": (1.0, 4.0, 6.0)},
]


def drawn(seed: int = 0, *, size: Any = SIZE, spacing_mm: Any = SPACING_MM, **changes: Any) -> deform.Deformation:
    """A deformation that does what `changes` say and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    config = DeformConfig(**(NOTHING | changes))
    return deform.sample_deformation(config, size=size, spacing_mm=spacing_mm, generator=generator)


def places(deformation: deform.Deformation, *, size: Any = SIZE, spacing_mm: Any = SPACING_MM) -> Tensor:
    return deform.coordinates(deformation, size=size, spacing_mm=spacing_mm, device=CPU)


def grid(size: Any = SIZE) -> Tensor:
    """(3, *size): every voxel's own index."""
    return torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in size], indexing="ij"))


def moved_mm(deformation: deform.Deformation, **where: Any) -> Tensor:
    """(3, *size): displacement of every voxel."""
    spacing = torch.tensor(where.get("spacing_mm", SPACING_MM))
    return (places(deformation, **where) - grid(where.get("size", SIZE))) * spacing[:, None, None, None]


def test_no_strength_is_the_identity() -> None:
    place = places(drawn())
    assert torch.allclose(place, grid(), atol=1e-4)
    index, inside = deform.nearest(place, size=SIZE)
    assert torch.equal(index, torch.arange(index.numel(), dtype=torch.int32))
    assert inside.all()
    volume = torch.rand(SIZE)
    assert torch.allclose(deform.linear(volume, place), volume, atol=1e-4)


def test_a_translation_is_in_mm() -> None:
    for seed in range(5):
        deformation = drawn(seed, translate_mm=10)
        assert deformation.shift_mm.abs().max() <= 10
        moved = moved_mm(deformation)
        assert torch.allclose(moved, deformation.shift_mm[:, None, None, None].expand_as(moved), atol=1e-3)


def test_a_known_translation_moves_a_known_voxel() -> None:
    still = drawn()
    # One voxel along the first axis, two along the second, minus one along the third.
    shifted = deform.Deformation(still.matrix, torch.tensor([3.0, 5.0, -4.0]), still.control_mm)
    volume = torch.zeros(SIZE)
    volume[10, 12, 8] = 1
    found = deform.linear(volume, places(shifted))
    assert found[9, 10, 9] == pytest.approx(1, abs=1e-3)
    assert found.sum() == pytest.approx(1, abs=1e-2)
    index, inside = deform.nearest(places(shifted), size=SIZE)
    again = (volume.flatten()[index] * inside).reshape(SIZE)
    assert again.nonzero().tolist() == [[9, 10, 9]]


def test_a_rotation_preserves_distances_to_the_centre() -> None:
    centre = (torch.tensor(SIZE) - 1) / 2
    spacing = torch.tensor(SPACING_MM)
    before = ((grid() - centre[:, None, None, None]) * spacing[:, None, None, None]).norm(dim=0)
    for seed in range(5):
        turned = places(drawn(seed, rotate_deg=40))
        after = ((turned - centre[:, None, None, None]) * spacing[:, None, None, None]).norm(dim=0)
        assert torch.allclose(before, after, atol=1e-2)
        assert not torch.allclose(turned, grid(), atol=0.5)


def test_a_rotation_preserves_volumes() -> None:
    size, ball = (32, 32, 32), torch.zeros(32, 32, 32)
    ball[((grid((32, 32, 32)) - 15.5) * 3).norm(dim=0) < 30] = 1
    ball[12:20, 2:30, 14:18] = 1
    for seed in range(5):
        place = places(drawn(seed, size=size, spacing_mm=(3, 3, 3), rotate_deg=40), size=size, spacing_mm=(3, 3, 3))
        assert deform.linear(ball, place).sum() == pytest.approx(ball.sum().item(), rel=0.01)
        assert torch.allclose(deform.jacobian_determinant(place), torch.ones(31, 31, 31), atol=1e-3)


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.25])
def test_a_scaling_multiplies_volumes(scale: float) -> None:
    determinant = deform.jacobian_determinant(places(drawn(scale=(scale, scale))))
    assert torch.allclose(determinant, torch.full_like(determinant, scale**3), atol=1e-3)


def test_shear_keeps_volumes() -> None:
    deformation = drawn(3, shear=0.3)
    assert (deformation.matrix - torch.eye(3)).abs().max() > 0.05
    assert torch.linalg.det(deformation.matrix) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("where", GRIDS)
def test_a_warp_is_as_large_as_was_drawn(where: dict[str, Any]) -> None:
    for seed, largest in itertools.product(range(8), (2.0, 15.0)):
        length = moved_mm(drawn(seed, warp_mm=(largest, largest), **where), **where).norm(dim=0)
        assert length.max() == pytest.approx(largest, rel=0.03)


def test_warps_go_in_all_directions() -> None:
    moved = torch.stack([moved_mm(drawn(seed, warp_mm=(8, 8))).flatten(1).mean(1) for seed in range(60)])
    assert (moved.mean(0).abs() < 1).all()
    assert (moved.std(0) > 0.5).all()


@pytest.mark.parametrize("spacing_mm", [(2.0, 2.0, 2.0), (1.0, 4.0, 2.0)])
def test_warps_at_the_default_strength_do_not_fold(spacing_mm: tuple[float, float, float]) -> None:
    size = (32, 32, 32)
    default = DeformConfig()
    for seed in range(6):
        warp = (default.warp_mm[1], default.warp_mm[1])
        deformation = drawn(seed, size=size, spacing_mm=spacing_mm, warp_mm=warp)
        determinant = deform.jacobian_determinant(places(deformation, size=size, spacing_mm=spacing_mm))
        assert (determinant > 0).float().mean() >= 0.999
        assert determinant.std() > 0.01, "it warps"


# The whole head at 4, 2 and 1 mm.
@pytest.mark.parametrize(("step", "seeds"), [(4, range(10)), (2, range(2)), (1, range(1))])
def test_warped_heads_do_not_fold(step: int, seeds: range) -> None:
    where: dict[str, Any] = {"size": (192 // step, 224 // step, 224 // step), "spacing_mm": (float(step),) * 3}
    largest = DeformConfig().warp_mm[1]
    for seed in seeds:
        place = places(drawn(seed, warp_mm=(largest, largest), **where), **where)
        slabs = [place[:, first : first + 2] for first in range(0, where["size"][0] - 1, step)]
        determinant = torch.cat([deform.jacobian_determinant(slab) for slab in slabs])
        assert (determinant > 0).float().mean() >= 0.999


def test_heads_deformed_in_every_way_do_not_fold() -> None:
    where: dict[str, Any] = {"size": (48, 56, 56), "spacing_mm": (4.0, 4.0, 4.0)}
    default = DeformConfig()
    for seed in range(10):
        settings = default.model_dump() | {"warp_mm": (default.warp_mm[1], default.warp_mm[1])}
        deformation = drawn(seed, **settings, **where)
        determinant = deform.jacobian_determinant(places(deformation, **where))
        assert (determinant * torch.linalg.det(deformation.matrix).sign() > 0).float().mean() >= 0.999


def test_folding_is_noticed() -> None:
    place = places(drawn())
    place[0] *= -1
    assert (deform.jacobian_determinant(place) < 0).all()


def test_a_flip_mirrors_left_and_right() -> None:
    mirrored = grid().flip(1)
    mirrored[1:] = grid()[1:]
    assert torch.allclose(places(drawn(flip=1)), mirrored, atol=1e-4)
    volume = torch.rand(SIZE)
    assert torch.allclose(deform.linear(volume, places(drawn(flip=1))), volume.flip(0), atol=1e-3)


@pytest.mark.parametrize(("chance", "low", "high"), [(0, 0, 0), (0.5, 110, 190), (1, 300, 300)])
def test_flips_are_as_frequent_as_asked(chance: float, low: int, high: int) -> None:
    flips = [torch.linalg.det(drawn(seed, flip=chance, rotate_deg=20).matrix) < 0 for seed in range(300)]
    assert low <= sum(flips) <= high


def test_the_same_seed_gives_the_same_deformation() -> None:
    full = DeformConfig().model_dump()
    one, two, other = (places(drawn(seed, **full)) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.allclose(one, other, atol=0.5)


def test_global_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = places(drawn(5, **DeformConfig().model_dump()))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(one, places(drawn(5, **DeformConfig().model_dump())))


def test_no_warp_spacing_is_no_warp() -> None:
    assert torch.allclose(places(drawn(warp_mm=(5, 5), warp_spacing_mm=())), grid(), atol=1e-4)


def test_outside_is_zero() -> None:
    far = deform.Deformation(torch.eye(3), torch.tensor([1000.0, 0, 0]), drawn().control_mm)
    place = places(far)
    assert not deform.linear(torch.ones(SIZE), place).any()
    index, inside = deform.nearest(place, size=SIZE)
    assert not inside.any()
    assert 0 <= index.min() and index.max() < 20 * 24 * 16, "a lookup is safe all the same"


@pytest.mark.parametrize(("points", "size"), [(2, 8), (3, 8), (5, 33), (12, 20), (20, 16)])
def test_splines_reproduce_linear_functions(points: int, size: int) -> None:
    basis = splines.basis(points, size)
    assert torch.allclose(basis.sum(1), torch.ones(size), atol=1e-6), "partition of unity"
    assert (basis >= 0).all()
    place = basis @ splines.positions(points, size)
    assert torch.allclose(place, torch.arange(size, dtype=torch.float32), atol=1e-3)


def test_splines_in_three_dimensions_are_products() -> None:
    control = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    values = splines.evaluate(control, (7, 8, 9))
    assert values.shape == (2, 7, 8, 9)
    bases = [splines.basis(n - 2, size) for n, size in zip((4, 5, 6), (7, 8, 9), strict=True)]
    assert torch.allclose(values, torch.einsum("nabc,xa,yb,zc->nxyz", control, *bases), atol=1e-5)
    assert control.min() <= values.min() and values.max() <= control.max()

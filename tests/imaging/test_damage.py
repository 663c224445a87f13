from dataclasses import replace

import numpy as np
import pytest
import torch

from onelabel.imaging.damage import KINDS, Damage, Subject, apply_damage, sample_damage, subject
from onelabel.imaging.metrics import dice

SPACING_MM = (4.0, 3.0, 4.0)
SIZE = (40, 56, 40)


@pytest.fixture(scope="module")
def head() -> Subject:
    """An ellipsoid of 45 x 55 x 45 mm in a larger one of tissue; air around."""
    place = (np.indices(SIZE).T - (np.array(SIZE) - 1) / 2).T * np.array(SPACING_MM)[:, None, None, None]
    radius = np.sqrt(((place.T / [45, 55, 45]) ** 2).sum(-1)).T
    return subject(radius < 1, np.where(radius < 1.3, 0.6, 0.0).astype(np.float32), SPACING_MM)


def damage(kind: str, strength: float, seed: int = 3) -> Damage:
    return replace(sample_damage(torch.Generator().manual_seed(seed)), kind=kind, strength=strength)


@pytest.mark.parametrize("kind", KINDS)
def test_no_strength_is_no_damage(head: Subject, kind: str) -> None:
    assert np.array_equal(apply_damage(head, damage(kind, 0)), head.mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_more_strength_is_more_damage(head: Subject, kind: str, seed: int) -> None:
    found = [dice(apply_damage(head, damage(kind, strength, seed)), head.mask) for strength in (0.1, 0.4, 0.7, 1)]
    assert all(after <= before for before, after in zip(found, found[1:], strict=False))
    assert found[0] > 0.9
    assert 0.3 < found[-1] < 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_damage_repeats_and_leaves_the_mask_alone(head: Subject, kind: str) -> None:
    before = head.mask.copy()
    one, two = (apply_damage(head, damage(kind, 0.5)) for _ in range(2))
    assert one.dtype == bool and one.shape == SIZE
    assert np.array_equal(one, two)
    assert np.array_equal(head.mask, before)


def test_erosion_and_dilation_move_the_edge_by_millimetres(head: Subject) -> None:
    for kind, sign in (("erode", -1), ("dilate", 1)):
        changed = apply_damage(head, damage(kind, 0.75))
        lengths = [np.ptp(np.flatnonzero(mask.any((0, 2)))) * SPACING_MM[1] for mask in (changed, head.mask)]
        assert lengths[0] - lengths[1] == pytest.approx(sign * 2 * 9, abs=2 * SPACING_MM[1])


def test_leaks_add_tissue_and_holes_take_away(head: Subject) -> None:
    leaked, holed = (apply_damage(head, damage(kind, 0.8)) for kind in ("leak", "holes"))
    assert (
        (leaked >= head.mask).all() and (head.image[leaked & ~head.mask] > 0).all() and leaked.sum() > head.mask.sum()
    )
    assert (holed <= head.mask).all() and holed.sum() < head.mask.sum()


def test_a_cut_takes_its_share_on_one_side(head: Subject) -> None:
    one = replace(damage("cut", 0.5), direction=(0.0, 0.0, -1.0))
    kept = apply_damage(head, one)
    assert kept.sum() / head.mask.sum() == pytest.approx(0.75, abs=0.05)
    lost = np.flatnonzero((head.mask & ~kept).any((0, 1)))
    assert lost.max() < np.flatnonzero(kept.any((0, 1))).min() + 1


def test_a_shift_keeps_the_volume(head: Subject) -> None:
    shifted = apply_damage(head, replace(damage("shift", 1), direction=(1.0, 0.0, 0.0)))
    assert shifted.sum() == head.mask.sum()
    assert np.argwhere(shifted).mean(0)[0] - np.argwhere(head.mask).mean(0)[0] == pytest.approx(6, abs=0.01)


def test_samples_cover_all_kinds_and_grades(head: Subject) -> None:
    source = torch.Generator().manual_seed(0)
    drawn = [sample_damage(source) for _ in range(120)]
    assert {one.kind for one in drawn} == set(KINDS)
    assert all(np.linalg.norm(one.direction) == pytest.approx(1, abs=1e-5) for one in drawn)
    found = np.array([dice(apply_damage(head, one), head.mask) for one in drawn])
    assert np.histogram(found, bins=[0.4, 0.7, 0.8, 0.9, 0.95, 1.001])[0].min() >= 5


def test_an_empty_mask_stays_empty() -> None:
    nothing = subject(np.zeros((5, 5, 5), bool), np.zeros((5, 5, 5), np.float32), (1.0, 1.0, 1.0))
    assert not any(apply_damage(nothing, damage(kind, 1)).any() for kind in KINDS)

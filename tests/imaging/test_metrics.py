import numpy as np
import pytest

from onelabel.errors import DataError
from onelabel.imaging.labels import IGNORE
from onelabel.imaging.metrics import (
    asd,
    dice,
    evaluate,
    evaluate_classes,
    hd95,
    jaccard,
    mean_dice,
    usual_volume,
    volume_mm3,
)

SPACING = (1.0, 2.0, 3.0)


def cube(start: tuple[int, int, int], side: int = 6, size: int = 20) -> np.ndarray:
    mask = np.zeros((size,) * 3, bool)
    mask[tuple(slice(first, first + side) for first in start)] = True
    return mask


def blob(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((7, 8, 9)) > 0.6


def test_overlap_of_shifted_cubes() -> None:
    a, b = cube((3, 3, 3)), cube((5, 3, 3))  # 4 of 6 layers in common
    assert dice(a, b) == pytest.approx(4 / 6)
    assert jaccard(a, b) == pytest.approx(4 / 8)


@pytest.mark.parametrize(("axis", "shift", "distance_mm"), [(0, 2, 2), (1, 2, 4), (2, 3, 9)])
def test_distance_between_plates_is_their_shift(axis: int, shift: int, distance_mm: float) -> None:
    # Plates of one voxel: all voxels are surface, all at the same distance.
    a = np.zeros((12, 12, 12), bool)
    np.moveaxis(a, axis, 0)[4] = True
    b = np.roll(a, shift, axis)
    assert hd95(a, b, SPACING) == pytest.approx(distance_mm)
    assert asd(a, b, SPACING) == pytest.approx(distance_mm)


def test_distances_of_nested_cubes() -> None:
    inner, outer = cube((7, 7, 7), side=3), cube((6, 6, 6), side=5)
    # In: 26 surface voxels, all at 1. Out: of 98 voxels, the 9 inside each of 6 faces are at 1, the 3 inside each of 12
    # edges at sqrt 2, the 8 corners at sqrt 3; 8 corners are 8.2 %, so the 95th percentile is theirs.
    expected = (26 + 54 + 36 * np.sqrt(2) + 8 * np.sqrt(3)) / (26 + 98)
    assert asd(inner, outer, (1, 1, 1)) == pytest.approx(expected)
    assert hd95(inner, outer, (1, 1, 1)) == pytest.approx(np.sqrt(3))


def test_hd95_ignores_a_speck() -> None:
    truth = cube((3, 3, 3))
    pred = truth.copy()
    pred[19, 19, 19] = True
    assert hd95(pred, truth, (1, 1, 1)) == 0
    assert asd(pred, truth, (1, 1, 1)) > 0


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_symmetric_and_scale_with_the_voxel(seed: int) -> None:
    a, b = blob(seed), blob(seed + 10)
    for metric in (hd95, asd):
        assert metric(a, b, SPACING) == pytest.approx(metric(b, a, SPACING))
        assert metric(a, b, np.multiply(SPACING, 2)) == pytest.approx(2 * metric(a, b, SPACING))
    assert dice(a, b) == dice(b, a)
    assert dice(a, b) == pytest.approx(2 * jaccard(a, b) / (1 + jaccard(a, b)))


@pytest.mark.parametrize("seed", range(4))
def test_cropping_changes_no_distance(seed: int) -> None:
    a, b = blob(seed), blob(seed + 10)
    padded = [np.pad(mask, ((1, 9), (4, 0), (2, 3))) for mask in (a, b)]
    assert hd95(*padded, SPACING) == pytest.approx(hd95(a, b, SPACING))
    assert asd(*padded, SPACING) == pytest.approx(asd(a, b, SPACING))


def test_evaluate_a_perfect_mask() -> None:
    mask = cube((2, 3, 4))
    assert evaluate(mask.astype(np.uint8), mask.astype(np.float32), SPACING) == {
        "dice": 1.0,
        "jaccard": 1.0,
        "hd95_mm": 0.0,
        "asd_mm": 0.0,
        "volume_mm3": 6**3 * 6.0,
        "truth_volume_mm3": 6**3 * 6.0,
        "miss": False,
    }


def test_evaluate_agrees_with_the_single_metrics() -> None:
    a, b = blob(0), blob(1)
    result = evaluate(a, b, SPACING)
    assert result["dice"] == dice(a, b)
    assert result["jaccard"] == jaccard(a, b)
    assert result["hd95_mm"] == hd95(a, b, SPACING)
    assert result["asd_mm"] == asd(a, b, SPACING)
    assert result["volume_mm3"] == volume_mm3(a, SPACING) == a.sum() * 6
    assert {type(value) for value in result.values()} == {float, bool}


@pytest.mark.parametrize("empty", ["pred", "truth"])
def test_one_empty_mask_is_the_worst(empty: str) -> None:
    masks = {"pred": cube((2, 2, 2)), "truth": cube((2, 2, 2))} | {empty: np.zeros((20, 20, 20), bool)}
    result = evaluate(masks["pred"], masks["truth"], SPACING)
    assert result["dice"] == result["jaccard"] == 0
    assert result["hd95_mm"] == result["asd_mm"] == pytest.approx(np.sqrt(20**2 + 40**2 + 60**2))
    assert result["miss"] == (empty == "pred")


def test_two_empty_masks_agree() -> None:
    empty = np.zeros((5, 5, 5))
    result = evaluate(empty, empty, SPACING)
    assert (result["dice"], result["jaccard"], result["hd95_mm"], result["asd_mm"]) == (1, 1, 0, 0)
    assert result["miss"] is False


def test_masks_on_two_grids_are_refused() -> None:
    with pytest.raises(DataError, match="same grid"):
        dice(np.zeros((4, 4, 4)), np.zeros((4, 4, 5)))
    with pytest.raises(DataError, match="one length an axis"):
        hd95(np.zeros((4, 4, 4)), np.zeros((4, 4, 4)), (1, 1))


def test_a_usual_volume_is_near_the_median() -> None:
    assert usual_volume([1, 2, 3, 4])[1] == np.inf
    assert usual_volume([1000.0] * 9 + [10.0]) == (1000, 300)
    middle, far = usual_volume([1000.0 + 100 * step for step in range(-4, 5)])
    assert (middle, far) == (1000, pytest.approx(3.5 * 1.4826 * 200))


def test_several_structures_count_alike() -> None:
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 3, (8, 9, 10)), rng.integers(0, 3, (8, 9, 10))
    pred[truth == 2] = 2
    truth[0] = IGNORE
    found = evaluate_classes(pred, truth, (1, 2, 3), ("background", "a b", "c", "absent"))
    known = truth != IGNORE
    each = [dice((pred == index) & known, truth == index) for index in (1, 2)]
    assert found["dice_a_b"] == each[0] and found["dice_c"] == each[1] and "dice_absent" not in found
    assert found["dice"] == pytest.approx(np.mean(each)) and not found["miss"]
    assert found["dice"] == pytest.approx(mean_dice(np.where(known, pred, 0), truth))
    assert evaluate_classes(np.where(pred == 1, 0, pred), truth, (1, 2, 3), ("background", "a", "c"))["miss"]


def test_one_structure_is_measured_as_ever() -> None:
    rng = np.random.default_rng(1)
    truth, pred = rng.integers(0, 2, (8, 9, 10)), rng.integers(0, 2, (8, 9, 10))
    plain = evaluate(pred, truth, (1, 2, 3))
    found = evaluate_classes(pred, truth, (1, 2, 3), ("background", "foreground"))
    assert found == {name: plain[name] for name in ("dice", "hd95_mm", "asd_mm", "miss")}
    assert mean_dice(pred, truth) == plain["dice"]

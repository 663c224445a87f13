from itertools import product

import numpy as np
import pytest

from onelabel.imaging.edges import distance, move

SPACING = (1.0, 2.0, 0.5)


def blob() -> np.ndarray:
    mask = np.zeros((9, 8, 10), bool)
    mask[3:6, 2:5, 4:8] = True
    mask[5, 5, 5] = True
    return mask


def test_it_is_the_distance_to_the_nearest_voxel_on_the_other_side() -> None:
    mask, found = blob(), distance(blob(), SPACING)
    places = np.array(list(product(*map(range, mask.shape)))) * SPACING
    for place, value, inside in zip(places, found.ravel(), mask.ravel(), strict=True):
        others = places[mask.ravel() != inside]
        nearest = np.linalg.norm(others - place, axis=1).min()
        assert value == pytest.approx(-nearest if inside else nearest, rel=1e-5)


@pytest.mark.parametrize("full", [True, False])
def test_without_an_edge_it_is_as_far_as_one_can_see(full: bool) -> None:
    found = distance(np.full((4, 5, 6), full), SPACING)
    assert np.isfinite(found).all()
    assert (np.abs(found) > 10).all()
    assert (found < 0).all() == full


@pytest.mark.parametrize("mm", [-2.0, -0.5, 0.0, 0.4, 1.0, 3.0])
def test_an_edge_moves_by_as_much_as_it_is_told(mm: float) -> None:
    mask = blob()
    moved = move(mask.astype(np.uint8), mm, SPACING)
    assert moved.dtype == np.uint8
    apart = distance(mask, SPACING)
    expected = apart <= mm if mm > 0 else apart < mm if mm < 0 else mask
    np.testing.assert_array_equal(moved > 0, expected)
    if mm > 0:
        assert (moved[mask] > 0).all()
    else:
        assert not (moved[~mask] > 0).any()


def test_labels_that_stay_keep_their_value() -> None:
    labels = blob().astype(np.uint8) * 2
    moved = move(labels, 1.0, SPACING)
    assert set(np.unique(moved)) == {0, 2}
    np.testing.assert_array_equal(moved > 0, move(blob().astype(np.uint8), 1.0, SPACING) > 0)


def test_what_joins_gets_the_label_next_to_it() -> None:
    labels = np.zeros((9, 9, 9), np.uint16)
    labels[2:5, 2:7, 2:7], labels[5:7, 2:7, 2:7] = 300, 4
    wide = move(labels, 1.0, (1, 1, 1))
    assert wide[1, 4, 4] == 300 and wide[7, 4, 4] == 4 and wide[3, 1, 4] == 300 and wide[6, 1, 4] == 4
    assert np.array_equal(wide > 0, move((labels > 0).astype(np.uint8), 1.0, (1, 1, 1)) > 0)
    assert np.array_equal(wide[labels > 0], labels[labels > 0])

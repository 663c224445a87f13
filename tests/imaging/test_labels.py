from dataclasses import fields
from typing import Any, get_args

import numpy as np
import pytest

from onelabel.configs.augmentation import BinsConfig
from onelabel.errors import DataError
from onelabel.imaging.labels import (
    AIR,
    HALF,
    IGNORE,
    LEVELS,
    BinnedScan,
    bin_scan,
    label_map,
    label_table,
    read_probability,
)

METHODS = get_args(BinsConfig.model_fields["method"].annotation)
SPACING_MM = (3.0, 2.5, 4.0)
NO_BIN = 255

Head = tuple[np.ndarray, np.ndarray]


def binned(head: Head, method: str = "kmeans", *, classes: int = 2, seed: int = 0, **config: Any) -> BinnedScan:
    bins = BinsConfig(method=method, **config)  # type: ignore[arg-type]
    return bin_scan(*head, spacing_mm=SPACING_MM, config=bins, classes=classes, seed=seed)


@pytest.fixture(scope="module")
def scans(head: Head) -> dict[str, BinnedScan]:
    """The head binned by each method, 2 to 5 bins in the brain and 3 to 6 outside."""
    return {method: binned(head, method, foreground=(2, 5), background=(3, 6)) for method in METHODS}


def runs(bins: np.ndarray) -> int:
    """Number of intervals of equal values."""
    return 1 + int(np.count_nonzero(np.diff(bins)))


@pytest.mark.parametrize("method", METHODS)
def test_the_brain_shares_no_label_with_the_rest(head: Head, scans: dict[str, BinnedScan], method: str) -> None:
    scan = scans[method]
    for foreground in range(2, 6):
        for background in range(3, 7):
            labels = label_map(scan, (background, foreground))
            inside, outside = set(np.unique(labels[head[1] == 1])), set(np.unique(labels[head[1] == 0]))
            assert not inside & outside
            assert max(inside | outside) <= background + foreground
            assert AIR in outside
            assert AIR not in inside


@pytest.mark.parametrize("method", METHODS)
def test_air_is_dark_and_all_of_the_darkest(head: Head, scans: dict[str, BinnedScan], method: str) -> None:
    scan = scans[method]
    labels = label_map(scan, (3, 2))
    air = labels == AIR
    assert (head[1][air] == 0).all()
    assert scan.levels[air].max() < scan.levels[(head[1] == 0) & ~air].min()
    assert head[0][air].max() < 0.15 < head[0][(head[1] == 0) & ~air].min()


def test_air_is_the_darkest_of_four_clusters() -> None:
    levels = np.arange(20 * 20 * 20).reshape(20, 20, 20) % 200
    mask = np.zeros((20, 20, 20), np.int32)
    mask[:5] = 1
    labels = label_map(binned(((levels / 255).astype(np.float32), mask)), (3, 2))
    assert set(np.unique(levels[(labels == AIR) & (mask == 0)])) == set(range(50))
    assert not (labels[mask == 1] == AIR).any()


@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_bins_is_there(head: Head, scans: dict[str, BinnedScan], method: str) -> None:
    scan = scans[method]
    for index, counts in ((0, range(3, 7)), (1, range(2, 6))):
        levels = np.unique(scan.levels[(head[1] == index)])
        for count in counts:
            used = set(scan.tables[index, count][levels].tolist()) - {NO_BIN}
            assert used <= set(range(count))
            # A mixture may give a component no level for its own.
            assert len(used) == count or (method == "gmm" and len(used) > 1)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "gmm"])
def test_bins_are_intervals_that_rise_with_intensity(scans: dict[str, BinnedScan], method: str) -> None:
    scan = scans[method]
    for index, counts in ((0, range(3, 7)), (1, range(2, 6))):
        for count in counts:
            table = scan.tables[index, count].astype(int)
            table = table[table != NO_BIN]
            assert (np.diff(table) >= 0).all()
            assert runs(table) == count == np.unique(table).size


def test_a_mixtures_bins_are_few_intervals(scans: dict[str, BinnedScan]) -> None:
    for count in range(2, 6):
        # A wide component may reach out on both sides of narrow ones.
        assert runs(scans["gmm"].tables[1, count]) <= 2 * count - 1


def test_the_methods_do_what_they_say() -> None:
    image = np.zeros((8, 8, 8), np.float32)
    mask = np.zeros((8, 8, 8), np.int32)
    mask[:4] = 1
    values = np.concatenate([np.full(192, 100), np.full(32, 110), np.full(32, 200)])
    image[:4] = values.reshape(4, 8, 8) / 255
    image[4:6] = 0.5
    edges = {}
    for method in ("kmeans", "quantile", "uniform"):
        table = binned((image, mask), method, foreground=2).tables[1, 2]
        edges[method] = int(np.flatnonzero(table)[0])
    assert 111 <= edges["kmeans"] <= 200, "kmeans parts the levels where they are far from each other"
    assert edges["quantile"] == 100, "as many voxels on each side"
    assert edges["uniform"] == 150, "half of the range"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_fewer_levels_than_bins(method: str, distinct: int) -> None:
    mask = np.zeros((12, 12, 12), np.int32)
    mask[3:9, 3:9, 3:9] = 1
    image = np.linspace(0, 1, 12, dtype=np.float32).round(1) * np.ones((12, 12, 1), np.float32)
    steps = np.arange(216).reshape(6, 6, 6) % distinct
    image[3:9, 3:9, 3:9] = 0.4 + 0.2 * steps
    scan = binned((image, mask), method, foreground=(2, 6), background=4)
    for count in range(2, 7):
        labels = label_map(scan, (4, count))
        inside = [set(np.unique(labels[3:9, 3:9, 3:9][steps == step]).tolist()) for step in range(distinct)]
        assert all(len(found) == 1 for found in inside)
        assert all(5 <= label < 5 + count for found in inside for label in found)
        if method in ("kmeans", "uniform"):
            assert len(set.union(*inside)) == min(distinct, count)


def test_a_rare_level_is_no_trouble() -> None:
    image = np.zeros((24, 24, 24), np.float32)
    image[4:20, 4:20, 4:20] = 0.5
    image[12, 12, 12] = 1
    mask = (image > 0).astype(np.int32)
    for method in METHODS:
        labels = label_map(binned((image, mask), method, foreground=6, background=4), (4, 6))
        assert not set(np.unique(labels[mask == 1])) & set(np.unique(labels[mask == 0]))


def test_a_stripped_head_is_all_brain_and_air(head: Head) -> None:
    image, mask = head
    labels = label_map(binned((image * mask, mask)), (3, 2))
    assert set(np.unique(labels[mask == 0])) == {AIR}


@pytest.mark.parametrize("value", [0, 1, IGNORE])
def test_a_target_needs_structure_and_background(head: Head, value: int) -> None:
    with pytest.raises(DataError, match="both structure and background"):
        binned((head[0], np.full_like(head[1], value)))


def test_unknown_voxels_are_no_background(head: Head) -> None:
    image, mask = head
    target = np.where(mask == 0, IGNORE, mask)
    target[0] = 0
    scan = binned((image, target))
    assert np.array_equal(scan.target, target)
    with pytest.raises(DataError):
        binned((image, np.where(mask == 0, IGNORE, mask)))


def test_more_classes_have_labels_of_their_own(head: Head) -> None:
    image, mask = head
    target = mask.copy()
    target[:10] *= 2
    labels = label_map(binned((image, target), classes=3), (4, 3, 5))
    found = [set(np.unique(labels[target == index]).tolist()) for index in range(3)]
    assert found[0] <= set(range(0, 5))
    assert found[1] <= set(range(5, 8))
    assert found[2] <= set(range(8, 13))
    assert all(len(labels) > 1 for labels in found)


def test_distance_is_in_mm_and_negative_inside() -> None:
    image = np.zeros((9, 9, 9), np.float32)
    mask = np.zeros((9, 9, 9), np.int32)
    mask[4, 4, 4] = image[4, 4, 4] = 1
    distance = bin_scan(image, mask, spacing_mm=(2, 3, 50), config=BinsConfig()).distance_mm
    assert distance.dtype == np.int8
    assert (distance[6, 4, 4], distance[4, 1, 4], distance[4, 4, 5]) == (4, 9, 50)
    assert distance[4, 4, 4] == -2
    assert distance[4, 4, 0] == 127, "clipped, not wrapped"


@pytest.mark.parametrize("method", METHODS)
def test_binning_repeats_and_leaves_its_input_alone(head: Head, method: str) -> None:
    image, mask = head[0].copy(), head[1].copy()
    one, two = (binned((image, mask), method, seed=3, foreground=3, background=4) for _ in range(2))
    assert np.array_equal(image, head[0]) and np.array_equal(mask, head[1])
    for field in fields(BinnedScan):
        assert np.array_equal(getattr(one, field.name), getattr(two, field.name))


def test_the_table_covers_every_class_and_level(scan: BinnedScan) -> None:
    table = label_table(scan, (5, 4))
    assert table.shape == (2 * LEVELS,)
    code = scan.target.astype(int) * LEVELS + scan.levels
    assert np.array_equal(table[code], label_map(scan, (5, 4)))


EVERY = np.arange(LEVELS, dtype=np.uint8)[None]  # probabilities (1, 256) of one structure


def shares() -> np.ndarray:
    """Probabilities (3, 5000) uint8 of three structures, the background's what is missing to 255."""
    drawn = np.random.default_rng(0).dirichlet((0.5, 0.5, 0.5, 0.5), 5000).T
    return np.floor(255 * drawn[1:]).astype(np.uint8)


def test_one_half_parts_the_levels_of_a_probability() -> None:
    classes = read_probability(EVERY)
    assert (classes.shape, classes.dtype) == ((LEVELS,), np.int8)
    assert np.array_equal(classes, np.arange(LEVELS) > HALF)


@pytest.mark.parametrize("probability", [EVERY, shares()], ids=["one", "several"])
def test_the_share_of_a_class_over_thresholds_is_its_probability(probability: np.ndarray) -> None:
    thresholds = (np.arange(2550) + 0.5) / 2550
    drawn = [read_probability(probability, threshold=threshold) for threshold in thresholds]
    for index, share in enumerate(probability / 255, start=1):
        assert np.abs(np.mean([classes == index for classes in drawn], axis=0) - share).max() < 1e-3
    assert np.array_equal(read_probability(probability, threshold=0.0) > 0, probability.any(0))
    assert not read_probability(probability, threshold=1.0).any()


def test_of_several_classes_the_likeliest_is_taken() -> None:
    probability = shares()
    classes = read_probability(probability)
    assert classes.dtype == np.int8
    assert np.array_equal(classes, np.vstack([255 - probability.sum(0, dtype=int), probability]).argmax(0))


@pytest.mark.parametrize("probability", [EVERY, shares()], ids=["one", "several"])
@pytest.mark.parametrize("ignore", [(0.2, 0.8), (0.6, 0.9), (0.0, 1.0), (0.5, 0.5)])
def test_what_is_ignored_is_unknown_but_keeps_its_class(ignore: tuple[float, float], probability: np.ndarray) -> None:
    classes, plain = read_probability(probability, ignore=ignore), read_probability(probability)
    between = (probability.sum(0, dtype=int) / 255 > ignore[0]) & (probability.max(0) / 255 < ignore[1])
    assert classes.dtype == np.int8
    assert np.array_equal(np.maximum(classes, ~classes), plain)
    assert np.array_equal(classes < 0, between)
    assert np.array_equal(classes[~between], plain[~between])


def test_bins_stay_within_their_class() -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 4, (16, 16, 16))
    image = rng.random(target.shape, np.float32)
    scan = bin_scan(image, target, spacing_mm=(1, 1, 1), config=BinsConfig(), classes=4)
    labels = label_map(scan, (5, 2, 3, 4))
    kept = [set(np.unique(labels[target == index]).tolist()) for index in range(4)]
    assert kept == [set(range(6)), {6, 7}, {8, 9, 10}, {11, 12, 13, 14}]


def test_what_is_unknown_may_be_structure() -> None:
    target = np.zeros((9, 9, 9), np.int32)
    target[3:6, 3:6, 3:6], target[6:] = 1, IGNORE
    image = np.random.default_rng(0).random(target.shape, np.float32)
    scan = bin_scan(image, target, spacing_mm=(2, 2, 2), config=BinsConfig())
    assert np.array_equal(scan.distance_mm < 0, target != 0)
    assert np.array_equal(scan.target, target)

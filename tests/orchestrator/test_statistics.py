import numpy as np
import pytest
from scipy import stats

from onelabel.orchestrator.statistics import compare, correlation, holm, interval


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = [low <= 3 <= high for low, high in (interval(rng.normal(3, 2, 40)) for _ in range(100))]
    assert 85 <= sum(covered) <= 100


def test_the_same_values_give_the_same_interval() -> None:
    values = [0.9, 0.95, 0.97, 0.8]
    low, high = interval(values)
    assert (low, high) == interval(values)
    assert min(values) <= low < np.mean(values) < high <= max(values)
    narrow = interval(values, share=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_one_value_has_no_interval() -> None:
    assert np.isnan(interval([0.5])).all()
    assert interval([0.5, 0.5]) == (0.5, 0.5)


def test_a_system_that_is_always_better() -> None:
    theirs = np.linspace(0.8, 0.95, 12)
    found = compare(theirs + np.linspace(0.001, 0.012, 12), theirs)
    assert found.scans == 12
    assert found.effect == 1
    assert found.p == pytest.approx(2 / 2**12)  # of all signs the one where all agree, and its mirror image
    assert found.difference == pytest.approx(0.0065)
    assert compare(theirs, theirs + 0.01).effect == -1


def test_equal_systems_do_not_differ() -> None:
    found = compare([0.9, 0.8], [0.9, 0.8])
    assert (found.difference, found.p, found.effect) == (0, 1, 0)


def test_effect_by_hand() -> None:
    # Ranks 1 and 2 for the first, 3 against it.
    assert compare([1.1, 1.2, 1.0], [1.0, 1.0, 1.3]).effect == pytest.approx(0)
    assert compare([1.1, 1.3, 1.0], [1.0, 1.0, 1.2]).effect == pytest.approx((1 + 3 - 2) / 6)


def test_noise_seldom_seems_to_be_a_difference() -> None:
    rng = np.random.default_rng(1)
    p = [compare(rng.normal(size=15), rng.normal(size=15)).p for _ in range(200)]
    assert np.mean(np.array(p) < 0.05) < 0.1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@pytest.mark.parametrize("ranks", [False, True])
def test_correlations_are_scipys(ranks: bool) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=60)
    y = np.exp(x + rng.normal(size=60))
    found = correlation(x, y, ranks=ranks)
    theirs = stats.spearmanr(x, y) if ranks else stats.pearsonr(x, y)
    assert found.value == pytest.approx(theirs.statistic)
    if ranks:
        # Bonett and Wright's variance is larger than that of normal variables.
        plain = correlation(stats.rankdata(x), stats.rankdata(y))
        assert found.low < plain.low < found.value < plain.high < found.high
    else:
        assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_correlations_of_few_or_of_a_line() -> None:
    assert np.isnan(correlation([1, 2, 3], [1, 3, 2]).low)
    assert correlation([1, 2, 3], [1, 3, 2]).value == pytest.approx(0.5)
    line = correlation([1, 2, 3, 4, 5], [2, 4, 6, 8, 11], ranks=True)
    assert (line.value, line.low, line.high) == pytest.approx((1, 1, 1))

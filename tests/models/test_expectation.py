from pathlib import Path

import numpy as np
import pytest

from onelabel.models.rankers.expectation import Expectation, fit, fit_map


def pairs_of(count: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and Dice that rise with their square, more or less."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.4, 1, count)
    return scores, np.clip(scores**2 + rng.normal(0, noise, count), 0, 1)


def test_the_map_is_found_and_monotone() -> None:
    found = fit_map(*pairs_of(400, 0.02))
    scores = np.linspace(0.45, 0.95, 30)
    expected, low, high = found(scores)
    assert np.abs(expected - scores**2).max() < 0.03
    assert (np.diff(found(np.linspace(0, 1, 200))) >= 0).all()
    assert (low <= expected).all() and (expected <= high).all()


def test_the_interval_holds_nine_of_ten() -> None:
    found = fit_map(*pairs_of(400, 0.05))
    scores, truth = pairs_of(2000, 0.05, seed=1)
    _, low, high = found(scores)
    assert 0.85 < ((low <= truth) & (truth <= high)).mean() < 0.95


def test_scores_above_what_was_seen_keep_the_last_value() -> None:
    found = fit_map(*pairs_of(100, 0.01))
    assert found(np.array([5.0]))[0] == found.expected[-1]
    assert np.isnan(found(np.array([np.nan]))).all()


def test_scores_below_what_was_seen_fall_to_nothing() -> None:
    scores, truth = pairs_of(100, 0.01)
    found, lowest = fit_map(scores, truth), scores.min()
    expected, low, high = found(np.array([-1, 0, lowest / 2, lowest]))
    assert expected[:2].tolist() == low[:2].tolist() == [0, 0]
    assert expected[2] == pytest.approx(expected[3] / 2)
    assert (high == high[3]).all()
    below = fit_map(scores - 2, truth)
    assert below(np.array([-9.0]))[0] == below.expected[0]


def test_scores_that_say_nothing_give_the_mean() -> None:
    truth = np.random.default_rng(0).uniform(0.5, 1, 200)
    expected, low, high = fit_map(np.full(200, 0.7), truth)(np.array([0.7]))
    assert expected[0] == pytest.approx(truth.mean(), abs=0.01)
    assert low[0] < 0.56 and high[0] > 0.94


def test_a_ranker_that_gives_all_the_same_score_still_tells_what_has_none() -> None:
    found = fit_map(np.zeros(30), np.linspace(0.5, 1, 30))
    assert found(np.array([0.0, 3.0]))[0] == pytest.approx(0.75)
    assert np.isnan(found(np.array([np.nan]))).all()


def test_of_several_rankers_the_mean_is_mapped_again() -> None:
    rng = np.random.default_rng(0)
    dice = rng.uniform(0.3, 1, 600)
    good, poor = dice + rng.normal(0, 0.02, 600), dice + rng.normal(0, 0.3, 600)
    scores = np.stack([good * 7, poor - 5])
    errors = {
        name: np.abs(fit(part, dice, weights)(part)[0] - dice).mean()
        for name, part, weights in (
            ("good", scores[:1], None),
            ("poor", scores[1:], None),
            ("both", scores, None),
            ("mostly good", scores, (20, 1)),
        )
    }
    assert errors["good"] < errors["both"] < errors["poor"]
    assert errors["mostly good"] < errors["both"]


def test_a_scan_that_one_ranker_cannot_score_has_no_expectation() -> None:
    rng = np.random.default_rng(0)
    dice = rng.uniform(0.3, 1, 50)
    found = fit(np.stack([dice, dice]), dice)
    assert np.isnan(found(np.array([[0.5], [np.nan]]))).all()


@pytest.mark.parametrize("rankers", [1, 2])
def test_it_is_kept_on_disk(tmp_path: Path, rankers: int) -> None:
    scores, dice = pairs_of(50, 0.1)
    found = fit(np.stack([scores] * rankers), dice)
    found.save(tmp_path / "expectation.json")
    assert Expectation.load(tmp_path / "expectation.json") == found
    assert [path.name for path in tmp_path.iterdir()] == ["expectation.json"]

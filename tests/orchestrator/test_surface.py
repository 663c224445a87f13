import re
from pathlib import Path

import numpy as np
import pytest

from onelabel.configs.load import load
from onelabel.configs.schema import RunConfig
from onelabel.orchestrator import plots, surface, trials
from onelabel.orchestrator.rounds import plan
from onelabel.orchestrator.trials import Trial

K, BINS, RATE = "stages.*.select.k", "synthesis.bins.foreground", "stages.1.learner.learning_rate"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    space = [f"search.space.{K}=[2, 3]", f"search.space.{BINS}=[[2, 4], 3]"]
    space += [f"search.space.{RATE}={{type: log_uniform, low: 1.0e-4, high: 1.0e-2}}", "search.sampler=random"]
    return load(["singlestrip", "data={labelled: a, unlabelled: b}", f"storage={tmp_path}", "name=wide", *space])


def tried(config: RunConfig, count: int) -> list[Trial]:
    """Trials that are done, with falling objectives."""
    found = [trials.trial(config, point) for point in trials.points(config)[:count]]
    for place, one in enumerate(found):
        for now in plan(one.config, one.folder):
            now.folder.mkdir(parents=True)
            now.commit({"unlabelled": {"expected_dice_mean": 0.9 - 0.01 * place}})
    return found


def test_the_page_shows_trials_and_how_they_respond(config: RunConfig, tmp_path: Path) -> None:
    done = tried(config, 8)
    failed, stopped = (trials.trial(config, {K: k, BINS: 3, RATE: 1e-3}) for k in (7, 8))
    failed.fail(ValueError("it broke <b>"))
    text = surface.write(config, "expected_dice", [*done, stopped, failed], tmp_path).read_text(encoding="utf-8")
    assert "ValueError: it broke &lt;b&gt;" in text
    assert "8 of 10" in text and "1 stopped early, 1 failed" in text
    assert "0.9000" in text
    assert text.count("<svg") == 1 + 3  # a map of the two keys with lists, and a plot for each key
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)


@pytest.mark.parametrize("count", [1, 2])
def test_few_trials_make_a_page_too(config: RunConfig, tmp_path: Path, count: int) -> None:
    assert surface.write(config, "expected_dice", tried(config, count), tmp_path).stat().st_size > 5000


def test_a_table_has_no_column_of_errors_where_there_are_none(config: RunConfig) -> None:
    table = surface.table(tried(config, 2), "expected_dice")
    assert list(table.columns) == ["select k", "learner learning_rate", "bins foreground", *table.columns[3:]]
    assert "error" not in table.columns
    assert [row[list(table.columns).index("expected Dice")] for row in table.rows] == [0.9, 0.89]


def test_a_map_holds_means_and_names_the_highest() -> None:
    axes = {"l": ["a", "b", "c"], "m": ["x", "y"]}
    picture = plots.surface("map", ["a", "b", "a"], ["x"] * 3, np.array([0.5, 0.6, 0.9]), axes=axes, title="Dice")
    assert picture.alt == "Mean Dice by l and m: highest 0.700 at a and x."
    assert b"0.700" in picture.data and b"0.600" in picture.data


def test_an_effect_is_drawn_over_numbers_and_over_choices() -> None:
    values, names = np.array([0.5, 0.7]), ("rate", "Dice")
    numbers = plots.effect("n", [1e-3, 1e-2], values, order=None, log=True, names=names)
    choices = plots.effect("c", ["b", "a"], values, order=["a", "b"], log=False, names=names)
    assert numbers.alt == "Dice by rate: 2 trials, highest 0.700 at 0.01."
    assert choices.alt == "Dice by rate: 2 trials, highest 0.700 at a."

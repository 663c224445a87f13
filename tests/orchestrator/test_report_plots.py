import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from onelabel.orchestrator import plots
from onelabel.orchestrator.plots import Curve, Expected, Ranked
from onelabel.orchestrator.report import Picture

RNG = np.random.default_rng(0)


def ranked(count: int = 30, truths: int = 30) -> Ranked:
    score = RNG.uniform(0.4, 0.9, count)
    dice = np.where(np.arange(count) < truths, score + RNG.normal(0, 0.02, count), np.nan)
    return Ranked("round-07", score, dice, score >= np.sort(score)[-3])


def curve(name: str, first: int, count: int, low: float = 0.05) -> Curve:
    steps = np.arange(first, first + count, dtype=float)
    return Curve(name, steps, low + np.exp(-np.arange(count) / 20))


ROUNDS = [curve("round-00", 1, 300), curve("round-01", 301, 100), curve("round-02", 401, 2)]
PLOTS = {
    "curves": lambda: plots.curves("loss", {"": ROUNDS}, title="Loss", ylabel="loss"),
    "one value": lambda: plots.curves("one", {"": [curve("ranker", 1, 1)]}, title="One", ylabel="loss"),
    "zeros": lambda: plots.curves("none", {"": [Curve("a", np.arange(9.0), np.zeros(9))]}, title="Zero", ylabel="loss"),
    "shares": lambda: plots.curves("s", {"waits": ROUNDS, "idles": []}, title="Shares", ylabel="%", percent=True),
    "scatter": lambda: plots.against_dice("dice", (one := ranked()), axis="score (random)", like=[one]),
    "reliability": lambda: plots.reliability(
        "sure", Expected("round-07", 0.7, *np.linspace(0.6, 0.9, 24).reshape(4, 6))
    ),
    "histogram": lambda: plots.distribution("scores", ranked(truths=4), axis="score (random)"),
}


def texts(picture: Picture) -> list[str]:
    return [
        "".join(part.itertext()) for part in ElementTree.fromstring(picture.data).iter() if part.tag.endswith("}text")
    ]


@pytest.mark.parametrize("kind", PLOTS)
def test_a_plot_is_text_in_few_colours_and_is_the_same_again(kind: str) -> None:
    picture = PLOTS[kind]()
    assert picture.plot and picture.alt.endswith(".")
    used = set(re.findall(rb"(?:fill|stroke): (#\w+)", picture.data))
    assert used <= {colour.encode() for colour in (plots.INK, plots.BLUE, plots.VERMILLION)}
    if kind not in ("scatter", "histogram"):  # which draw new numbers
        assert PLOTS[kind]().data == picture.data
    assert len(texts(picture)) > 6


def test_rounds_are_numbered_where_there_is_room() -> None:
    found = texts(PLOTS["curves"]())
    assert {"00", "01", "Loss", "loss", "training step"} <= set(found) and "02" not in found
    assert {"0.1", "0.2", "0.5", "1"} <= set(found)  # a logarithmic axis in plain numbers


def test_two_groups_have_a_legend() -> None:
    assert {"waits", "100"} <= set(texts(PLOTS["shares"]()))


def test_the_title_has_both_correlations() -> None:
    one = Ranked("round-07", np.array([1.0, 2, 3, 4]), np.array([0.1, 0.3, 0.2, 0.9]), np.array([False] * 3 + [True]))
    found = "\n".join(texts(plots.against_dice("a", one, axis="score", like=[one])))
    assert (
        "round-07: 4 scans" in found and "Spearman 0.80 (95 % CI \N{MINUS SIGN}0.8" in found and "Pearson 0.83" in found
    )
    assert {"score", "Dice with the true mask", "selected", "not selected"} <= set(found.split("\n"))


def test_scans_without_a_truth_are_no_part_of_the_comparison() -> None:
    one = ranked(count=30, truths=10)
    assert "round-07: 10 scans" in texts(plots.against_dice("a", one, axis="score", like=[one]))
    assert "round-07: 30 scans" in texts(plots.distribution("a", one, axis="score"))
    assert not one.all_known and ranked().all_known


def test_plots_of_one_comparison_have_the_same_axes() -> None:
    first, second = (
        ranked(),
        Ranked("round-08", np.array([0.6, 0.7, 0.65]), np.array([0.6, 0.7, 0.6]), np.zeros(3, bool)),
    )
    ticks = [
        [text for text in texts(plots.against_dice("a", one, axis="score", like=[first, second])) if text[0].isdigit()]
        for one in (first, second)
    ]
    assert ticks[0] == ticks[1]


@pytest.mark.parametrize("count", [50_000])
def test_many_values_make_no_large_file(count: int) -> None:
    one = ranked(count, count)
    pictures = [
        plots.curves("a", {"": [curve("round-00", 1, count)]}, title="Loss", ylabel="loss"),
        plots.against_dice("b", one, axis="score", like=[one]),
        plots.distribution("c", one, axis="score"),
    ]
    assert max(len(picture.data) for picture in pictures) < 200_000


def test_a_thinned_curve_keeps_its_mean() -> None:
    whole = curve("round-00", 1, 7 * plots.MOST_POINTS + 3)
    thin = plots._thinned(whole)
    assert len(thin.values) == plots.MOST_POINTS and plots._thinned(thin) is thin
    assert np.mean(thin.values) == pytest.approx(np.mean(whole.values), rel=0.02)
    assert whole.steps[0] <= thin.steps[0] < thin.steps[-1] <= whole.steps[-1]


def test_the_moving_mean_keeps_what_does_not_change() -> None:
    assert plots._smooth(np.full(90, 0.3)) == pytest.approx(0.3)
    assert np.ptp(plots._smooth(RNG.normal(size=300))) < 3

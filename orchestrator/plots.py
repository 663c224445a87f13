"""Plots of a run's figures, as SVG: text stays text, and a page can exchange the few colours."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from onelabel.orchestrator.report import Picture
from onelabel.orchestrator.statistics import Correlation, correlation

# Two of Okabe and Ito's colours, which the colour-blind tell apart too; as matplotlib writes them.
BLUE, VERMILLION = "#0072b2", "#d55e00"
INK = "#24292f"
SIZE_INCHES = (4.8, 3.4)
MOST_POINTS = 500  # of a curve
MOST_VECTORS = 2000  # of a scatter plot: more become pixels
LOG_RATIO = 5  # largest to smallest value from which an axis is logarithmic
LABEL_SHARE = 0.03  # of the axis: a shorter round has no number
TICKS = 6

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.dpi": 150,
    "font.size": 9.5,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

Values = NDArray[np.float64]
Rows = NDArray[np.bool_]


@dataclass(frozen=True)
class Curve:
    """Values over steps, (n,) each: of one round, or of a ranker's fit."""

    name: str
    steps: Values
    values: Values


@dataclass(frozen=True)
class Ranked:
    """The scores of a round's scans, (n,): with the true Dice, NaN where unknown, and whether each was selected."""

    round: str
    score: Values
    dice: Values
    selected: NDArray[np.bool_]

    @property
    def known(self) -> "Ranked":
        """Only the scans that have both a score and a true Dice."""
        rows = np.isfinite(self.score) & np.isfinite(self.dice)
        return Ranked(self.round, self.score[rows], self.dice[rows], self.selected[rows])

    @property
    def all_known(self) -> bool:
        """Whether every scan with a score has a true Dice."""
        return bool(np.isfinite(self.dice[np.isfinite(self.score)]).all())


@dataclass(frozen=True)
class Expected:
    """The Dice to expect of a round's masks with its interval, and the true one, (n,); NaN where unknown.

    bad : a mask of which less is expected is flagged
    """

    round: str
    bad: float
    expected: Values
    low: Values
    high: Values
    dice: Values

    @property
    def known(self) -> "Expected":
        """Only the masks of which both are known."""
        rows = np.isfinite(self.expected) & np.isfinite(self.dice)
        return Expected(self.round, self.bad, *(part[rows] for part in (self.expected, self.low, self.high, self.dice)))


def curves(
    name: str, groups: Mapping[str, Sequence[Curve]], /, *, title: str, ylabel: str, percent: bool = False
) -> Picture:
    """Draw curves over training steps: thin as they were logged, thick a moving mean.

    Parameters
    ----------
    groups : by name, of which there may be two; each group has a colour, and the first one's rounds are named
    ylabel : with the unit
    percent : values are shares, shown from 0 to 100 %
    """
    shown = {group: [_thinned(curve) for curve in parts] for group, parts in groups.items()}

    def draw(axes: Axes) -> None:
        for (group, parts), colour, line in zip(shown.items(), (BLUE, VERMILLION), ("-", "--"), strict=False):
            for place, part in enumerate(parts):
                values = part.values * (100 if percent else 1)
                axes.plot(part.steps, values, color=colour, alpha=0.35, lw=0.8)
                label = group if len(shown) > 1 and not place else None
                axes.plot(part.steps, _smooth(values), color=colour, lw=1.8, ls=line, label=label)
        _mark_rounds(axes, next(iter(shown.values())))
        axes.set(title=title, xlabel="training step", ylabel=ylabel)
        axes.set_xlim(left=0)
        axes.margins(y=0.12)
        values = np.concatenate([part.values for parts in shown.values() for part in parts])
        if percent:
            axes.set_ylim(-2, 110)
        elif values.min() > 0 and values.max() > LOG_RATIO * values.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=min(0.0, float(values.min())))

    ends = [f"{part.name} {part.values[0]:.3g} to {part.values[-1]:.3g}" for parts in shown.values() for part in parts]
    return _draw(name, draw, alt=f"{title} over training steps: {', '.join(ends)}.")


def against_dice(name: str, ranked: Ranked, /, *, axis: str, like: Sequence[Ranked]) -> Picture:
    """Draw score against true Dice, with the correlations in the title.

    Parameters
    ----------
    axis : what the scores are called
    like : the rounds with which this one is to be compared, itself included: their plots have the same limits
    """
    known = ranked.known
    found = {kind: correlation(known.score, known.dice, ranks=kind == "Spearman") for kind in ("Spearman", "Pearson")}
    lines = [f"{ranked.round}: {len(known.score)} scans", *(f"{kind} {_interval(one)}" for kind, one in found.items())]
    kinds = ((False, "not selected", BLUE, "o"), (True, "selected", VERMILLION, "^"))

    def draw(axes: Axes) -> None:
        for selected, label, colour, marker in kinds:
            rows = known.selected == selected
            axes.scatter(
                known.score[rows],
                known.dice[rows],
                s=28,
                c=colour,
                marker=marker,
                alpha=0.75,
                linewidths=0,
                label=label,
                rasterized=len(known.score) > MOST_VECTORS,
            )
        axes.set(title="\n".join(lines), xlabel=axis, ylabel="Dice with the true mask")
        axes.set_xlim(_limits([one.known.score for one in like]))
        axes.set_ylim(_limits([one.known.dice for one in like]))
        axes.locator_params(axis="x", nbins=TICKS)

    return _draw(name, draw, alt=f"Score against true Dice. {'. '.join(lines)}.")


def reliability(name: str, found: Expected, /) -> Picture:
    """Draw true against expected Dice, with the mean absolute error in the title; on the diagonal they are equal."""
    known = found.known
    error = float(np.abs(known.expected - known.dice).mean())
    inside = float(((known.low <= known.dice) & (known.dice <= known.high)).mean())
    lines = [
        f"{found.round}: {len(known.dice)} scans",
        f"mean absolute error {error:.3f}, {inside:.0%} inside the bars",
    ]

    def draw(axes: Axes) -> None:
        spread = np.clip([known.expected - known.low, known.high - known.expected], 0, None)
        axes.errorbar(
            known.expected, known.dice, xerr=spread, fmt="o", ms=4, color=BLUE, ecolor=BLUE, elinewidth=0.6, alpha=0.6
        )
        limits = _limits([known.expected, known.dice])
        axes.plot(limits, limits, color=INK, alpha=0.5, lw=0.8, ls="--")
        if limits[0] < found.bad < limits[1]:
            axes.axvline(found.bad, color=VERMILLION, lw=0.8, label=f"flagged below {found.bad}")
        axes.set(title="\n".join(lines), xlabel="expected Dice", ylabel="Dice with the true mask")
        axes.set_xlim(limits)
        axes.set_ylim(limits)
        axes.locator_params(nbins=TICKS)

    return _draw(name, draw, alt=f"Expected against true Dice. {'. '.join(lines)}.")


def distribution(name: str, ranked: Ranked, /, *, axis: str) -> Picture:
    """Draw how many scans have which score, the selected ones on top."""
    known = np.isfinite(ranked.score)
    parts = {"not selected": ranked.score[known & ~ranked.selected], "selected": ranked.score[known & ranked.selected]}
    return histogram(name, parts, title=f"{ranked.round}: {known.sum()} scans", axis=axis)


def histogram(name: str, parts: Mapping[str, Values], /, *, title: str, axis: str) -> Picture:
    """Draw how many scans have which value.

    Parameters
    ----------
    parts : finite values of the scans by group, of which there may be two; the second stands on top of the first
    axis : what the values are called, with their unit
    """
    values = np.concatenate([*parts.values()])
    edges = np.histogram_bin_edges(values, bins=int(np.clip(2 * np.sqrt(len(values)), 8, 50)))

    def draw(axes: Axes) -> None:
        axes.hist([*parts.values()], edges.tolist(), stacked=True, color=[BLUE, VERMILLION], label=[*parts])
        axes.set(title=title, xlabel=axis, ylabel="number of scans")
        axes.locator_params(axis="x", nbins=TICKS)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    low, middle, high = np.quantile(values, (0, 0.5, 1))
    counts = ", ".join(f"{len(part)} {label}" for label, part in parts.items())
    figures = f"lowest {low:.4g}, median {middle:.4g}, highest {high:.4g}; {counts}"
    return _draw(name, draw, alt=f"Distribution of the {axis}. {title}: {figures}.")


def surface(
    name: str,
    across: Sequence[str],
    up: Sequence[str],
    values: Values,
    /,
    *,
    axes: Mapping[str, Sequence[str]],
    title: str,
) -> Picture:
    """Draw the mean of values, (n,), over a grid of two settings as a map with a number in each cell.

    Parameters
    ----------
    across, up : for each value what the settings are
    axes : names of the settings, and their values in order: across, then up
    """
    (xlabel, xs), (ylabel, ys) = axes.items()
    cells = np.full((len(ys), len(xs)), np.nan)
    for row, column in np.ndindex(cells.shape):
        here = [at == (xs[column], ys[row]) for at in zip(across, up, strict=True)]
        cells[row, column] = values[here].mean() if any(here) else np.nan
    middle = (np.nanmin(cells) + np.nanmax(cells)) / 2

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        axes.pcolormesh(np.ma.masked_invalid(cells), cmap="viridis", edgecolors="face")
        for row, column in np.argwhere(np.isfinite(cells)):
            place, colour = (column + 0.5, row + 0.5), "black" if cells[row, column] > middle else "white"
            axes.text(*place, f"{cells[row, column]:.3f}", ha="center", va="center", color=colour)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.set_xticks(np.arange(len(xs)) + 0.5, list(xs))
        axes.set_yticks(np.arange(len(ys)) + 0.5, list(ys))

    row, column = divmod(int(np.nanargmax(cells)), len(xs))
    highest = f"highest {cells[row, column]:.3f} at {xs[column]} and {ys[row]}"
    return _draw(name, draw, alt=f"Mean {title} by {xlabel} and {ylabel}: {highest}.")


def effect(
    name: str, at: Sequence[Any], values: Values, /, *, order: Sequence[str] | None, log: bool, names: tuple[str, str]
) -> Picture:
    """Draw values, (n,), over a setting: points, and where it is one of a list a line through their means.

    Parameters
    ----------
    at : for each value what the setting is; numbers, or members of the order
    order : of the axis; None: numbers, on a logarithmic axis if so wanted
    names : of the setting and the values
    """
    xs = np.array([order.index(x) if order else x for x in at], float)
    title = f"{names[1]} by {names[0]}"

    def draw(axes: Axes) -> None:
        axes.scatter(xs, values, s=28, c=BLUE, alpha=0.75, linewidths=0)
        if order:
            known = np.unique(xs)
            axes.plot(known, [values[xs == x].mean() for x in known], color=VERMILLION, lw=1.8)
            axes.set_xticks(range(len(order)), list(order))
        elif log:
            axes.set_xscale("log")
        axes.set(title=title, xlabel=names[0], ylabel=names[1])
        axes.margins(x=0.1, y=0.12)

    best = at[int(np.argmax(values))]
    return _draw(name, draw, alt=f"{title}: {len(values)} trials, highest {values.max():.3f} at {best}.")


def _draw(name: str, draw: Callable[[Axes], None], *, alt: str) -> Picture:
    """A figure of one plot."""
    # The salt gives elements the same ids every time.
    with rc_context({**STYLE, "svg.hashsalt": f"onelabel {name}"}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2)
        content = io.BytesIO()
        figure.savefig(
            content,
            format="svg",
            transparent=True,
            metadata={"Creator": None, "Date": None, "Format": None, "Type": None},
        )
    return Picture(f"{name}.svg", alt, content.getvalue())


def _mark_rounds(axes: Axes, parts: Sequence[Curve]) -> None:
    """A line where a round begins, and its number where there is room."""
    end = max(float(part.steps[-1]) for part in parts)
    begins = [*(float(part.steps[0]) for part in parts), end]
    for part, begin, width in zip(parts, begins, np.diff(begins), strict=False):
        if begin > begins[0]:
            axes.axvline(begin, color=INK, alpha=0.5, lw=0.8, ls=":")
        if len(parts) > 1 and width > LABEL_SHARE * end:
            number, offset = part.name.removeprefix("round-"), (3, -2)
            axes.annotate(number, (begin, 1), offset, axes.get_xaxis_transform(), "offset points", va="top")


def _thinned(curve: Curve) -> Curve:
    """Means of neighbours, where there are more points than can be told apart."""
    count = len(curve.values)
    if count <= MOST_POINTS:
        return curve
    starts = np.linspace(0, count, MOST_POINTS, endpoint=False).astype(int)
    sizes = np.diff([*starts, count])
    steps, values = (np.add.reduceat(part, starts) / sizes for part in (curve.steps, curve.values))
    return Curve(curve.name, steps, values)


def _smooth(values: Values) -> Values:
    """Moving mean over a fifteenth of the values; at the ends over those that there are."""
    window = np.ones(1 + 2 * (len(values) // 30))
    smooth: Values = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
    return smooth


def _limits(values: Sequence[Values]) -> tuple[float, float]:
    low, high = np.concatenate(values).min(), np.concatenate(values).max()
    margin = 0.05 * (high - low)
    return float(low - margin), float(high + margin)


def _interval(found: Correlation) -> str:
    text = f"{found.value:.2f}"
    if not np.isnan(found.low):
        text += f" (95 % CI {found.low:.2f} to {found.high:.2f})"
    return text.replace("-", "\N{MINUS SIGN}")

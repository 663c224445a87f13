"""What the report of a run says, section by section, read from the run's folder and its record in MLflow."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, compress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from onelabel.configs.changes import changes
from onelabel.configs.passwords import without_password
from onelabel.configs.schema import RunConfig
from onelabel.errors import SCAN_FAULTS, ClusterError, sentence
from onelabel.imaging.storage import AnyPath
from onelabel.orchestrator import plots, preview, report, status
from onelabel.orchestrator.plots import Curve, Ranked
from onelabel.orchestrator.report import Picture
from onelabel.orchestrator.rounds import Round, plan
from onelabel.orchestrator.select import select
from onelabel.orchestrator.tracking import PastRun
from onelabel.tasks.cohort import open_cohort

MOST_TILES = 24
MOST_ROWS = 1000  # of a table of scans
NAMED_FAULTS = 3
SAMPLES = 9
Fact = tuple[str, str, str]  # a title, a figure, more about it
METRICS = ("loss", "steps_per_s", "wait_share", "idle_share")


@dataclass(frozen=True)
class Table:
    """Text and numbers; None is unknown.

    digits : of floats, behind the point; folded : a title, under which the table is hidden until it is asked for
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    digits: int = 3
    folded: str = ""

    def without_gaps(self) -> "Table":
        """Without the columns of which nothing is known."""
        known = [any(value is not None for value in values) for values in zip(*self.rows, strict=True)]
        rows = [list(compress(row, known)) for row in self.rows]
        return replace(self, columns=list(compress(self.columns, known)), rows=rows)


@dataclass(frozen=True)
class Section:
    """One part of the page.

    about : how to read it; notes : sentences on what is missing; text : shown as it is, folded; parts : by title
    """

    about: str = ""
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    text: str = ""
    parts: Mapping[str, "Section"] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """A round with scores, and which of their rows were selected, (n,)."""

    round: Round
    table: pa.Table
    selected: NDArray[np.bool_]

    @property
    def ranked(self) -> Ranked:
        """What the plots show."""
        score, dice = (numbers(self.table, name) for name in ("score", "dice"))
        return Ranked(self.round.folder.name, score, dice, self.selected)


@dataclass(frozen=True)
class Run:
    """A run, finished or not."""

    folder: AnyPath
    config: RunConfig

    @cached_property
    def rounds(self) -> list[Round]:
        """All, those to come included."""
        return plan(self.config, self.folder)

    @cached_property
    def scored(self) -> list[Scored]:
        """The rounds that have scores."""
        found = []
        for now in self.rounds:
            if (table := now.table("scores")) is not None:
                selection = now.table("selection")
                if selection is None:
                    selection = select(table, now.stage.select)
                selected = pc.is_in(table["key"], value_set=selection["key"].combine_chunks())
                found.append(Scored(now, table, selected.to_numpy()))
        return found

    @cached_property
    def histories(self) -> dict[str, dict[str, dict[int, float]]]:
        """`METRICS` by round or ranker, name and step; ClusterError where there is no record."""
        return PastRun(self.config, self.folder).histories(METRICS)

    def curves(self, metric: str, /) -> list[Curve]:
        """A metric of all rounds that logged it, one after the other."""
        ends = accumulate(now.stage.steps for now in self.rounds)
        return [
            _curve(now.folder.name, logged, begin=end - now.stage.steps)
            for now, end in zip(self.rounds, ends, strict=True)
            if (logged := self.histories.get(now.name, {}).get(metric))
        ]


def facts(run: Run, /) -> list[Fact]:
    """What stands at the top of the page."""
    now = status.read(run.folder)
    done = [one for one in now if one.state == "done"]
    begun = [one.name for one in now if one.state == "in progress"]
    state = f"{begun[0]} is in progress" if begun else "finished" if len(done) == len(now) else "not begun"
    found = [("rounds done", f"{len(done)} of {len(now)}", state)]
    for cohort, table in (("test", "test"), ("unlabelled", "scores")):
        judged = [place for place, one in enumerate(now) if one.figure(cohort, "dice_mean") is not None]
        scans = run.rounds[judged[-1]].table(table) if judged else None
        if scans is not None:
            dice = numbers(scans, "dice")
            dice = dice[np.isfinite(dice)]
            structures = {name: numbers(scans, column) for column, name in _structures(scans).items()}
            each = [f"{name} {np.nanmean(each):.3f}" for name, each in structures.items() if np.isfinite(each).any()]
            more = f"{len(dice)} scans with a true mask, SD {dice.std():.3f}, worst {dice.min():.3f}"
            more = "; ".join([more, ", ".join(each)]) if each else more
            found.append((f"mean Dice, {cohort} scans, {now[judged[-1]].name}", f"{dice.mean():.3f}", more))
    if run.scored:
        last = run.scored[-1]
        failed = len(last.table) - last.table["error"].null_count
        more = f"{failed} failed" if failed else "none failed"
        title = f"scans selected in {last.round.folder.name}"
        found.append((title, f"{last.selected.sum()} of {len(last.table)}", more))
    return found


def _structures(table: pa.Table) -> dict[str, str]:
    """Names of several structures, by the column with the Dice of each."""
    columns = [name for name in table.column_names if name.startswith("dice_")]
    return {name: name.removeprefix("dice_").replace("_", " ") for name in columns}


def rounds(run: Run, /) -> Section:
    """The rounds, as `onelabel status` shows them."""
    return Section(tables=[Table(status.COLUMNS, [now.cells() for now in status.read(run.folder)])])


def losses(run: Run, /) -> Section:
    """Losses of the rounds and of the rankers."""
    pictures = []
    if parts := run.curves("loss"):
        pictures.append(plots.curves("loss", {"loss": parts}, title="Training of the network", ylabel="loss"))
    names = {now.name for now in run.rounds}
    others = [(name, logged["loss"]) for name, logged in run.histories.items() if name not in names]
    for place, (name, logged) in enumerate(others):
        if logged:
            curve, title = _curve(name, logged), f"Training of the {name}"
            pictures.append(plots.curves(f"loss-ranker-{place}", {"loss": [curve]}, title=title, ylabel="loss"))
    begun = {now.folder.name for now in run.rounds if now.folder.is_dir()}
    silent = sorted(begun - {part.name for part in parts})
    every = run.config.tracking.every
    about = f"Thin: as logged, means of {every} steps. Thick: moving mean. Dotted: where a round begins."
    return Section(about, [f"No loss was logged for {', '.join(silent)}."] if silent else [], pictures)


def scans(run: Run, /) -> Section:
    """The selected and the other masks of the last round that has scores."""
    if not run.scored:
        return Section(notes=["No round has scored masks yet."])
    last = run.scored[-1]
    usable = pc.is_null(last.table["error"]).to_numpy()
    chosen, rest = (
        _worst_first(last.table.filter(pa.array(rows))) for rows in (last.selected, usable & ~last.selected)
    )
    half = MOST_TILES // 2
    shares = {
        "Selected": (chosen, max(half, MOST_TILES - len(rest))),
        "Not selected": (rest, max(half, MOST_TILES - len(chosen))),
    }
    truths, notes = _truths(run)
    selected_in: dict[str, list[str]] = defaultdict(list)
    for one in run.scored:
        for key in one.table["key"].filter(pa.array(one.selected)).to_pylist():
            selected_in[key].append(str(one.round.index))
    parts = {}
    for title, (table, most) in shares.items():
        pictures, faults = _tiles(table.slice(0, most).to_pylist(), truths, title.lower().replace(" ", "-"))
        listed = _scan_table(table, selected_in)
        parts[f"{title}: {len(table)} scans"] = Section("", faults, pictures, [listed] if len(table) else [])
    about = f"Masks of {last.round.name}, lowest score first: orange the mask, blue the truth where there is one."
    return Section(about, notes, parts=parts)


def _tiles(rows: Sequence[report.Row], truths: Mapping[str, str], name: str) -> tuple[list[Picture], list[str]]:
    """Pictures of scans, and sentences on those that cannot be drawn."""
    pictures, faults = [], []
    for place, row in enumerate(rows):
        truth = truths.get(row["key"]) if row["dice"] is not None else None
        figures = [f"{word} {row[word.lower()]:.3f}" for word in ("score", "Dice") if row[word.lower()] is not None]
        alt = f"Mask of {row['key']} on three planes: {', '.join(figures) or 'without a score'}."
        caption = f"{row['key']}, {row['volume_mm3'] / 1000:.0f} ml" if row["volume_mm3"] else row["key"]
        try:
            pictures.append(Picture(f"{name}-{place:02d}.png", alt, report.tile({**row, "label": truth}), caption))
        except SCAN_FAULTS as error:
            faults.append(f"'{row['key']}' cannot be drawn: {sentence(error)}")
    if len(faults) > NAMED_FAULTS:
        faults[NAMED_FAULTS:] = [f"{len(faults) - NAMED_FAULTS} more scans cannot be drawn."]
    return pictures, faults


def _truths(run: Run) -> tuple[dict[str, str], list[str]]:
    """True masks of unlabelled scans by key, and a sentence where they cannot be found."""
    source = run.config.data.unlabelled
    if source is None:
        return {}, []
    try:
        cohort = open_cohort(source.path, where=source.where, label_column=source.label_column)
    except SCAN_FAULTS as error:
        return {}, [f"True masks are not drawn: {sentence(error)}"]
    return {row["key"]: row["label"] for row in cohort.rows() if row["label"]}, []


def _scan_table(table: pa.Table, selected_in: Mapping[str, Sequence[str]]) -> Table:
    """The figures of all scans, as far as there are any."""
    scores = [name for name in table.column_names if name.startswith("score")]
    expected = [name for name in ("expected_dice", "expected_low", "expected_high") if name in table.column_names]
    structures = _structures(table)
    measures = (*expected, "dice", *structures, "hd95_mm", "asd_mm")
    rows = [
        (
            row["key"],
            *(row[name] for name in (*scores, *measures)),
            None if row["volume_mm3"] is None else round(row["volume_mm3"] / 1000),
            ", ".join(selected_in.get(row["key"], ())),
        )
        for row in table.slice(0, MOST_ROWS).to_pylist()
    ]
    names = [name.replace("_", " ").replace("dice", "Dice") for name in (*scores, *expected)]
    each = [f"Dice, {name}" for name in structures.values()]
    columns = ("scan", *names, "Dice", *each, "HD95, mm", "ASD, mm", "volume, ml")
    some = f"the {MOST_ROWS} lowest scores of {len(table)}" if len(table) > MOST_ROWS else f"all {len(table)}"
    return Table((*columns, "selected in rounds"), rows, folded=f"Table of {some}").without_gaps()


def material(run: Run, /) -> Section:
    """What the networks learned from: bins and samples of the first stage, and the ingredients of all."""
    ingredients = [
        (stage.name, stage.rounds, stage.steps, name, part.type, part.of, part.share / sum(p.share for p in parts))
        for stage in run.config.stages
        for name, parts in stage.streams.items()
        for part in parts
    ]
    columns = ("stage", "rounds", "steps a round", "stream", "images", "of scans", "share")
    pictures, notes = [], []
    try:
        pictures = preview.material(run.config, count=SAMPLES)
    except SCAN_FAULTS as error:
        notes = [f"The labelled scan cannot be shown: {sentence(error)}"]
    about = "Orange outlines: the labels that are learned. Bins: orange inside the structure, blue outside."
    return Section(about, notes, pictures, [Table(columns, ingredients, digits=2)])


def throughput(run: Run, /) -> Section:
    """How fast the rounds were, and who waited for whom."""
    pictures, notes = [], []
    try:
        speed, waits, idles = (run.curves(metric) for metric in METRICS[1:])
        if speed:
            shares = {"training waits for samples": waits, "synthesis actors idle": idles}
            title, unit = "Who waits for whom", "share of the time, %"
            pictures = [
                plots.curves("speed", {"": speed}, title="Speed of training", ylabel="steps per second, 1/s"),
                plots.curves("waiting", shares, title=title, ylabel=unit, percent=True),
            ]
    except ClusterError as error:
        notes = [f"Speed over steps cannot be shown: {sentence(error)}"]
    columns = ["round", "training, min", "steps per s", "training waits, %", "synthesis idles, %", "preparing, s"]
    columns += ["scoring, s", "whole round, min", "segmenting a scan, CPU s", "ranking a scan, CPU s"]
    rows = []
    for now in run.rounds:
        trained, metrics = now.training(), now.metrics() if now.done else {}
        seconds, scored = metrics.get("seconds", {}), metrics.get("unlabelled", {})
        figures = (
            _scaled(trained.get("seconds"), 1 / 60),
            trained.get("steps_per_s"),
            *(_scaled(trained.get(name), 100) for name in ("wait_share", "idle_share")),
            *(seconds.get(name) for name in ("preparing", "scoring")),
            _scaled(seconds.get("round"), 1 / 60),
            *(scored.get(f"{name}_cpu_s_mean") for name in ("predict", "rank")),
        )
        rows.append((now.folder.name, *figures))
    about = (
        "Of a round that was cut off and resumed, preparing, scoring and the whole round are those of the last attempt."
    )
    return Section(about, notes, pictures, [Table(columns, rows, digits=2).without_gaps()])


def failures(run: Run, /) -> Section:
    """Scans that ended as rows with an error."""
    where: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for now in run.rounds:
        for cohort, table in (("unlabelled", now.table("scores")), ("test", now.table("test"))):
            for row in table.filter(pc.is_valid(table["error"])).to_pylist() if table is not None else ():
                where[row["key"], cohort, row["error"]].append(str(now.index))
    if not where:
        return Section(notes=["No scan failed."])
    rows = [(*row, ", ".join(indices)) for row, indices in list(where.items())[:MOST_ROWS]]
    more = [f"{len(where) - MOST_ROWS} more failed; scores.parquet lists them."] if len(where) > MOST_ROWS else []
    return Section(notes=more, tables=[Table(("scan", "cohort", "error", "rounds"), rows)])


def settings(run: Run, /) -> Section:
    """What the run was told."""
    rows = [
        (one.key, without_password(one.value), "no default" if one.default is None else one.default)
        for one in changes(run.config)
    ]
    text = (run.folder / status.RECORD).read_text(encoding="utf-8")
    about = "The settings that differ from their defaults; all others have the defaults of configs/schema.py."
    return Section(about, tables=[Table(("key", "value", "default"), rows)], text=without_password(text))


def numbers(table: pa.Table, column: str) -> plots.Values:
    """A column, (n,), NaN where unknown or where the table has no such column."""
    if column not in table.column_names:
        return np.full(len(table), np.nan)
    values: plots.Values = table[column].to_numpy().astype(float)
    return values


def _curve(name: str, logged: Mapping[int, float], *, begin: int = 0) -> Curve:
    return Curve(name, np.array([*logged], float) + begin, np.array([*logged.values()]))


def _worst_first(table: pa.Table) -> pa.Table:
    score = np.nan_to_num(numbers(table, "score"), nan=-np.inf)
    return table.take(np.lexsort((table["key"].to_numpy().astype(str), score)))


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor

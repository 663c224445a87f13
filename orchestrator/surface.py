"""The report of a search: one HTML page that shows how the objective responds to the searched keys."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from onelabel.configs.schema import RunConfig
from onelabel.configs.searching import ChoicesConfig, LogUniformConfig
from onelabel.orchestrator import markup, plots
from onelabel.orchestrator.page import NAME, TEMPLATE
from onelabel.orchestrator.report import Picture
from onelabel.orchestrator.sections import Fact, Section, Table
from onelabel.orchestrator.trials import Trial, bases

MOST_MAPS = 6  # pairs of keys that are drawn
_STATES = ("done", "stopped early", "failed")

READING = "Maps and lines show means over the trials that share these values; points are trials."
ABOUT = {
    "expected_dice": "The mean Dice to expect of the unlabelled scans' masks. It is learned from masks of synthetic"
    " images that are made by each trial's own synthesis: between trials of other synthesis or other bins it says less"
    " than between trials of the same.",
    "test_dice": "The mean Dice of the test scans. The best of many trials is a little lucky on them: judge it on"
    " others.",
}


def write(config: RunConfig, objective: str, trials: Sequence[Trial], folder: Path, /) -> Path:
    """Write the page; its trials are sorted, the best one first."""
    page = folder / NAME
    rows = [(one, _value(one, objective)) for one in trials]
    sections = {
        "Response": _response(config, objective, rows),
        "Trials": Section(tables=[table(trials, objective)]),
        "Best settings": Section(
            "best.yaml holds all settings, ready for `onelabel run`.",
            tables=[Table(("key", "value"), [(key, str(value)) for key, value in trials[0].point.items()])],
        ),
    }
    with markup.complete(page) as unfinished:
        markup.write(
            unfinished,
            TEMPLATE,
            name=config.name,
            folder=folder,
            facts=_facts(objective, rows),
            sections=sections,
        )
    return page


def table(trials: Sequence[Trial], objective: str, /) -> Table:
    """A row for each trial: its values, how far it came and how good it was."""
    keys = list(dict.fromkeys(key for one in trials for key in one.point))
    rows = [
        (
            *(_text(one.point.get(key)) for key in keys),
            _state(one),
            len(one.values(objective)),
            _value(one, objective),
            one.folder.name,
            one.error,
        )
        for one in trials
    ]
    titles = [key.replace(".", " ") for key in _short(keys)]
    return Table((*titles, "state", "rounds", _words(objective), "folder", "error"), rows, 4).without_gaps()


def _facts(objective: str, rows: Sequence[tuple[Trial, float | None]]) -> list[Fact]:
    states = [_state(one) for one, _ in rows]
    more = ", ".join(f"{states.count(state)} {state}" for state in _STATES[1:] if state in states)
    firsts = {bases(one.config)[0].name for one, _ in rows}
    best, value = rows[0]
    return [
        (_words(objective), f"{value:.4f}", "of the best trial"),
        ("trials done", f"{states.count('done')} of {len(rows)}", more),
        ("first stages trained", str(len(firsts)), "from which trials went on"),
        ("rounds", str(len(best.values(objective))), "of the best trial"),
    ]


def _response(config: RunConfig, objective: str, rows: Sequence[tuple[Trial, float | None]]) -> Section:
    """Maps over each two keys that have lists of values, and a plot over each key."""
    assert config.search
    # A key with one value sets it, but there is nothing to see.
    space = {
        key: one for key, one in config.search.space.items() if not isinstance(one, ChoicesConfig) or one.values[1:]
    }
    known = [pair for pair in rows if pair[1] is not None and pair[0].done and pair[0].point.keys() >= space.keys()]
    if not known:
        return Section(notes=["No trial of this space is done."])
    values, words = np.array([value for _, value in known], float), _words(objective)
    titles = dict(zip(space, _short(list(space)), strict=True))
    at = {key: [_text(one.point[key]) for one, _ in known] for key in space}
    lists = {
        key: [_text(value) for value in one.values] for key, one in space.items() if isinstance(one, ChoicesConfig)
    }
    orders = {key: list(dict.fromkeys(listed + at[key])) for key, listed in lists.items()}
    pictures: list[Picture] = []
    for place, (up, across) in enumerate(list(combinations(orders, 2))[:MOST_MAPS]):
        axes = {titles[across]: orders[across], titles[up]: orders[up]}
        pictures.append(plots.surface(f"surface-{place}", at[across], at[up], values, axes=axes, title=words))
    for place, (key, one) in enumerate(space.items()):
        xs = at[key] if key in orders else [trial.point[key] for trial, _ in known]
        order, log, names = orders.get(key), isinstance(one, LogUniformConfig), (titles[key], words)
        pictures.append(plots.effect(f"effect-{place}", xs, values, order=order, log=log, names=names))
    return Section(f"{ABOUT[objective]} {READING}", pictures=pictures)


def _value(one: Trial, objective: str) -> float | None:
    known = [value for value in one.values(objective) if value is not None]
    return known[-1] if known else None


def _state(one: Trial) -> str:
    return "failed" if one.error else "done" if one.done else "stopped early"


def _words(objective: str) -> str:
    return objective.replace("_", " ").replace("dice", "Dice")


def _short(keys: Sequence[str]) -> list[str]:
    """As much of the ends of dotted keys as tells them apart."""
    parts = [key.split(".") for key in keys]
    most = max((len(each) for each in parts), default=1)
    for length in range(2, most + 1):
        short = [".".join(each[-length:]) for each in parts]
        if len(set(short)) == len(short):
            return short
    return list(keys)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value).replace('"', "")

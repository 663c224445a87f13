"""Does it pay to choose pseudo-labels, and by which ranker? Self-training on the k best of each ranker, against chance.

python benchmarks/study.py DATA [--storage runs] [--seeds 0,1,2] [--k 5,10,20,40] [--vary 20] [--label KEY]
    [--rankers random,confidence] [--recipes 'soft labels;growing k'] [--no-reference] [--plot FILE] [key=value]

DATA/participants.csv has columns key, split, image, mask; splits labelled, unlabelled, test. For each seed the
first stage of `singlestrip` is trained once, and each ranker and k goes on from it with the same rounds of
self-training; so do recipes that differ from the preset's in one thing; `all labels` trains on the true masks of the
pool for as many steps. All is one Ray session at 4 mm, and the same command goes on where it was cut off. Prints
Markdown, for the test scans and for the pool itself: Dice of each, its difference to no self-training and to chance
with Wilcoxon's signed-rank test over scans and seeds, corrected by Holm's method.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from shared import go_on_from, split

from onelabel.cluster import runtime
from onelabel.configs.load import load
from onelabel.configs.schema import RunConfig
from onelabel.orchestrator.driver import run
from onelabel.orchestrator.rounds import plan
from onelabel.orchestrator.statistics import compare, holm, interval

RANKERS = {
    "random": "{type: random}",
    "autoencoder": "{type: autoencoder}",
    "consistency": "{type: consistency, passes: 4}",
    "confidence": "{type: confidence}",
    "fused": "{type: fused, rankers: [{type: autoencoder}, {type: confidence}]}",
    "oracle": "{type: oracle}",
}
DEFAULT = "confidence"  # of the recipes
BASE = ("no self-training", 0)
_TRAIN = "stages.1.streams.train"
_PASSES = ["stages.0.pseudo={views: {passes: 4}}", "stages.1.pseudo={views: {passes: 4}}"]
_OWN = "{type: synthetic, of: labelled, share: 0.5}"
RECIPES = {
    "real scans alone": [f"{_TRAIN}=[{_OWN}, {{type: real, of: selected, share: 0.5}}]"],
    "synthesised from them alone": [f"{_TRAIN}=[{_OWN}, {{type: synthetic, of: selected, share: 0.5}}]"],
    "mean over views": _PASSES,
    "soft labels": [*_PASSES, f"{_TRAIN}.1.soft=true", f"{_TRAIN}.2.soft=true"],
    "ignored rim": [*_PASSES, f"{_TRAIN}.1.ignore=[0.2, 0.8]", f"{_TRAIN}.2.ignore=[0.2, 0.8]"],
    "networks of three rounds": ["stages.0.pseudo={rounds: 3}", "stages.1.pseudo={rounds: 3}"],
    "projected masks": [
        "stages.*.ranker={type: autoencoder}",
        "stages.0.pseudo={project: true}",
        "stages.1.pseudo={project: true}",
    ],
    "mean of weights": ["stages.1.learner.ema=0.99"],
    "growing k": ["stages.0.select.k=5", "stages.1.select.k=[20, 40]"],
    "four rounds, growing k": ["stages.0.select.k=5", "stages.1={rounds: 4, select: {k: [10, 20, 40]}}"],
    "fresh start, twice the steps": ["stages.1={start: scratch, steps: 1500, learner: {learning_rate: 1.0e-3}}"],
}
# Okabe and Ito's colours
COLOURS = dict(zip(RANKERS, ("#999999", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#000000"), strict=True))
SETS = {"test": "test scans", "scores": "unlabelled pool"}
GRID = ("grid.spacing_mm=4", "grid.size=[48, 64, 64]", "stages.*.expect.images=0", "compute.threads=2")

Found = dict[tuple[str, int], np.ndarray]  # Dice of all scans and seeds, by way and k


@dataclass(frozen=True)
class Cell:
    """One run: its name in the table, k (0 where nothing is selected) and the Dice of all scans of a set, by key."""

    name: str
    k: int
    seed: int
    dice: dict[str, np.ndarray]


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--k", default="5,10,20,40")
    parser.add_argument("--vary", type=int, default=20, help="k of the recipes; 0: none of them")
    parser.add_argument("--rankers", default=",".join(RANKERS))
    parser.add_argument("--recipes", default=";".join(RECIPES), help="those to try, between semicolons")
    parser.add_argument("--no-reference", action="store_true", help="do not train on all labels")
    parser.add_argument("--label", help="key of the labelled scan, where there are several")
    parser.add_argument("--plot", type=Path, default=Path("study.png"))
    parser.add_argument("settings", nargs="*", help="key=value for all runs")
    options = parser.parse_intermixed_args()
    seeds, ks = ([int(part) for part in text.split(",")] for text in (options.seeds, options.k))
    recipes = options.recipes.split(";") if options.vary else []
    ways = list(_ways(options.rankers.split(","), ks, recipes, options.vary))
    common = [*GRID, f"storage={options.storage}", *options.settings]
    with runtime.connect(load(["supervised", "data.labelled=none", *common]).compute):
        pool = split(options.data, labelled="labelled", unlabelled="unlabelled", test="test")
        pool += [f"data.labelled.where.key={options.label}"] * bool(options.label)
        every = split(options.data, labelled="unlabelled", test="test")
        cells = [cell for seed in seeds for cell in _cells(pool, common, seed, ways)]
        cells += [] if options.no_reference else [_reference(pool, every, common, seed) for seed in seeds]
    tables = [f"Dice of the {name}\n\n{_table(_by_way(cells, table))}" for table, name in SETS.items()]
    sys.stdout.write("\n\n".join(tables) + "\n")
    _plot(_by_way(cells, "test"), options.plot)


def _ways(rankers: list[str], ks: list[int], recipes: list[str], vary: int) -> Iterator[tuple[str, int, list[str]]]:
    """Name, k and settings of all ways to train oneself."""
    for name in rankers:
        yield from ((name, k, _chosen(name, k)) for k in ks)
    yield from ((name, vary, [*_chosen(DEFAULT, vary), *RECIPES[name]]) for name in recipes)


def _chosen(ranker: str, k: int) -> list[str]:
    return [f"stages.*={{ranker: {RANKERS[ranker]}, select: {{type: top_k, k: {k}}}}}"]


def _one(pool: list[str], common: list[str], seed: int) -> list[str]:
    return ["singlestrip", *pool, f"seed={seed}", *common, "stages.1.rounds=2"]


def _cells(pool: list[str], common: list[str], seed: int, ways: Iterable[tuple[str, int, list[str]]]) -> Iterator[Cell]:
    """All runs of a seed from one labelled scan."""
    one = _one(pool, common, seed)
    base = load([*one, f"name=study-{seed}-base", "stages.*.ranker={type: random}"])
    base = base.model_copy(update={"stages": base.stages[:1]})
    yield Cell(*BASE, seed, _dice(base))
    fitted = base
    for name, k, settings in ways:
        config = load([*one, f"name=study-{seed}-{re.sub(r'[^a-z]+', '-', name)}-{k}", *settings])
        go_on_from(base, config)
        go_on_from(fitted, config)
        yield Cell(name, k, seed, _dice(config))
        fitted = config if (Path(config.storage) / config.name / "rankers").is_dir() else fitted


def _reference(pool: list[str], every: list[str], common: list[str], seed: int) -> Cell:
    """From the true masks of the pool, for as many steps in all as one label had."""
    steps = sum(stage.steps * stage.rounds for stage in load(_one(pool, common, seed)).stages)
    reference = ["supervised", *every, f"seed={seed}", f"name=study-{seed}-all", f"stages.0.steps={steps}", *common]
    return Cell("all labels", 0, seed, _dice(load(reference)))


def _dice(config: RunConfig) -> dict[str, np.ndarray]:
    """Of the last round's network, by set; a scan that failed counts as a miss."""
    run(config)
    last = plan(config, Path(config.storage) / config.name)[-1]
    tables = {name: last.table(name) for name in SETS}
    return {name: np.nan_to_num(table.sort_by("key")["dice"].to_numpy()) for name, table in tables.items() if table}


def _by_way(cells: list[Cell], table: str) -> Found:
    """Dice of all seeds after one another, in the same order everywhere; of the ways that have such a table."""
    ways = dict.fromkeys((cell.name, cell.k) for cell in cells if table in cell.dice)
    return {way: np.concatenate([cell.dice[table] for cell in cells if (cell.name, cell.k) == way]) for way in ways}


def _table(found: Found) -> str:
    """A row for each way and k."""
    base, lines = found[BASE], []
    ways = [way for way in found if way != BASE]
    against = [(compare(found[way], base), compare(found[way], found.get(("random", way[1]), base))) for way in ways]
    corrected = np.reshape(holm([each.p for pair in against for each in pair]), (-1, 2))
    head = ["selection", "k", "mean", "95 %", "worst", "- base", "p", "- random", "p"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for way in [BASE, *ways]:
        dice = found[way]
        low, high = interval(dice.tolist())
        row = [way[0], str(way[1] or ""), f"{dice.mean():.4f}", f"{low:.4f} to {high:.4f}", f"{dice.min():.4f}"]
        if way in ways:
            pair, ps = against[ways.index(way)], corrected[ways.index(way)]
            row += [text for each, p in zip(pair, ps, strict=True) for text in (f"{each.difference:+.4f}", f"{p:.2g}")]
        lines.append("| " + " | ".join(row + [""] * (len(head) - len(row))) + " |")
    return "\n".join(lines)


def _plot(found: Found, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    ks = sorted({k for name, k in found if name in RANKERS})
    for name, colour in COLOURS.items():
        if (name, ks[0]) not in found:
            continue
        means = [found[name, k].mean() for k in ks]
        bounds = np.array([interval(found[name, k].tolist()) for k in ks])
        axes.plot(ks, means, marker="o", color=colour, label=name)
        axes.fill_between(ks, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.08)
    for way, style in ((BASE, ":"), (("all labels", 0), "--")):
        if way in found:
            axes.axhline(found[way].mean(), color="black", linestyle=style, label=way[0])
    axes.set(xlabel="k, pseudo-labelled scans of a round", ylabel="mean Dice on the test heads", xscale="log")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

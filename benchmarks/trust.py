"""Which ranker knows good masks from bad ones, and how far is the expected Dice from the true one?

python benchmarks/trust.py DATA [--storage runs] [--ages 40,80,160,320,1000] [--seeds 0,1,2] [key=value ...]

DATA/ixi/participants.csv has columns key, split, image, mask. So that the pool spans bad masks and good ones, the first
stage of `singlestrip` is run several times, each with the number of steps of an age; every scan of the unlabelled pool
is then segmented and scored by all rankers at once. True masks of the pool only judge. Prints Markdown; runs resume
where they were cut off.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import spearmanr
from shared import go_on_from, split

from onelabel.cluster import runtime
from onelabel.configs.load import load
from onelabel.configs.schema import RandomRankerConfig, RunConfig
from onelabel.orchestrator.driver import run
from onelabel.orchestrator.rounds import plan
from onelabel.tasks.score import EXPECTED, columns_of

RANKERS = (
    "{type: fused, rankers: [{type: autoencoder}, {type: consistency, passes: 4}, {type: confidence},"
    " {type: confidence, of: views, views: {passes: 4}}, {type: posterior, passes: 4}]}"
)
BAD = 0.9
DRAWS = 2000


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument("--ages", default="40,80,160,320,1000")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("settings", nargs="*", help="key=value")
    options = parser.parse_intermixed_args()
    ages, seeds = ([int(part) for part in text.split(",")] for text in (options.ages, options.seeds))
    config = partial(_config, options)
    with runtime.connect(config(ages[0], seeds[0]).compute):
        tables = [[_scored(config(age, seed), config(ages[0], seed)) for seed in seeds] for age in ages]
    columns = [*columns_of(config(ages[0], seeds[0]).stages[0].ranker), EXPECTED[0]]
    sys.stdout.write("\n\n".join([_pool(ages, tables), _ranks(ages, columns, tables), _expected(ages, tables)]) + "\n")


def _config(options: argparse.Namespace, age: int, seed: int) -> RunConfig:
    stage = (
        "stages=[{name: base, start: scratch, learner: {type: supervised, learning_rate: 1.0e-3}, select: {k: 1},"
        f" streams: {{train: [{{type: synthetic, of: labelled}}]}}, steps: {age}, expect: {{images: 64}},"
        f" ranker: {RANKERS}}}]"
    )
    data = split(options.data / "ixi", labelled="labelled", unlabelled="unlabelled")
    named = [f"name=trust-{seed}-{age}", f"seed={seed}", f"storage={options.storage}"]
    return load(["singlestrip", stage, *data, *named, "compute.threads=2", *options.settings])


def _scored(config: RunConfig, first: RunConfig) -> pa.Table:
    """The scores of a run, whose network other rankers may have scored before."""
    base = config.model_copy(update={"name": f"{config.name}-base"})
    base = base.model_copy(update={"stages": (base.stages[0].model_copy(update={"ranker": RandomRankerConfig()}),)})
    run(base)
    go_on_from(base, config)
    go_on_from(first, config)  # the rankers' networks, which depend on the label alone
    run(config)
    scores = plan(config, Path(config.storage) / config.name)[0].table("scores")
    assert scores is not None
    return scores.filter(pc.is_valid(scores["dice"]))


def _pool(ages: list[int], tables: list[list[pa.Table]]) -> str:
    lines = ["| steps | masks | mean Dice | worst | best |", "|---|---|---|---|---|"]
    for age, part in zip(ages, tables, strict=True):
        dice = np.concatenate([table["dice"].to_numpy() for table in part])
        lines.append(f"| {age} | {len(dice)} | {dice.mean():.3f} | {dice.min():.3f} | {dice.max():.3f} |")
    return "\n".join(lines)


def _ranks(ages: list[int], columns: list[str], tables: list[list[pa.Table]]) -> str:
    """Spearman's correlation with Dice, mean over seeds: over all ages, with a bootstrap interval, and within each."""
    head = ["ranker", "all ages", "95 %", *(f"{age} steps" for age in ages)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    dice = _values("dice", tables)
    for name in columns:
        scores = _values(name, tables)
        low, high = _interval(scores, dice)
        within = [f"{_spearman(scores[:, [age]], dice[:, [age]]):.2f}" for age in range(len(ages))]
        line = [name, f"{_spearman(scores, dice):.3f}", f"{low:.3f} to {high:.3f}", *within]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _values(column: str, tables: list[list[pa.Table]]) -> np.ndarray:
    """A column's numbers, (seeds, ages, scans)."""
    return np.stack([[table[column].to_numpy() for table in part] for part in zip(*tables, strict=True)])


def _spearman(scores: np.ndarray, dice: np.ndarray) -> float:
    """Mean over seeds of the correlation over all masks of a seed; both (seeds, ages, scans)."""
    return float(
        np.mean([spearmanr(*(one.ravel() for one in pair)).statistic for pair in zip(scores, dice, strict=True)])
    )


def _interval(scores: np.ndarray, dice: np.ndarray) -> tuple[float, float]:
    """95 % of what pools of scans drawn with replacement have, all masks of a scan together."""
    drawn = np.random.default_rng(0).integers(scores.shape[2], size=(DRAWS, scores.shape[2]))
    low, high = np.quantile([_spearman(scores[..., one], dice[..., one]) for one in drawn], [0.025, 0.975])
    return float(low), float(high)


def _expected(ages: list[int], tables: list[list[pa.Table]]) -> str:
    """How far the expected Dice is from the true one, and what its flags catch."""
    lines = [
        "| steps | error | bias | inside the interval | flagged | of these bad | bad unflagged |",
        "|" + "---|" * 7,
    ]
    for age, part in [*zip(map(str, ages), tables, strict=True), ("all", sum(tables, []))]:
        expected, low, high, dice = (
            np.concatenate([table[name].to_numpy() for table in part]) for name in (*EXPECTED, "dice")
        )
        flagged, bad = expected < BAD, dice < BAD
        cells = [
            age,
            f"{np.abs(expected - dice).mean():.3f}",
            f"{(expected - dice).mean():+.3f}",
            f"{((low <= dice) & (dice <= high)).mean():.0%}",
            str(flagged.sum()),
            f"{bad[flagged].mean():.0%}" if flagged.any() else "–",
            f"{(~flagged[bad]).mean():.0%}" if bad.any() else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

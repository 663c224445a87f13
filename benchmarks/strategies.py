"""Do the strategies pay? Each against the labelled scans alone, and against all labels.

python benchmarks/strategies.py DATA [--storage runs] [--seeds 0,1,2] [--base 3000] [--steps 3000] [--labelled N]
    [--label COLUMN] [--scribble COLUMN] [--only NAMES] [key=value]

DATA/participants.csv has columns key, split, image and the label's; splits labelled (or train), unlabelled, test. For
each seed a network is trained on the labelled scans for `--base` steps, and from it everything goes on for `--steps`:
supervised learning, which is what the others are held against, and each strategy; `all labels` is the same supervised
learning on the true labels of the pool too. Where a column of scribbles is named, all train scans have some: partial
cross-entropy is held against, `all labels` are the dense ones, and each learns for both numbers of steps at once.
Network, augmentation and steps are the same for all; what is deployed is a mean of weights, but for `reciprocal`. All
is one Ray session, and the same command goes on where it was cut off. Prints Markdown: test Dice, Jaccard, HD95 and
ASD, of several structures their mean, and Wilcoxon's signed-rank test of Dice over test scans, each the mean over
seeds, corrected by Holm's method. For example

python benchmarks/strategies.py la grid.spacing_mm=2.5 grid.size=[64,64,48] synthesis.strip.probability=0
python benchmarks/strategies.py ixi --labelled 5 --label tissue grid.spacing_mm=4 grid.size=[48,64,64]
    data.classes=[background,csf,grey,white,hindbrain] data.largest=all
python benchmarks/strategies.py acdc --label label --scribble scribble grid.spacing_mm=[1.5,1.5,10]
    grid.size=[224,256,16] grid.patch=[128,128,16] data.classes=[background,right,myocardium,left] data.ignore=255
"""

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from shared import go_on_from

from onelabel.cluster import runtime
from onelabel.configs.load import load
from onelabel.configs.schema import RunConfig
from onelabel.orchestrator.driver import run
from onelabel.orchestrator.evaluate import evaluate
from onelabel.orchestrator.rounds import plan
from onelabel.orchestrator.statistics import compare, holm, interval

STRATEGIES = ("reciprocal", "curriculum", "mlbseg")
MEASURES = ("dice", "jaccard", "hd95_mm", "asd_mm")
_OWN = "[{type: synthetic, of: labelled, share: 0.5}, {type: real, of: labelled, share: 0.5}]"
_SUPERVISED = "{type: supervised, learning_rate: 1.0e-3, weight_decay: 1.0e-5, ema: 0.99}"

Ways = dict[str, list[str]]  # settings by name; the first is what the others are held against
Found = dict[str, np.ndarray]  # by name: (seeds, scans, measures)


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--base", type=int, default=3000, help="steps of the network that all go on from")
    parser.add_argument("--steps", type=int, default=3000, help="steps that follow")
    parser.add_argument("--labelled", type=int, help="labelled scans, of the pool if there are too few; default: all")
    parser.add_argument("--label", default="mask", help="column of the label files")
    parser.add_argument("--scribble", help="column of scribbles: compare what learns from them")
    parser.add_argument("--only", default=",".join(STRATEGIES), help="strategies")
    parser.add_argument("settings", nargs="*", help="key=value for all runs")
    options = parser.parse_intermixed_args()
    sources = _manifests(options)
    steps = (options.base, options.steps)
    ways = _scribbled(sources, sum(steps)) if options.scribble else _ways(sources, options.only.split(","), *steps)
    common = ["stages.*.expect.images=0", f"storage={options.storage}", *options.settings]
    with runtime.connect(load([*next(iter(ways.values())), *common]).compute):
        runs = [
            dict(_measured(ways, [*common, f"seed={seed}"], f"{options.data.resolve().name}-{seed}", sources["test"]))
            for seed in map(int, options.seeds.split(","))
        ]
    sys.stdout.write(_table({name: np.stack([one[name] for one in runs]) for name in ways}) + "\n")


def _manifests(options: argparse.Namespace) -> dict[str, Path]:
    """Manifests of the labelled scans, the others, all of them, the test scans, and of scribbles."""
    groups = defaultdict(list)
    with (options.data / "participants.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            groups["labelled" if row["split"] == "train" else row["split"]].append(row)
    every = groups["labelled"] + groups["unlabelled"]
    count = options.labelled or len(groups["labelled"])
    parts = {"labelled": every[:count], "unlabelled": every[count:], "all": every, "test": groups["test"]}
    columns = dict.fromkeys(parts, options.label)
    if options.scribble:
        parts["scribbled"], columns["scribbled"] = every, options.scribble
    folder = options.storage / f"{options.data.resolve().name}-manifests"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        files = [
            [row["key"], *((options.data / row[part]).resolve() for part in ("image", columns[name]))] for row in rows
        ]
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("key", "image", "label"), *files])
    return {name: folder / f"{name}.csv" for name in parts}


def _ways(sources: dict[str, Path], strategies: list[str], base: int, steps: int) -> Ways:
    """From a network of the labelled scans: on with them alone, with each strategy; and with all labels throughout."""
    first = [f"data.test={sources['test']}", f"stages.0={{steps: {base}, streams: {{train: {_OWN}}}}}"]
    plain = ["singlestrip", *first, "stages.*.ranker=null"]
    plain.append(f"stages.1={{rounds: 1, steps: {steps}, learner: {{ema: 0.99}}, streams: {{train: {_OWN}}}}}")
    pool = [f"data.labelled={sources['labelled']}", f"data.unlabelled={sources['unlabelled']}"]
    ways = {"labelled alone": [*plain, pool[0]]}
    for name in strategies:
        rounds = load([name, *pool]).stages[1].rounds
        learned = f"stages.1={{steps: {steps // rounds}, streams: {{labelled: {_OWN}}}}}"
        ways[name] = [name, *first, *pool, learned]
    return ways | {"all labels": [*plain, f"data.labelled={sources['all']}"]}


def _scribbled(sources: dict[str, Path], steps: int) -> Ways:
    """From the same scans: scribbles by partial cross-entropy or the strategy, and dense labels."""
    lines = ["scribsd", f"data.test={sources['test']}", f"stages.0.steps={steps}"]
    drawn = [*lines, f"data.labelled={sources['scribbled']}"]
    return {
        "partial cross-entropy": [*drawn, "stages.0.learner={distil_weight: 0, contrast_weight: 0}"],
        "scribsd": drawn,
        "all labels": [*lines, f"data.labelled={sources['all']}", f"stages.0.learner={_SUPERVISED}"],
    }


def _measured(ways: Ways, common: list[str], prefix: str, truth: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Measures (scans, measures) on the test scans, of all ways with one seed."""
    base: RunConfig | None = None
    for name, settings in ways.items():
        config = load([*settings, *common, f"name={prefix}-{name.replace(' ', '-')}"])
        if base and name in STRATEGIES:
            go_on_from(base, config)
        base = base or config
        run(config)
        masks = plan(config, Path(config.storage) / config.name)[-1].folder / "test-masks"
        yield name, _of_scans(masks, truth)


def _of_scans(masks: Path, truth: Path) -> np.ndarray:
    """Means over structures, by key; a scan without a mask is a miss."""
    scans = defaultdict(list)
    for row in evaluate(str(masks), str(truth)):
        if row["error"]:
            raise SystemExit(f"{row['key']}: {row['error']}")
        scans[row["key"]].append([row[name] for name in MEASURES])
    return np.array([np.mean(scans[key], axis=0) for key in sorted(scans)])


def _table(found: Found) -> str:
    """A row for each way."""
    base, *others = found
    scans = {name: values.mean(0) for name, values in found.items()}
    corrected = dict(
        zip(others, holm([compare(scans[name][:, 0], scans[base][:, 0]).p for name in others]), strict=True)
    )
    head = ["", "Dice", "95 %", "Jaccard", "HD95, mm", "ASD, mm", f"Dice - {base}", "p"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, values in scans.items():
        dice, jaccard, hd95, asd = values.mean(0)
        low, high = interval(values[:, 0].tolist())
        cells = [name, f"{dice:.4f}", f"{low:.4f} to {high:.4f}", f"{jaccard:.4f}", f"{hd95:.2f}", f"{asd:.2f}"]
        gain = dice - scans[base][:, 0].mean()
        cells += [f"{gain:+.4f}", f"{corrected[name]:.2g}"] if name in corrected else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Self-training from one label against training on all labels, on real heads.

python benchmarks/stripping.py DATA [--storage runs] [key=value ...]

DATA holds ixi/ (participants.csv with columns key, split, image, mask; splits labelled, unlabelled, test) and
contrasts/ (participants.csv with columns key, contrast, image, mask). Trains `singlestrip` from the one labelled scan
and `supervised` on the masks of the unlabelled pool for as many steps in all, scores every round on the test heads in
their own grids, strips the other contrasts with the last round's network, and prints Markdown. Runs resume where they
were cut off.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from shared import split

from onelabel.configs.load import load
from onelabel.configs.schema import RunConfig
from onelabel.orchestrator.driver import run
from onelabel.orchestrator.evaluate import evaluate, groups_of, summarise
from onelabel.tasks.strip import strip


def main() -> None:
    """Run, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--storage", default="runs")
    parser.add_argument("settings", nargs="*", help="key=value for both runs")
    options = parser.parse_intermixed_args()
    common = [f"storage={options.storage}", "compute.threads=2", *options.settings]
    one = load(
        [
            "singlestrip",
            "name=ixi-one-label",
            *split(options.data / "ixi", labelled="labelled", unlabelled="unlabelled", test="test"),
            *common,
        ]
    )
    steps = sum(stage.steps * stage.rounds for stage in one.stages)
    every = load(
        [
            "supervised",
            "name=ixi-all-labels",
            f"stages.0.steps={steps}",
            *split(options.data / "ixi", labelled="unlabelled", test="test"),
            *common,
        ]
    )
    sections = [_test_table(one, "one label"), _test_table(every, "all labels")]
    for config in (one, every):
        sections.append(_contrasts(config, options.data / "contrasts"))
    sys.stdout.write("\n\n".join(sections) + "\n")


def _test_table(config: RunConfig, title: str) -> str:
    columns = [f"{title}: round", "steps", "training, min", "test Dice mean", "worst", "HD95, mm"]
    columns += ["pool Dice mean", "selected Dice mean", "Spearman", "waiting for data"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    stages = [stage for stage in config.stages for _ in range(stage.rounds)]
    for stage, metrics in zip(stages, run(config).rounds, strict=True):
        test, pool, chosen = (metrics.get(name, {}) for name in ("test", "unlabelled", "selection"))
        cells: list[Any] = [metrics["stage"], stage.steps, _number(metrics["training"].get("seconds", np.nan) / 60, 1)]
        cells += [
            _number(test[key], places) for key, places in (("dice_mean", 4), ("dice_min", 4), ("hd95_mm_mean", 2))
        ]
        cells += [_number(part.get("dice_mean"), 4) for part in (pool, chosen)]
        cells += [
            _number(pool.get("rank_correlation"), 2),
            _number(100 * metrics["training"].get("wait_share", np.nan), 1) + " %",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _contrasts(config: RunConfig, data: Path) -> str:
    folder = Path(config.storage) / config.name
    out = folder / "contrasts"
    manifest = str(data / "participants.csv")
    strip([manifest], out=out, checkpoint=folder)
    rows = evaluate(str(out), manifest, groups=groups_of(manifest, "contrast"))
    lines = [f"| {config.name}: contrast | scans | Dice mean | worst |", "|---|---|---|---|"]
    parts = sorted(summarise(rows), key=lambda part: str(part["group"]))
    for part in parts + summarise([row | {"group": "all"} for row in rows]):
        lines.append(f"| {part['group']} | {part['scans']} | {part['dice']:.4f} | {part['worst']:.4f} |")
    return "\n".join(lines)


def _number(value: float | None, places: int) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.{places}f}"


if __name__ == "__main__":
    main()

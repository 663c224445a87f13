"""What a search costs beside its trials: 12 trials, of k and bins, against the sum of their distinct work.

python benchmarks/search.py DATA [--storage runs] [key=value ...]

DATA/ixi/participants.csv has columns key, split, image, mask. Searches the preset `search` stacked with `smoke`, from
the labelled scan and 20 others. The distinct work is every first stage once and every trial's later rounds: the seconds
that rounds took inside runs. Prints Markdown; the aim is a ratio of at most 1.3, and the exit code says if it is met.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

AIM = 1.3


def main() -> None:
    """Search, add up, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument("settings", nargs="*", help="key=value")
    options = parser.parse_intermixed_args()
    folder = options.storage / "search-cost"
    shutil.rmtree(folder, ignore_errors=True)
    manifest = options.data / "ixi" / "participants.csv"
    command = [sys.executable, "-m", "onelabel.orchestrator", "search", "search", "smoke", "stages.1.rounds=1"]
    command += [f"data.labelled={manifest}", "data.labelled.where.split=labelled"]
    command += [f"data.unlabelled={manifest}", "data.unlabelled.where.split=test"]
    begin = time.perf_counter()
    subprocess.run([*command, "name=search-cost", f"storage={options.storage}", *options.settings], check=True)
    wall = time.perf_counter() - begin
    shared, own = seconds(folder.glob("bases/*/round-*")), seconds(folder.glob("trials/*/round-*"))
    trials = len(list(folder.glob("trials/*/point.json")))
    lines = ["| part | runs | seconds |", "|---|---|---|", f"| whole search | {trials} trials | {wall:.1f} |"]
    lines.append(f"| shared first stages | {len(list(folder.glob('bases/base-*')))} | {shared:.1f} |")
    lines += [f"| rounds of trials | {trials} | {own:.1f} |", f"| **ratio** | | **{wall / (shared + own):.2f}** |"]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(wall > AIM * (shared + own))


def seconds(rounds: Iterable[Path]) -> float:
    """What rounds took in all; of those that a trial found done, only what it did itself."""
    return sum(json.loads((folder / "metrics.json").read_text())["seconds"]["round"] for folder in rounds)


if __name__ == "__main__":
    main()

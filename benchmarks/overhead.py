"""What orchestration costs: the wall time of a two-round run less training, scoring and the preparation of scans.

python benchmarks/overhead.py DATA [--storage runs] [key=value ...]

DATA/ixi/participants.csv has columns key, split, image, mask. Runs `singlestrip` stacked with `smoke` in a
process of its own, from the labelled scan and 20 others, and prints Markdown.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path


def main() -> None:
    """Run, subtract, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    parser.add_argument("settings", nargs="*", help="key=value")
    options = parser.parse_intermixed_args()
    folder = options.storage / "overhead"
    shutil.rmtree(folder, ignore_errors=True)
    manifest = options.data / "ixi" / "participants.csv"
    command = [sys.executable, "-m", "onelabel.orchestrator", "run", "singlestrip", "smoke", "stages.1.rounds=1"]
    command += [f"data.labelled={manifest}", "data.labelled.where.split=labelled"]
    command += [f"data.unlabelled={manifest}", "data.unlabelled.where.split=test"]
    begin = time.perf_counter()
    subprocess.run([*command, "name=overhead", f"storage={options.storage}", *options.settings], check=True)
    wall = time.perf_counter() - begin
    parts: Counter[str] = Counter()
    for metrics in folder.glob("round-*/metrics.json"):
        parts.update({kind: s for kind, s in json.loads(metrics.read_text())["seconds"].items() if kind != "round"})
    lines = ["| part | seconds |", "|---|---|", f"| whole process | {wall:.1f} |"]
    lines += [f"| {kind} | {seconds:.1f} |" for kind, seconds in sorted(parts.items())]
    lines.append(f"| **overhead** | **{wall - parts.total():.1f}** |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

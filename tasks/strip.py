"""Masks for many scans, in their own grids, with a table of what came of each; where it was cut off, it goes on."""

import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from onelabel import __version__
from onelabel.imaging import places
from onelabel.imaging.places import Folder
from onelabel.imaging.storage import AnyPath
from onelabel.models import checkpoint as checkpoints
from onelabel.models import quality
from onelabel.models.predictor import Predictor
from onelabel.tasks.remote import DESCRIPTION
from onelabel.tasks.strip_plan import Job, Where, check_apart, plan
from onelabel.tasks.strip_record import Outcome, Record
from onelabel.tasks.strip_worker import Row, Settings, Stripper

log = logging.getLogger(__name__)

Spread = Callable[[Sequence[Job], AnyPath | None, Settings, Folder], Iterator[Row]]


def strip(
    inputs: Sequence[str],
    /,
    *,
    out: str | Path,
    checkpoint: AnyPath | None = None,
    settings: Settings | None = None,
    where: Where | None = None,
    image: bool = False,
    distance: bool = False,
    overwrite: bool = False,
    spread: Spread | None = None,
) -> Outcome:
    """Write a mask for every scan that has none yet, and `strip.parquet`, which lists them.

    A scan that cannot be stripped is a row with an error. What an earlier call did is kept: an image whose mask is
    listed, there, and not older than the image is left alone, as long as the masks are made in the same way.

    Parameters
    ----------
    inputs : whatever `strip_plan.plan` takes, with `where`
    out : folder or URI; gets `<stem>_mask.nii.gz` for a file, the same tree as in the input for a folder, BIDS
        derivatives for a BIDS dataset
    checkpoint : a checkpoint folder, or that of a run; None: the one that comes with onelabel
    image, distance : also write the stripped image, or the signed distance to the mask's edge in mm
    overwrite : forget what was done before
    spread : yields the rows of jobs in any order; by default they are done in this process, one by one

    Raises
    ------
    DataError : an input without scans, two results of one name, results among the inputs, `out` not writable or made in
        another way.
    CheckpointError : no usable checkpoint.
    ClusterError : cuda without a GPU.
    """
    settings = settings or Settings()
    folder = Folder(_absolute(str(out)))
    jobs = plan(inputs, where=where, image=image, distance=distance)
    check_apart(inputs, jobs, folder)
    if isinstance(checkpoint, Path):
        checkpoint = checkpoint.expanduser().resolve()
    if checkpoint:
        checkpoint = checkpoints.find(checkpoint)  # now: a run that goes on has another one later
    known = checkpoint or checkpoints.DEFAULT
    quality.load(known, Predictor(known))
    record = Record(folder, _made(known, settings, image=image, distance=distance), overwrite=overwrite)
    try:
        pending = record.pending(jobs)
        if len(pending) < len(jobs):
            log.info("%d of %d scans are done already", len(jobs) - len(pending), len(jobs))
        if any(job.bids for job in jobs):
            _describe(inputs, folder)
        if pending:
            _collect((spread or in_process)(pending, checkpoint, settings, folder), record, len(pending))
        outcome = record.finish(jobs)
    finally:
        record.close()
    outcome.kept = len(jobs) - len(pending)
    return outcome


def in_process(jobs: Sequence[Job], checkpoint: AnyPath | None, settings: Settings, out: Folder, /) -> Iterator[Row]:
    """Strip scans one by one; yields their rows."""
    yield from map(Stripper(checkpoint, settings, out), jobs)


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


def _made(checkpoint: AnyPath, settings: Settings, *, image: bool, distance: bool) -> dict[str, Any]:
    """What must be the same for all results of a folder."""
    return {
        "checkpoint": checkpoints.digest(checkpoint),
        "border": settings.border_mm,
        "each frame": settings.each_frame,
        "trust": settings.trust,
        "image": image,
        "distance": distance,
    }


def _absolute(place: str) -> str:
    place = places.localised(place)
    return place.rstrip("/") if places.is_uri(place) else os.path.abspath(Path(place).expanduser())


def _collect(rows: Iterator[Row], record: Record, total: int) -> None:
    """Record rows as they come."""
    try:
        for number, row in enumerate(rows, 1):
            record.add(row)
            if row["error"]:
                log.warning("%d/%d %s: %s", number, total, row["key"], row["error"])
            else:
                log.info("%d/%d %s: %s", number, total, row["key"], _say(row))
    finally:
        record.flush()


def _say(row: Row) -> str:
    """A mask in words."""
    words = [f"{row['volume_ml']:.0f} ml"]
    if row["expected_dice"] is not None:
        words.append(f"expected Dice {row['expected_dice']:.3f}")
    if row["flag"]:
        words.append("look at it")
    seconds = sum(row[f"seconds_{phase}"] or 0 for phase in ("load", "predict", "trust", "save"))
    return ", ".join([*words, f"{seconds:.1f} s"])


def _describe(inputs: Sequence[str], out: Folder) -> None:
    """Say of a folder with results of BIDS datasets what it is, as BIDS wants it."""
    facts = {
        "Name": "Brain masks by onelabel",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "onelabel", "Version": __version__}],
        "SourceDatasets": [{"URL": _absolute(source)} for source in inputs],
        "DatasetLinks": {"raw": _absolute(inputs[0])},
    }
    with out.writing(DESCRIPTION) as file:
        file.write_text(json.dumps(facts, indent=2) + "\n")

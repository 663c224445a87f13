"""Masks against the truth, scan by scan."""

import glob
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from onelabel.errors import SCAN_FAULTS, DataError, sentence
from onelabel.imaging import metrics, volume
from onelabel.imaging.volume import Volume
from onelabel.tasks.cohort import IMAGE_ENDINGS, LABEL_ENDINGS, LABEL_FOLDERS, open_cohort
from onelabel.tasks.strip import stem, write_table

log = logging.getLogger(__name__)

MEASURES = ("dice", "jaccard", "hd95_mm", "asd_mm", "volume_mm3", "truth_volume_mm3")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "prediction", "truth")),
        *((name, pa.float64()) for name in MEASURES),
        ("miss", pa.bool_()),
        ("error", pa.string()),
    ]
)
_ENDINGS = (*LABEL_ENDINGS, "_brain")
_NAMED = 20  # in a warning
_MANIFESTS = (".csv", ".tsv", ".parquet")

Row = dict[str, Any]


def evaluate(predictions: str, truth: str, /) -> list[Row]:
    """Compare masks that have the same key: the file's name without ending, `_mask`, `_label`, `_seg` or `_brain`.

    Parameters
    ----------
    predictions, truth : a folder, a glob, a manifest or one file each

    Returns
    -------
    One row a truth as in `SCHEMA`, by key. A truth without a prediction is measured against an empty mask and is a
    miss; masks on different grids are a row with an error.

    Raises
    ------
    DataError : no masks on one side, two of one key, or no key on both sides.
    """
    ours, theirs = masks(predictions), masks(truth)
    if len(ours) == len(theirs) == 1 and Path(predictions).is_file() and Path(truth).is_file():
        ours = dict(zip(theirs, ours.values(), strict=True))
    if not ours.keys() & theirs.keys():
        raise DataError(
            f"no mask in {predictions} has the name of one in {truth}: '{min(ours)}' there, '{min(theirs)}' here"
        )
    alone = sorted(ours.keys() - theirs.keys())
    if alone:
        log.warning("%d predictions have no truth and are left out: %s", len(alone), ", ".join(alone[:_NAMED]))
    return [_compare(key, ours.get(key), theirs[key]) for key in sorted(theirs)]


def summarise(rows: Sequence[Row], /) -> dict[str, dict[str, float]]:
    """Mean, median and worst of dice, hd95_mm and asd_mm over all rows without an error, misses included."""
    sound = [row for row in rows if row["error"] is None]
    figures = {}
    for name, worst in (("dice", np.min), ("hd95_mm", np.max), ("asd_mm", np.max)):
        values = np.array([row[name] for row in sound])
        if values.size:
            figures[name] = {
                "mean": float(values.mean()),
                "median": float(np.median(values)),
                "worst": float(worst(values)),
            }
    return figures


def check_target(path: Path, /) -> None:
    """Refuse the name of a table that cannot be written, before the work."""
    if path.suffix not in (".parquet", ".csv"):
        raise DataError(f"'{path}' cannot be written: the name must end in .parquet or .csv")


def write(rows: Sequence[Row], path: Path, /) -> None:
    """Write the rows as Parquet or CSV."""
    check_target(path)
    write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), path)


def masks(source: str, /) -> dict[str, Path]:
    """Mask files by key.

    In a folder (or glob) that holds scans too, the masks are those named like one, or under `masks/` or `labels/`. Of a
    manifest the label column counts, or the images where a row has no label.
    """
    path = Path(source)
    if path.suffix in _MANIFESTS:
        found = [(_short(row["key"]), Path(row["label"] or row["image"])) for row in open_cohort(path).rows()]
    else:
        found = _with_keys(_without_scans(_files(path)), path)
    if not found:
        raise DataError(f"{source} holds no masks: give a folder, a glob, a manifest or one file")
    double = [key for key, count in Counter(key for key, _ in found).items() if count > 1]
    if double:
        names = " and ".join(str(file) for key, file in found if key == double[0])
        raise DataError(f"{names} have the same key '{double[0]}': choose by a manifest with a column `key`")
    return dict(found)


def _compare(key: str, prediction: Path | None, truth: Path) -> Row:
    row: Row = dict.fromkeys(SCHEMA.names) | {"key": key, "truth": str(truth)}
    row["prediction"] = None if prediction is None else str(prediction)
    try:
        true = volume.load(truth, labels=True)
        if prediction is None:
            found = Volume(np.zeros_like(true.data), true.affine)
        else:
            found = volume.load(prediction, labels=True)
            _same_grid(found, true)
        row |= metrics.evaluate(found.data, true.data, true.spacing_mm)
        row["miss"] = row["miss"] or prediction is None
    except SCAN_FAULTS as error:
        row["error"] = sentence(error)
    return row


def _same_grid(one: Volume, other: Volume) -> None:
    """Equal shapes, and no voxel more than a tenth of a voxel elsewhere."""
    if one.shape != other.shape:
        raise DataError(f"the prediction has shape {one.shape}, the truth {other.shape}: resample one to the other")
    shift_mm = float((np.abs(one.affine - other.affine) @ [*one.shape, 1]).max())
    if shift_mm > 0.1 * min(other.spacing_mm):
        raise DataError(f"the prediction lies up to {shift_mm:.3g} mm from the truth: resample one to the other")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    candidates: Iterable[Path] = path.rglob("*")
    if not path.is_dir():
        candidates = (Path(match) for match in glob.glob(str(path), recursive=True))
    return sorted(
        file for file in candidates if file.name.endswith(IMAGE_ENDINGS) and file.is_file() and file.name[0] != "."
    )


def _without_scans(files: Sequence[Path]) -> Sequence[Path]:
    """The files that are named like masks, or all where none is."""
    named = [file for file in files if stem(file).endswith(LABEL_ENDINGS) or file.parent.name in LABEL_FOLDERS]
    keys = {_short(stem(file)) for file in named}
    others = [str(file) for file in files if file not in named and _short(stem(file)) not in keys]
    if named and others:
        log.warning("%d files not named like masks are left out: %s", len(others), ", ".join(others[:_NAMED]))
    return named or files


def _with_keys(files: Sequence[Path], root: Path) -> list[tuple[str, Path]]:
    """Keys from names, and from folders too where files in different folders share a name."""
    count = Counter(_short(stem(file)) for file in files)
    found = []
    for file in files:
        key = _short(stem(file))
        if count[key] > 1:
            base = root if root.is_dir() else Path(*root.parts[: _fixed_parts(root)])
            key = "_".join((*file.parent.relative_to(base).parts, key))
        found.append((key, file))
    return found


def _fixed_parts(pattern: Path) -> int:
    """How many leading parts of a glob hold no wildcard."""
    return next((i for i, part in enumerate(pattern.parts) if glob.has_magic(part)), len(pattern.parts))


def _short(name: str) -> str:
    """A name without the ending that says that it is a mask."""
    return next((name.removesuffix(end) for end in _ENDINGS if name.endswith(end) and name != end), name)

"""Masks against the truth, scan by scan and class by class; systems against each other."""

import glob
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from onelabel.errors import SCAN_FAULTS, DataError, sentence
from onelabel.imaging import metrics, places, volume
from onelabel.imaging.storage import AnyPath, path_of
from onelabel.imaging.volume import Volume
from onelabel.orchestrator.statistics import compare, holm, interval
from onelabel.tasks import remote
from onelabel.tasks.cohort import open_cohort
from onelabel.tasks.sources import LABEL_ENDINGS, LABEL_FOLDERS, manifest_rows, stem_of
from onelabel.tasks.strip import write_table
from onelabel.tasks.strip_plan import stem

log = logging.getLogger(__name__)

MEASURES = ("dice", "jaccard", "hd95_mm", "asd_mm", "volume_mm3", "truth_volume_mm3")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "prediction", "truth")),
        *((name, pa.float64()) for name in MEASURES),
        ("miss", pa.bool_()),
        ("error", pa.string()),
        ("volume_difference_percent", pa.float64()),
        *((name, pa.string()) for name in ("class", "group", "system")),
    ]
)
FOREGROUND = "foreground"
COMPARED = ("dice", "hd95_mm")
_AVERAGED = ("dice", "hd95_mm", "asd_mm", "volume_difference_percent")
_ENDINGS = (*LABEL_ENDINGS, "_brain")
_NAMED = 20  # in a warning
_MANIFESTS = (".csv", ".tsv", ".parquet")

Row = dict[str, Any]


def evaluate(
    predictions: str, truth: str, /, *, groups: Mapping[str, str] | None = None, system: str | None = None
) -> list[Row]:
    """Compare masks that have the same key: the file's name without ending, `_mask`, `_label`, `_seg` or `_brain`.

    Parameters
    ----------
    predictions, truth : a folder, a glob, a manifest or one file each
    groups : group of a key; system : name of what made the predictions. Both only stand in the rows.

    Returns
    -------
    One row a truth as in `SCHEMA`, by key; where one of the two masks holds several labels, one for each label. A truth
    without a prediction is measured against an empty mask and is a miss; masks on different grids are a row with an
    error.

    Raises
    ------
    DataError : no masks on one side, two of one key, or no key on both sides.
    """
    ours, theirs = masks(predictions), masks(truth)
    if len(ours) == len(theirs) == 1 and path_of(predictions).is_file() and path_of(truth).is_file():
        ours = dict(zip(theirs, ours.values(), strict=True))
    if not ours.keys() & theirs.keys():
        raise DataError(
            f"no mask in {predictions} has the name of one in {truth}: '{min(ours)}' there, '{min(theirs)}' here"
        )
    alone = sorted(ours.keys() - theirs.keys())
    if alone:
        log.warning("%d predictions have no truth and are left out: %s", len(alone), ", ".join(alone[:_NAMED]))
    named = {"system": system}
    return [
        row | named | {"group": (groups or {}).get(key)}
        for key in sorted(theirs)
        for row in _compare(key, ours.get(key), theirs[key])
    ]


def groups_of(truth: str, column: str, /) -> dict[str, str]:
    """The group of each key, from a column of the truth's manifest.

    Raises
    ------
    DataError : the truth is no manifest, or has no such column.
    """
    if path_of(truth).suffix not in _MANIFESTS:
        raise DataError(f"{truth} is no manifest (CSV, TSV or Parquet): groups are read from a column of one")
    with places.fetched(truth) as file:
        listed = manifest_rows(file)
    names = sorted({name for row in listed for name in row})
    if column not in names:
        raise DataError(f"{truth} has no column '{column}': it has {', '.join(names)}")
    rows = open_cohort(truth).rows()
    return {_short(row["key"]): str(other[column]) for row, other in zip(rows, listed, strict=True)}


def summarise(rows: Sequence[Row], /) -> list[dict[str, Any]]:
    """What the rows of each system, class and group come to, misses included, rows with an error left out.

    Returns
    -------
    One row each with scans, misses, the mean of Dice with its 95 % bootstrap interval (low, high), its median and
    worst, and the means of HD95, ASD and volume difference
    """
    parts: dict[tuple[str | None, ...], list[Row]] = {}
    for row in rows:
        if row["error"] is None:
            parts.setdefault((row["system"], row["class"], row["group"]), []).append(row)
    found = []
    for (system, label, group), part in parts.items():
        values = {name: np.array([row[name] for row in part], float) for name in SCHEMA.names if name in _AVERAGED}
        dice = values["dice"]
        low, high = interval(dice.tolist())
        found.append(
            {"system": system, "class": label, "group": group, "scans": len(part)}
            | {"misses": sum(bool(row["miss"]) for row in part), "dice": float(dice.mean()), "low": low, "high": high}
            | {"median": float(np.median(dice)), "worst": float(dice.min())}
            | {name: _mean(values[name]) for name in _AVERAGED if name != "dice"}
        )
    return found


def compare_systems(rows: Sequence[Row], /) -> list[dict[str, Any]]:
    """Each pair of systems on the scans that both were measured on, for each class: Wilcoxon's signed-rank test.

    Returns
    -------
    One row a pair, class and measure: first, second, class, measure, scans, difference (median, first less second),
    p, effect (rank-biserial), and p_holm, corrected for all rows of the table
    """
    values: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["error"] is None:
            values.setdefault((row["system"], row["class"]), {})[row["key"]] = row
    found = []
    for ((first, label), ours), ((second, other), theirs) in combinations(values.items(), 2):
        keys = sorted(ours.keys() & theirs.keys())
        if label != other or first == second or not keys:
            continue
        for measure in COMPARED:
            result = compare([ours[key][measure] for key in keys], [theirs[key][measure] for key in keys])
            found.append({"first": first, "second": second, "class": label, "measure": measure} | asdict(result))
    return [row | {"p_holm": p} for row, p in zip(found, holm([row["p"] for row in found]), strict=True)]


def check_target(path: Path, /) -> None:
    """Refuse the name of a table that cannot be written, before the work."""
    if path.suffix not in (".parquet", ".csv"):
        raise DataError(f"'{path}' cannot be written: the name must end in .parquet or .csv")


def write(rows: Sequence[Row], path: Path, /) -> None:
    """Write the rows as Parquet or CSV."""
    check_target(path)
    write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), path)


def masks(source: str, /) -> dict[str, AnyPath]:
    """Mask files by key.

    In a folder (or glob) that holds scans too, the masks are those named like one, or under `masks/` or `labels/`. Of a
    manifest the label column counts, or the images where a row has no label.
    """
    path = path_of(source)
    found: list[tuple[str, AnyPath]]
    if path.suffix in _MANIFESTS:
        found = [(_short(row["key"]), path_of(row["label"] or row["image"])) for row in open_cohort(source).rows()]
    elif isinstance(path, Path):
        found = [(key, Path(file)) for key, file in _with_keys(_without_scans(_files(path)), _base(path))]
    else:
        files = {PurePosixPath("/", file.inside): file for file in remote.files(path)}
        named = _with_keys(_without_scans([*files]), _base(PurePosixPath("/", path.inside)))
        found = [(key, files[PurePosixPath(file)]) for key, file in named]
    if not found:
        raise DataError(f"{source} holds no masks: give a folder, a glob, a manifest or one file")
    double = [key for key, count in Counter(key for key, _ in found).items() if count > 1]
    if double:
        names = " and ".join(str(file) for key, file in found if key == double[0])
        raise DataError(f"{names} have the same key '{double[0]}': choose by a manifest with a column `key`")
    return dict(found)


def scans(source: str, /) -> dict[str, AnyPath]:
    """Scans by the key that their masks would have."""
    return {_short(row["key"]): path_of(row["image"]) for row in open_cohort(source).rows()}


def _compare(key: str, prediction: AnyPath | None, truth: AnyPath) -> list[Row]:
    row: Row = dict.fromkeys(SCHEMA.names) | {"key": key, "truth": str(truth)}
    row["prediction"] = None if prediction is None else str(prediction)
    try:
        true = volume.load(truth, labels=True)
        if prediction is None:
            found = Volume(np.zeros_like(true.data), true.affine)
        else:
            found = volume.load(prediction, labels=True)
            _same_grid(found, true)
        return [
            row | {"class": name} | _measure(ours, theirs, true.spacing_mm, missing=prediction is None)
            for name, ours, theirs in _by_class(found.data, true.data)
        ]
    except SCAN_FAULTS as error:
        return [row | {"error": sentence(error)}]


def _by_class(found: np.ndarray, true: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Masks of each label of either; where neither holds several, of all that is not zero, whatever its number."""
    ours, theirs = (set(np.unique(data).tolist()) - {0} for data in (found, true))
    if max(len(ours), len(theirs)) <= 1:
        yield FOREGROUND, found != 0, true != 0
        return
    for label in sorted(ours | theirs):
        yield str(label), found == label, true == label


def _measure(found: np.ndarray, true: np.ndarray, spacing_mm: Sequence[float], *, missing: bool) -> Row:
    measured: Row = metrics.evaluate(found, true, spacing_mm)
    volume_mm3 = measured["truth_volume_mm3"]
    difference = 100 * (measured["volume_mm3"] - volume_mm3) / volume_mm3 if volume_mm3 else None
    return measured | {"volume_difference_percent": difference, "miss": measured["miss"] or missing}


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


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
    return sorted(file for file in candidates if stem_of(file) and file.is_file() and file.name[0] != ".")


def _without_scans(files: Sequence[PurePath]) -> Sequence[PurePath]:
    """The files that are named like masks, or all where none is."""
    named = [file for file in files if stem(file).endswith(LABEL_ENDINGS) or file.parent.name in LABEL_FOLDERS]
    keys = {_short(stem(file)) for file in named}
    others = [str(file) for file in files if file not in named and _short(stem(file)) not in keys]
    if named and others:
        log.warning("%d files not named like masks are left out: %s", len(others), ", ".join(others[:_NAMED]))
    return named or files


def _with_keys(files: Sequence[PurePath], base: PurePath) -> list[tuple[str, PurePath]]:
    """Keys from names, and from folders below base too where files in different folders share a name."""
    count = Counter(_short(stem(file)) for file in files)
    found = []
    for file in files:
        key = _short(stem(file))
        if count[key] > 1:
            key = "_".join((*file.parent.relative_to(base).parts, key))
        found.append((key, file))
    return found


def _base(source: PurePath) -> PurePath:
    """A folder itself; of a glob, the leading parts that hold no wildcard."""
    if isinstance(source, Path) and source.is_dir():
        return source
    fixed = next((i for i, part in enumerate(source.parts) if glob.has_magic(part)), len(source.parts))
    return type(source)(*source.parts[:fixed])


def _short(name: str) -> str:
    """A name without the ending that says that it is a mask."""
    return next((name.removesuffix(end) for end in _ENDINGS if name.endswith(end) and name != end), name)

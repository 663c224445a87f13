"""Cohorts: the table of scans that passes between stages, and the ways to come by one.

One row a scan: ``key, image, label, kind, weight``, and after scoring ``score, volume_mm3, error``. Paths are absolute.
"""

import csv
import glob
import json
import logging
import os
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from bids2table import index_dataset

from onelabel.errors import DataError
from onelabel.imaging.places import localised

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("image", pa.string()),
        pa.field("label", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("weight", pa.float64()),
    ]
)
SCORED = {"score": pa.float64(), "volume_mm3": pa.float64(), "error": pa.string()}
KINDS = ("dense", "scribble", "pseudo", "none")
PROBABILITY = "probability"  # of pseudo-labels that are one: 0 to 255 (no manifest has them)

IMAGE_ENDINGS = (".nii.gz", ".nii", ".mgz", ".mgh", ".hdr", ".mnc", ".HEAD", ".PAR")  # of a pair, the header
LABEL_ENDINGS = ("_brain_mask", "_brainmask", "_mask", "_label", "_seg")  # the longest that fits comes first
IMAGE_FOLDERS = ("image", "images", "t1", "imagesTr")
LABEL_FOLDERS = ("mask", "masks", "label", "labels", "labelsTr")
IMAGE_COLUMNS = ("image", "path", "file")
LABEL_COLUMNS = ("label", "mask", "seg", "segmentation")
BIDS_LABEL_SUFFIXES = ("mask", "dseg", "probseg", "defacemask")

Row = dict[str, Any]  # a manifest's row: whatever columns it has
Pairs = dict[Path, list[Path]]  # an image and the label files that go with it


@dataclass(frozen=True)
class Cohort:
    """A table of scans, one row each, with unique keys.

    Attributes
    ----------
    table : pyarrow.Table
        The columns of `SCHEMA`; those of `SCORED` and any others may follow.
    """

    table: pa.Table

    def __post_init__(self) -> None:
        for field in SCHEMA:
            if field.name not in self.table.column_names:
                raise DataError(f"A cohort has the columns {self.table.column_names}: '{field.name}' is missing.")
            if self.table.schema.field(field.name).type != field.type:
                raise DataError(f"The cohort's column '{field.name}' must be of type {field.type}.")
        double = [key for key, count in Counter(self.table["key"].to_pylist()).items() if count > 1]
        if double:
            raise DataError(f"{_some(double)} stand in more than one row: each scan needs a key of its own.")

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def rows(self) -> list[Row]:
        """One dictionary a scan."""
        return list(self.table.to_pylist())

    def join(self, columns: pa.Table, /) -> "Cohort":
        """Add or replace columns.

        Parameters
        ----------
        columns : pyarrow.Table
            With a column ``key``, in any order; scans that it lacks get nulls.
        """
        unknown = set(columns["key"].to_pylist()) - set(self.table["key"].to_pylist())
        if unknown:
            raise DataError(f"{_some(sorted(unknown))} are not in the cohort: join results of the same scans.")
        matched = columns.take(pc.index_in(self.table["key"], columns["key"].combine_chunks()))
        table = self.table
        for name in matched.column_names:
            if name in table.column_names and name != "key":
                table = table.set_column(table.column_names.index(name), name, matched[name])
            elif name != "key":
                table = table.append_column(name, matched[name])
        return Cohort(table)

    @classmethod
    def read(cls, path: str | Path, /) -> "Cohort":
        """Read what `write` wrote."""
        return cls(_read_parquet(Path(path)))

    def write(self, path: str | Path, /) -> None:
        """Write a Parquet file: it appears under its name only when it is complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{uuid.uuid4().hex}.parquet")
        try:
            pq.write_table(self.table, unfinished)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def open_cohort(
    source: str | Path,
    /,
    *,
    where: Mapping[str, str | Sequence[str]] | None = None,
    label_column: str | None = None,
    require_labels: bool = False,
) -> Cohort:
    """Find the scans that a source names.

    Parameters
    ----------
    source : str or Path
        A CSV, TSV or Parquet manifest with a column ``image`` (paths relative to the manifest), a folder, a glob, one
        image, or the root of a BIDS dataset. Beside manifests, labels are found by name: ``x_mask.nii.gz`` (or _label,
        _seg, _brainmask, _brain_mask) belongs to ``x.nii.gz``, ``masks/x.nii.gz`` to ``images/x.nii.gz``, and in BIDS
        a brain mask under ``derivatives`` to the image of the same entities.
    where : mapping, optional
        Keep the rows whose columns equal these values, or one of them, such as ``{"split": "test"}``; in BIDS the
        entities are columns, and only anatomical images count unless a suffix or datatype is asked for.
    label_column : str, optional
        The column with the label files, where it is not called label, mask, seg or segmentation.
    require_labels : bool
        Every scan must have a label, and both files must exist.

    Raises
    ------
    DataError
        There is no such source, nothing in it, a column or label is missing, keys are not unique, or a name is no text.
    """
    path = Path(source).expanduser().absolute()
    rows = _find_rows(path, source, any_type=bool({"suffix", "datatype"} & set(where or ())))
    columns = sorted({name for row in rows for name in row})
    rows = keep(rows, where or {}, path)

    image_column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image_column is None:
        _check_column(IMAGE_COLUMNS[0], columns, path)
    if label_column is None:
        label_column = next((name for name in LABEL_COLUMNS if name in columns), None)
    else:
        _check_column(label_column, columns, path)
    folder = path if path.is_dir() else path.parent
    table = [_normalised(row, image_column, label_column, folder) for row in rows]
    _fill_keys(table)
    if require_labels:
        _check_labels(table, path)
    present = pa.schema([*SCHEMA, *(pa.field(name, kind) for name, kind in SCORED.items() if name in columns)])
    try:
        return Cohort(pa.Table.from_pylist(table, schema=present))
    except UnicodeEncodeError as error:
        raise DataError(f"{ascii(error.object)} is no text in UTF-8: rename the file.") from None


def keep(rows: list[Row], where: Mapping[str, str | Sequence[str]], source: str | Path, /) -> list[Row]:
    """The rows whose columns have the values that are asked for; see `open_cohort`."""
    for name, value in where.items():
        _check_column(name, sorted({name for row in rows for name in row}), source)
        wanted, values = [value] if isinstance(value, str) else [*map(str, value)], {str(row.get(name)) for row in rows}
        rows = [row for row in rows if str(row.get(name)) in wanted]
        if not rows:
            raise DataError(f"No scan in {source} has '{name}' = {_some(wanted)}: it holds {_some(sorted(values))}.")
    return rows


def _find_rows(path: Path, source: str | Path, *, any_type: bool) -> list[Row]:
    """Rows of whatever kind of source this is."""
    if path.suffix == ".img" and path.with_suffix(".hdr").is_file():
        path = path.with_suffix(".hdr")
    if not path.exists():
        matches = glob.glob(str(path), recursive=True) if glob.has_magic(str(path)) else []
        rows = _as_rows(_pair_by_ending(_images(matches)))
        problem = "matches no image" if glob.has_magic(str(path)) else "does not exist"
    elif path.suffix in {".csv", ".tsv", ".parquet"}:
        rows = manifest_rows(path)
        problem = "lists no scan"
    elif path.is_file():
        rows = _as_rows({path: _pair_by_ending([path]).get(path, [])} if _stem(path) else {})
        problem = "is neither an image nor a manifest"
    elif (path / "dataset_description.json").is_file():
        rows = _bids_rows(path, any_type=any_type)
        problem = f"is a BIDS dataset without {'' if any_type else 'anatomical '}images"
    else:
        rows = _as_rows(_pair_by_folder(path) or _pair_by_ending(_images(path.rglob("*"))))
        problem = "is a folder without images"
    if not rows:
        raise DataError(
            f"{source} {problem}: give a manifest (.csv, .tsv, .parquet), a folder, a glob, a BIDS dataset or an image "
            f"({', '.join(IMAGE_ENDINGS)})."
        )
    return rows


def manifest_rows(path: Path, /) -> list[Row]:
    """Rows of a CSV, TSV or Parquet file; in text files all values are strings, and empty or n/a is null."""
    if path.suffix == ".parquet":
        return list(_read_parquet(path).to_pylist())
    delimiter = "\t" if path.suffix == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file, delimiter=delimiter), [])
        if len(set(names)) < len(names):
            raise DataError(f"{path} has two columns of one name in {names}: rename one.")
        table = pa.csv.read_csv(
            path,
            parse_options=pa.csv.ParseOptions(delimiter=delimiter),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), null_values=["", "n/a"], strings_can_be_null=True
            ),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table ({error}): repair it.") from error
    return list(table.to_pylist())


def _read_parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as a Parquet table ({error}): write it again.") from error


def _bids_rows(root: Path, *, any_type: bool) -> list[Row]:
    """Images of a BIDS dataset with their entities, and the brain masks of its derivatives."""
    masks = defaultdict(list)
    for pipeline in sorted(path for path in root.glob("derivatives/*") if any(path.glob("sub-*"))):
        for entities in index_dataset(pipeline).to_pylist():
            native_brain = (
                entities["space"] is None and entities["label"] is None and entities["desc"] in (None, "brain")
            )
            if entities["suffix"] == "mask" and entities["ext"] in IMAGE_ENDINGS and native_brain:
                masks[_bids_identity(entities)].append((entities["mod"], pipeline / entities["path"]))

    images = [
        entities
        for entities in (index_dataset(root).to_pylist() if any(root.glob("sub-*")) else [])
        if is_bids_image(entities, any_type=any_type)
    ]
    contrasts = defaultdict(set)
    for entities in images:
        contrasts[_bids_identity(entities)].add(entities["suffix"])
    rows = []
    for entities in images:
        identity, suffix = _bids_identity(entities), entities["suffix"]
        # A mask that names no contrast was made on the T1-weighted image, or on the only one there is.
        default = "T1w" if "T1w" in contrasts[identity] else suffix if len(contrasts[identity]) == 1 else None
        labels = [path for contrast, path in masks[identity] if (contrast or default) == suffix]
        pair = _as_rows({root / entities["path"]: labels})[0]
        rows.append({name: value for name, value in entities.items() if name not in {"path", "root", "dataset"}} | pair)
    return rows


def is_bids_image(entities: Row, /, *, any_type: bool = False) -> bool:
    """Whether these are the entities of an image, and of an anatomical one unless `any_type`."""
    return (
        (any_type or entities.get("datatype") == "anat")
        and entities.get("ext") in IMAGE_ENDINGS
        and entities.get("suffix") not in BIDS_LABEL_SUFFIXES
    )


def _bids_identity(entities: Row) -> str:
    """What an image and its mask have in common: all entities but those that say what kind of file it is."""
    kind = {"mod", "space", "label", "desc", "res", "suffix", "ext", "dataset", "root", "path", "extra_entities"}
    return json.dumps({name: value for name, value in entities.items() if name not in kind and value is not None})


def _pair_by_folder(root: Path) -> Pairs:
    """Pair files of equal names under two folders such as images/ and masks/; empty without two such folders."""
    label_folders = [root / name for name in LABEL_FOLDERS if (root / name).is_dir()]
    image_folders = [root / name for name in IMAGE_FOLDERS if (root / name).is_dir()]
    if not label_folders or not image_folders:
        return {}
    labels = defaultdict(list)
    for folder in label_folders:
        for path in _images(folder.rglob("*")):
            labels[path.parent.relative_to(folder) / _stem(path)].append(path)
    return {
        path: labels[path.parent.relative_to(folder) / _stem(path)]
        for folder in image_folders
        for path in _images(folder.rglob("*"))
    }


def _pair_by_ending(paths: Sequence[Path]) -> Pairs:
    """Pair x.nii.gz with x_mask.nii.gz, looking in the files' folders too; a label without image is left out."""
    pool = {path.with_name(_stem(path)) for path in paths}
    beside = sorted({other for folder in {path.parent for path in paths} for other in _images(folder.iterdir())})
    labels = defaultdict(list)
    for path in beside:
        stem = _stem(path)
        bases = [stem.removesuffix(ending) for ending in LABEL_ENDINGS if stem.endswith(ending)]
        base = next((base for base in bases if path.with_name(base) in pool), None)
        if base is not None:
            labels[path.with_name(base)].append(path)
    return {path: labels[path.with_name(_stem(path))] for path in paths if not _stem(path).endswith(LABEL_ENDINGS)}


def _as_rows(pairs: Pairs) -> list[Row]:
    """Rows with at most one label each."""
    for image, labels in pairs.items():
        if len(labels) > 1:
            names = " and ".join(str(path) for path in labels)
            raise DataError(f"{image} has more than one label, {names}: choose by a manifest, or move one away.")
    return [{"image": str(image), "label": str(labels[0]) if labels else None} for image, labels in pairs.items()]


def _images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files among paths, in order; hidden ones are unfinished or a file system's own."""
    found = (Path(path) for path in paths)
    return sorted(path for path in found if _stem(path) and not path.name.startswith(".") and path.is_file())


def _stem(path: Path) -> str:
    """A file's name without its ending, empty if it is no image."""
    return next((path.name.removesuffix(end) for end in IMAGE_ENDINGS if path.name.endswith(end)), "")


def _normalised(row: Row, image_column: str | None, label_column: str | None, folder: Path) -> Row:
    """A row with the cohort's columns; the key may still be missing."""
    image, label = row[image_column or ""], row[label_column] if label_column else None
    if not image:
        raise DataError(f"A row of {folder} has no image ({row}): give each its path.")
    try:
        numbers = {name: float(row[name]) for name in ("weight", "score", "volume_mm3") if row.get(name) is not None}
    except ValueError as error:
        raise DataError(f"'{image}' has weight, score or volume_mm3 that is no number: {error}.") from error
    kind = row.get("kind") or ("dense" if label else "none")
    if kind not in KINDS:
        raise DataError(f"'{image}' is of kind '{kind}': it must be one of {', '.join(KINDS)}.")
    return {
        **{name: row.get(name) for name in SCORED},
        "weight": 1.0,
        **numbers,
        "key": row.get("key"),
        "image": localised(image) if "://" in image else os.path.normpath(folder / image),
        "label": os.path.normpath(folder / label) if label else None,
        "kind": kind,
    }


def _fill_keys(rows: list[Row]) -> None:
    """Name scans without a key by their file, and by their folders too where files share a name."""
    unnamed = [row for row in rows if row["key"] is None]
    for row in unnamed:
        row["key"] = _stem(Path(row["image"])) or Path(row["image"]).stem
    count = Counter(row["key"] for row in rows)
    repeated = [row for row in unnamed if count[row["key"]] > 1]
    if repeated:
        root = os.path.commonpath([os.path.dirname(row["image"]) for row in repeated])
        for row in repeated:
            folders = Path(row["image"]).parent.relative_to(root).parts
            row["key"] = "_".join((*folders, row["key"]))
    for row in rows:
        row["key"] = str(row["key"])
        if not row["key"].strip(".") or set(row["key"]) & set("/\\\0"):
            raise DataError(
                f"'{row['key']}' cannot be the key of {row['image']}: results are named by it, so no slashes."
            )


def _check_labels(rows: Sequence[Row], path: Path) -> None:
    without = [row["key"] for row in rows if row["label"] is None]
    if without:
        raise DataError(f"{_some(without)} of {path} have no label: each scan here needs one.")
    lost = [name for row in rows for name in (row["image"], row["label"]) if not Path(name).is_file()]
    if lost:
        raise DataError(f"{_some(lost)}, named by {path}, do not exist: correct the paths.")


def _check_column(name: str, columns: Sequence[str], path: str | Path) -> None:
    if name not in columns:
        near = get_close_matches(name, columns, n=1, cutoff=0)
        raise DataError(f"{path} has no column '{name}': did you mean '{near[0]}' of {_some(columns)}?")


def _some(names: Sequence[str]) -> str:
    """Up to five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more

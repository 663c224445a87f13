"""Cohorts: the table of scans that passes between stages, and the ways to come by one.

One row a scan: ``key, image, label, kind, weight``, and after scoring ``score, volume_mm3, error``. Paths are absolute.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onelabel.errors import DataError
from onelabel.imaging import places, storage
from onelabel.imaging.storage import AnyPath, StorePath
from onelabel.tasks import remote, sources
from onelabel.tasks.sources import IMAGE_COLUMNS, LABEL_COLUMNS, Row, check_column, keep, read_parquet, some, stem_of

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
        _check_keys(self.table["key"].to_pylist())

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
            raise DataError(f"{some(sorted(unknown))} are not in the cohort: join results of the same scans.")
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
        return cls(read_parquet(Path(path)))

    def write(self, path: str | Path, /) -> None:
        """Write a Parquet file: it appears under its name only when it is complete."""
        with storage.writing(Path(path)) as unfinished:
            pq.write_table(self.table, unfinished)


def open_cohort(
    source: str | Path,
    /,
    *,
    where: Mapping[str, str | Sequence[str]] | None = None,
    label_column: str | None = None,
    require_labels: bool = False,
) -> Cohort:
    """The scans that a source names, and their labels: see `find_scans`."""
    rows = find_scans(source, where=where, label_column=label_column, require_labels=require_labels)
    scored = {name: kind for name, kind in SCORED.items() if any(name in row for row in rows)}
    return Cohort(pa.Table.from_pylist(rows, schema=pa.schema([*SCHEMA, *map(pa.field, scored, scored.values())])))


def find_scans(
    source: str | Path,
    /,
    *,
    where: Mapping[str, str | Sequence[str]] | None = None,
    label_column: str | None = None,
    require_labels: bool = False,
    labels: bool = True,
) -> list[Row]:
    """Find the scans that a source names: rows with the columns of a cohort.

    Parameters
    ----------
    source : str or Path
        At a path or a URI: a CSV, TSV or Parquet manifest with a column ``image`` (paths relative to the manifest), a
        folder, a glob, one image, or the root of a BIDS dataset. Beside manifests, labels are found by name:
        ``x_mask.nii.gz`` (or _label, _seg, _brainmask, _brain_mask) belongs to ``x.nii.gz``, ``masks/x.nii.gz`` to
        ``images/x.nii.gz``, and in BIDS a brain mask under ``derivatives`` to the image of the same entities (not at a
        URI).
    where : mapping, optional
        Keep the rows whose columns equal these values, or one of them, such as ``{"split": "test"}``; in BIDS the
        entities are columns, and only anatomical images count unless a suffix or datatype is asked for.
    label_column : str, optional
        The column with the label files, where it is not called label, mask, seg or segmentation.
    require_labels : bool
        Every scan must have a label, and both files must exist.
    labels : bool
        Whether labels are looked at: without, a scan may have several.

    Raises
    ------
    DataError
        There is no such source, nothing in it, a column or label is missing, keys are not unique, or a name is no text.
    """
    any_type = bool({"suffix", "datatype"} & set(where or ()))
    path, folder, rows = _find(str(source), any_type=any_type, labels=labels)
    columns = sorted({name for row in rows for name in row})
    rows = keep(rows, where or {}, path)

    image_column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image_column is None:
        check_column(IMAGE_COLUMNS[0], columns, path)
    if label_column is None:
        label_column = next((name for name in LABEL_COLUMNS if name in columns), None)
    else:
        check_column(label_column, columns, path)
    for place, row in enumerate(rows):  # one by one: there may be a million
        if labels:
            sources.one_label(row)
        rows[place] = _normalised(row, image_column, label_column, folder)
    _fill_keys(rows)
    if require_labels:
        _check_labels(rows, path)
    _check_names(rows)
    return rows


def _find(source: str, *, any_type: bool, labels: bool) -> tuple[AnyPath, AnyPath, list[Row]]:
    """What is named, the folder that its rows' relative paths begin at, and its rows."""
    place = storage.path_of(source)
    if isinstance(place, StorePath):
        return place, place.parent, remote.rows(source, any_type=any_type)
    path = place.expanduser().absolute()
    try:
        rows = sources.find(path, source, any_type=any_type, labels=labels)
    except OSError as error:
        raise DataError(f"'{source}' cannot be looked at ({error.strerror}): give what can be read.") from error
    return path, path if path.is_dir() else path.parent, rows


def _normalised(row: Row, image_column: str | None, label_column: str | None, folder: AnyPath) -> Row:
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
        **{name: row[name] for name in SCORED if name in row},
        "weight": 1.0,
        **numbers,
        "key": row.get("key"),
        "image": _absolute(image, folder),
        "label": _absolute(label, folder) if label else None,
        "kind": kind,
    }


def _absolute(name: str, folder: AnyPath) -> str:
    """A path or a URI of a manifest."""
    if "://" in name:
        return places.localised(name)
    return str(folder / name) if isinstance(folder, StorePath) else os.path.normpath(folder / name)


def _fill_keys(rows: list[Row]) -> None:
    """Name scans without a key by their file, and by their folders too where files share a name."""
    unnamed = [row for row in rows if row["key"] is None]
    for row in unnamed:
        row["key"] = stem_of(_path(row)) or _path(row).stem
    count = Counter(row["key"] for row in rows)
    repeated = [row for row in unnamed if count[row["key"]] > 1]
    if repeated:
        root = os.path.commonpath([_path(row).parent for row in repeated])
        for row in repeated:
            folders = _path(row).parent.relative_to(root).parts
            row["key"] = "_".join((*folders, row["key"]))
    for row in rows:
        row["key"] = str(row["key"])
        if not row["key"].strip(".") or set(row["key"]) & set("/\\\0"):
            raise DataError(
                f"'{row['key']}' cannot be the key of {row['image']}: results are named by it, so no slashes."
            )


def _path(row: Row) -> Path:
    """The image's absolute path, or what looks like one for a URI."""
    image: str = row["image"]
    return Path("/", image.partition(":")[0], places.path_in(image)) if places.is_uri(image) else Path(image)


def _check_names(rows: Sequence[Row]) -> None:
    _check_keys([row["key"] for row in rows])
    for row in rows:
        for name in filter(None, (row["key"], row["image"], row["label"])):
            try:
                name.encode()
            except UnicodeEncodeError:
                raise DataError(f"{ascii(name)} is no text in UTF-8: rename the file.") from None


def _check_keys(keys: Sequence[str]) -> None:
    double = [key for key, count in Counter(keys).items() if count > 1]
    if double:
        raise DataError(f"{some(double)} stand in more than one row: each scan needs a key of its own.")


def _check_labels(rows: Sequence[Row], path: AnyPath) -> None:
    without = [row["key"] for row in rows if row["label"] is None]
    if without:
        raise DataError(f"{some(without)} of {path} have no label: each scan here needs one.")
    names = [name for row in rows for name in (row["image"], row["label"])]
    uris = list(filter(places.is_uri, names))
    changed = dict(zip(uris, places.times(uris), strict=True))
    lost = [name for name in names if (changed[name] is None if name in changed else not Path(name).is_file())]
    if lost:
        raise DataError(f"{some(lost)}, named by {path}, do not exist: correct the paths.")

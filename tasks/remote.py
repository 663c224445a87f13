"""Scans at a URI: a file, a folder, a glob, a manifest or a BIDS dataset in an object store."""

import glob
import posixpath
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from bids2table import parse_bids_entities
from pyarrow import fs

from onelabel.errors import DataError
from onelabel.imaging import places
from onelabel.tasks.cohort import (
    IMAGE_COLUMNS,
    IMAGE_ENDINGS,
    LABEL_ENDINGS,
    Row,
    is_bids_image,
    keep,
    manifest_rows,
)

DESCRIPTION = "dataset_description.json"
_MANIFESTS = (".csv", ".tsv", ".parquet")


def find(uri: str, /, *, where: Mapping[str, str | Sequence[str]] | None = None) -> list[Row]:
    """Find the scans that a URI names, as `open_cohort` finds them on disks; in a glob, `?` begins the query.

    Returns
    -------
    One row a scan: `image`, its URI; `key`; `inside`, its path in the folder that the URI names, or None; and the BIDS
    entities or the columns of the manifest.

    Raises
    ------
    DataError : no such store, nothing there, or a column that is missing.
    """
    store, path = places.filesystem(uri)
    try:
        rows = _rows(uri, store, path, any_type=bool({"suffix", "datatype"} & set(where or ())))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"'{uri}' cannot be read ({' '.join(str(error).split())}): check the URI and the keys."
        ) from None
    if not rows:
        raise DataError(f"{uri} names no image: give a manifest, a folder, a glob, a BIDS dataset or an image there.")
    return keep(rows, where or {}, uri)


def is_bids(uri: str, /) -> bool:
    """Whether a BIDS dataset lies there."""
    store, path = places.filesystem(uri)
    return bool(store.get_file_info(posixpath.join(path, DESCRIPTION)).type == fs.FileType.File)


def _rows(uri: str, store: fs.FileSystem, path: str, *, any_type: bool) -> list[Row]:
    if glob.has_magic(path):
        base = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        pattern = places.matching(path)
        return [_row(uri, found, None) for found in _images(store, base) if pattern.match(found)]
    if store.get_file_info(path).type == fs.FileType.File:
        if PurePosixPath(path).suffix in _MANIFESTS:
            return _manifest(uri, path)
        return [_row(uri, path, None)]
    found = [(name, posixpath.relpath(name, path)) for name in _images(store, path)]
    if not is_bids(uri):
        return [_row(uri, name, inside) for name, inside in found]
    rows = [
        parse_bids_entities(inside) | _row(uri, name, inside) for name, inside in found if inside.startswith("sub-")
    ]
    return [row for row in rows if is_bids_image(row, any_type=any_type)]


def _images(store: fs.FileSystem, folder: str) -> list[str]:
    """Paths of images, in order; not of those that are masks by their name."""
    listed = store.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    names = sorted(info.path for info in listed if info.type == fs.FileType.File)
    return [name for name in names if (stem := _stem(name)) and not stem.endswith(LABEL_ENDINGS)]


def _manifest(uri: str, path: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch, places.fetched(uri, scratch=Path(scratch)) as file:
        rows = manifest_rows(file)
    columns = {name for row in rows for name in row}
    column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if rows and column is None:
        raise DataError(f"{uri} has no column 'image': it has {', '.join(sorted(columns))}.")
    return [row | _listed(uri, path, row, str(row[column or ""])) for row in rows]


def _listed(uri: str, path: str, row: Row, image: str) -> Row:
    """A scan of a manifest; a path in it is relative to the manifest, as long as it is no URI itself."""
    image = places.localised(image)
    if not places.is_uri(image):
        image = places.at(uri, posixpath.normpath(posixpath.join(posixpath.dirname(path), image)))
    return {"image": image, "key": row.get("key") or _stem(image) or PurePosixPath(image).stem, "inside": None}


def _row(uri: str, path: str, inside: str | None) -> dict[str, Any]:
    return {"image": places.at(uri, path), "key": _stem(path) or PurePosixPath(path).stem, "inside": inside}


def _stem(path: str) -> str:
    """A visible image's name without its ending; empty for anything else."""
    name = PurePosixPath(path.partition("?")[0]).name
    if name.startswith("."):
        return ""
    return next((name.removesuffix(end) for end in IMAGE_ENDINGS if name.endswith(end)), "")

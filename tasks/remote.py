"""Scans at a URI: a file, a folder, a glob, a manifest or a BIDS dataset in an object store."""

import glob
import posixpath
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import pyarrow as pa
from bids2table import parse_bids_entities
from pyarrow import fs

from onelabel.errors import DataError
from onelabel.imaging import places
from onelabel.imaging.storage import StorePath
from onelabel.tasks.sources import (
    IMAGE_COLUMNS,
    LABEL_ENDINGS,
    RIVALS,
    TWINS,
    Pairs,
    Row,
    as_rows,
    is_bids_image,
    keep,
    manifest_rows,
    pair_by_ending,
    pair_by_folder,
    stem_of,
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
    any_type = bool({"suffix", "datatype"} & set(where or ()))
    found = keep(rows(uri, any_type=any_type, labels=False), where or {}, uri)
    return [_located(row, uri, path.rstrip("/")) for row in found]


def rows(uri: str, /, *, any_type: bool, labels: bool = True) -> list[Row]:
    """Like `find`, with the columns `image` and, where one is known, `label`; those of a manifest as they are there.

    labels : of a folder with twins such as images/ and masks/ only the pairs count
    """
    store, path = places.filesystem(uri)
    try:
        found = _rows(uri, store, path.rstrip("/"), any_type=any_type, labels=labels)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"'{uri}' cannot be read ({' '.join(str(error).split())}): check the URI and the keys."
        ) from None
    if not found:
        raise DataError(f"{uri} names no image: give a manifest, a folder, a glob, a BIDS dataset or an image there.")
    return found


def is_bids(uri: str, /) -> bool:
    """Whether a BIDS dataset lies there."""
    store, path = places.filesystem(uri)
    return bool(store.get_file_info(posixpath.join(path, DESCRIPTION)).type == fs.FileType.File)


def files(place: StorePath, /) -> list[StorePath]:
    """All images that a file, a folder or a glob names, in order, masks included.

    Raises
    ------
    StorageError : the store does not answer.
    """
    with place.answering():
        found = _files(place.store, place.key)
    root = place.key.removesuffix(place.inside)
    return [StorePath(place.root, str(name).removeprefix(root)) for name in found]


def _rows(uri: str, store: fs.FileSystem, path: str, *, any_type: bool, labels: bool) -> list[Row]:
    if PurePosixPath(path).suffix in _MANIFESTS and store.get_file_info(path).type == fs.FileType.File:
        with places.fetched(uri) as file:
            return manifest_rows(file)
    found, root = _files(store, path), PurePosixPath(path)
    if is_bids(uri):
        images = [name for name in found if not stem_of(name).endswith(LABEL_ENDINGS)]
        listed = {name: name.relative_to(root).as_posix() for name in images}
        entities = {name: parse_bids_entities(inside) for name, inside in listed.items() if inside.startswith("sub-")}
        return [
            row | {"image": places.at(uri, str(name)), "label": None}
            for name, row in entities.items()
            if is_bids_image(row, any_type=any_type)
        ]
    beside = _files(store, str(root.parent), deep=False) if found == [root] else found
    if glob.has_magic(path):
        beside = _files(store, _base(path))
    pairs = _twins(found, root)
    others = found
    if pairs:
        others = [] if labels else [name for name in found if name.relative_to(root).parts[0] not in TWINS]
    return [
        {name: place if name == RIVALS else place and places.at(uri, place) for name, place in row.items()}
        for row in as_rows(pairs | pair_by_ending(others, beside))
    ]


def _twins(found: Sequence[PurePosixPath], root: PurePosixPath) -> Pairs:
    """Pairs of twin folders below root."""
    below = defaultdict(list)
    for name in found:
        if name.is_relative_to(root) and len(inside := name.relative_to(root).parts) > 1 and inside[0] in TWINS:
            below[root / inside[0]].append(name)
    return pair_by_folder(below.items())


def _files(store: fs.FileSystem, path: str, *, deep: bool = True) -> list[PurePosixPath]:
    """Paths of images, in order; hidden ones are unfinished, or a file system's own."""
    if not glob.has_magic(path) and store.get_file_info(path).type == fs.FileType.File:
        return [PurePosixPath(path)]
    base = _base(path) if glob.has_magic(path) else path
    listed = store.get_file_info(fs.FileSelector(base, recursive=deep, allow_not_found=True))
    names = (PurePosixPath(info.path) for info in sorted(listed, key=lambda info: info.path) if info.is_file)
    matches = places.matching(path).match if glob.has_magic(path) else lambda _: True
    return [name for name in names if stem_of(name) and name.name[0] != "." and matches(str(name))]


def _base(pattern: str) -> str:
    """The folder below which all matches of a glob lie."""
    return re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]


def _located(row: Row, uri: str, path: str) -> Row:
    """A row with an absolute image, a key and its path in the folder that was named."""
    column = next((name for name in IMAGE_COLUMNS if name in row), None)
    if column is None:
        raise DataError(f"{uri} has no column 'image': it has {', '.join(sorted(row))}.")
    image = places.localised(str(row[column]))
    if not places.is_uri(image):
        image = places.at(uri, posixpath.normpath(posixpath.join(posixpath.dirname(path), image)))
    name = PurePosixPath(places.path_in(image))
    same = image.partition("://")[0] == uri.partition("://")[0]
    inside = name.relative_to(path).as_posix() if same and name.is_relative_to(path) and str(name) != path else None
    return row | {"image": image, "key": row.get("key") or stem_of(name) or name.stem, "inside": inside}

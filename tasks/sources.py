"""Where scans lie on disks: manifests, folders, globs, BIDS datasets; and which label belongs to which image."""

import csv
import glob
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from bids2table import index_dataset

from onelabel.errors import DataError

# In any case; of a pair, the header.
IMAGE_ENDINGS = (".nii.gz", ".nii", ".nii.bz2", ".nii.zst", ".mgz", ".mgh", ".hdr", ".mnc", ".HEAD", ".PAR")
LABEL_ENDINGS = ("_brain_mask", "_brainmask", "_mask", "_label", "_seg")  # the longest that fits comes first
IMAGE_FOLDERS = ("image", "images", "t1", "imagesTr")
LABEL_FOLDERS = ("mask", "masks", "label", "labels", "labelsTr")
TWINS = (*IMAGE_FOLDERS, *LABEL_FOLDERS)
IMAGE_COLUMNS = ("image", "path", "file")
LABEL_COLUMNS = ("label", "mask", "seg", "segmentation")
RIVALS = "all labels found"  # where there are several
BIDS_LABEL_SUFFIXES = ("mask", "dseg", "probseg", "defacemask")

Row = dict[str, Any]  # a manifest's row: whatever columns it has
Pairs = dict[PurePath, list[PurePath]]  # an image and the label files that go with it


def find(path: Path, source: str | Path, /, *, any_type: bool, labels: bool = True) -> list[Row]:
    """Rows of whatever kind of source this is on this machine; in BIDS of anatomical images unless `any_type`.

    labels : of a folder with twins such as images/ and masks/ only the pairs count
    """
    if path.suffix == ".img" and path.with_suffix(".hdr").is_file():
        path = path.with_suffix(".hdr")
    if not path.exists():
        matches = glob.glob(str(path), recursive=True) if glob.has_magic(str(path)) else []
        found = _images(matches)
        rows = as_rows(pair_by_ending(found, _beside(found)))
        problem = "matches no image" if glob.has_magic(str(path)) else "does not exist"
    elif path.suffix in {".csv", ".tsv", ".parquet"}:
        rows = manifest_rows(path)
        problem = "lists no scan"
    elif path.is_file():
        rows = as_rows({path: pair_by_ending([path], _beside([path])).get(path, [])} if stem_of(path) else {})
        problem = "is neither an image nor a manifest"
    elif (path / "dataset_description.json").is_file():
        rows = _bids_rows(path, any_type=any_type)
        problem = f"is a BIDS dataset without {'' if any_type else 'anatomical '}images"
    else:
        twins = {path / name: _images((path / name).rglob("*")) for name in TWINS if (path / name).is_dir()}
        pairs = pair_by_folder(twins.items())
        found = [] if pairs and labels else _images(path.rglob("*"))
        if pairs:  # what lies in neither is to be stripped too
            found = [file for file in found if not any(file.is_relative_to(folder) for folder in twins)]
        rows = as_rows(pairs | pair_by_ending(found, _beside(found)))
        problem = "is a folder without images"
    if not rows:
        raise DataError(
            f"{source} {problem}: give a manifest (.csv, .tsv, .parquet), a folder, a glob, a BIDS dataset or an image "
            f"({', '.join(IMAGE_ENDINGS)})."
        )
    return rows


def keep(rows: list[Row], where: Mapping[str, str | Sequence[str]], source: object, /) -> list[Row]:
    """The rows whose columns have the values that are asked for; see `open_cohort`."""
    for name, value in where.items():
        check_column(name, sorted({name for row in rows for name in row}), source)
        wanted, values = [value] if isinstance(value, str) else [*map(str, value)], {str(row.get(name)) for row in rows}
        rows = [row for row in rows if str(row.get(name)) in wanted]
        if not rows:
            raise DataError(f"No scan in {source} has '{name}' = {some(wanted)}: it holds {some(sorted(values))}.")
    return rows


def manifest_rows(path: Path, /) -> list[Row]:
    """Rows of a CSV, TSV or Parquet file; in text files all values are strings, and empty or n/a is null."""
    if path.suffix == ".parquet":
        return list(read_parquet(path).to_pylist())
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


def read_parquet(path: Path, /) -> pa.Table:
    """Read a table; DataError where it is damaged."""
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
        pair = as_rows({root / entities["path"]: labels})[0]
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


def pair_by_folder(listed: Iterable[tuple[PurePath, Sequence[PurePath]]], /) -> Pairs:
    """Pair files of equal names under two folders such as images/ and masks/; empty without two such folders.

    listed : folders that are there, and all images below each
    """
    known = dict(listed)
    images, masks = (
        {folder: files for folder, files in known.items() if folder.name in names}
        for names in (IMAGE_FOLDERS, LABEL_FOLDERS)
    )
    if not images or not masks:
        return {}
    labels = defaultdict(list)
    for folder, files in masks.items():
        for path in files:
            labels[path.parent.relative_to(folder) / stem_of(path)].append(path)
    return {
        path: labels[path.parent.relative_to(folder) / stem_of(path)]
        for folder, files in images.items()
        for path in files
    }


def pair_by_ending(paths: Sequence[PurePath], beside: Iterable[PurePath], /) -> Pairs:
    """Pair x.nii.gz with x_mask.nii.gz, looked for among all that lies beside; a label without image is left out."""
    pool = {path.with_name(stem_of(path)) for path in paths}
    labels = defaultdict(list)
    for path in sorted(beside):
        stem = stem_of(path)
        bases = [stem.removesuffix(ending) for ending in LABEL_ENDINGS if stem.endswith(ending)]
        base = next((base for base in bases if path.with_name(base) in pool), None)
        if base is not None:
            labels[path.with_name(base)].append(path)
    return {path: labels[path.with_name(stem_of(path))] for path in paths if not stem_of(path).endswith(LABEL_ENDINGS)}


def _beside(paths: Sequence[Path]) -> set[Path]:
    """All images in the folders of files."""
    return {other for folder in {path.parent for path in paths} for other in _images(folder.iterdir())}


def as_rows(pairs: Pairs) -> list[Row]:
    """Rows with their label; where there are several, `one_label` refuses them."""
    return [
        {"image": str(image), "label": str(labels[0]) if labels else None}
        | ({RIVALS: " and ".join(map(str, labels))} if len(labels) > 1 else {})
        for image, labels in pairs.items()
    ]


def one_label(row: Row, /) -> None:
    """Refuse a row with more than one label."""
    if row.get(RIVALS):
        raise DataError(
            f"{row['image']} has more than one label, {row[RIVALS]}: choose by a manifest, or move one away."
        )


def _images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files among paths, lost links too, in order; hidden ones are unfinished or a file system's own."""
    found = (Path(path) for path in paths)
    return sorted(path for path in found if stem_of(path) and not path.name.startswith(".") and not path.is_dir())


def stem_of(path: PurePath) -> str:
    """A file's name without its ending, empty if it is no image."""
    name = path.name.lower()
    return next((path.name[: -len(end)] for end in IMAGE_ENDINGS if name.endswith(end.lower())), "")


def check_column(name: str, columns: Sequence[str], path: object, /) -> None:
    """Refuse the name of a column that is not there."""
    if name not in columns:
        near = get_close_matches(name, columns, n=1, cutoff=0)
        raise DataError(f"{path} has no column '{name}': did you mean '{near[0]}' of {some(columns)}?")


def some(names: Sequence[str]) -> str:
    """Up to five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more

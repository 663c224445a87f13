"""What there is to strip, and what each result will be called: all that can be refused before any work."""

import glob
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from onelabel.errors import DataError
from onelabel.imaging import places
from onelabel.imaging.places import Folder
from onelabel.tasks import remote
from onelabel.tasks.cohort import find_scans
from onelabel.tasks.sources import stem_of

Where = Mapping[str, str | Sequence[str]]

# BIDS writes the entities of a name in this order; `mod` stands before these.
_AFTER_MOD = "echo flip inv mt part proc hemi space split recording chunk atlas seg scale res den label desc".split()
_NEEDS_NO_MOD = ("T1w", "bold")


@dataclass(frozen=True)
class Job:
    """One scan, and the names of its results inside the output folder.

    key : unique; image : path or URI; brain, distance : empty if not wanted
    bids : the scan's path inside its BIDS dataset, or empty
    """

    key: str
    image: str
    mask: str
    brain: str = ""
    distance: str = ""
    bids: str = ""

    @property
    def results(self) -> list[str]:
        """All images that will be written."""
        return [name for name in (self.brain, self.distance, self.mask) if name]


@dataclass(frozen=True)
class _Found:
    """A scan. inside : its path in the folder that was named, or None."""

    key: str
    image: str
    inside: str | None
    bids: bool


def plan(
    inputs: Sequence[str], /, *, where: Where | None = None, image: bool = False, distance: bool = False
) -> list[Job]:
    """All scans that the inputs name, each once, with names for their results that are all different.

    Scans from different folders whose masks would have one name keep as much of their folders as tells them apart.

    Parameters
    ----------
    inputs : whatever `open_cohort` takes, or such things by URI
    where : see `open_cohort`
    image, distance : whether stripped images and distance maps are wanted

    Raises
    ------
    DataError : an input without scans, or scans that only their endings tell apart.
    """
    found: dict[str, _Found] = {}
    for source in map(places.localised, inputs):
        for scan in _at_uri(source, where) if places.is_uri(source) else _on_disk(source, where):
            found.setdefault(scan.image, scan)
    jobs = [_job(scan) for scan in found.values()]
    repeated = _repeated(job.mask for job in jobs)
    if repeated:
        clashing = [os.path.dirname(_path(job)) for job in jobs if job.mask in repeated and not job.bids]
        common = os.path.commonpath(clashing) if clashing else ""
        jobs = [_in_folders(job, common) if job.mask in repeated and not job.bids else job for job in jobs]
    still = _repeated(job.mask for job in jobs)
    if still:
        names = " and ".join(job.image for job in jobs if job.mask == min(still))
        raise DataError(f"the masks of {names} would both be called {min(still)}: strip them into different folders")
    keys = _repeated(job.key for job in jobs)
    jobs = [replace(job, key=_key(job.mask)) if job.key in keys else job for job in jobs]
    return [replace(job, brain=job.brain if image else "", distance=job.distance if distance else "") for job in jobs]


def check_apart(inputs: Sequence[str], jobs: Sequence[Job], out: Folder, /) -> None:
    """Refuse results that would be found as scans the next time.

    Raises
    ------
    DataError : the output folder lies inside an input folder, or results match an input's glob. A BIDS dataset's
        `derivatives` are no scans of it.
    """
    written = [_real(out.path(name)) for job in jobs for name in job.results]
    lost = {_real(job.image) for job in jobs} & set(written)
    if lost:
        raise DataError(f"'{min(lost)}' is an input and would be overwritten by a result: give another output folder")
    for source in map(places.localised, inputs):
        place = _real(source)
        pattern = places.matching(place)
        if _is_folder(place):
            inside = _real(out.place).rstrip("/") + "/"
            root = place.rstrip("/") + "/"
            bad = inside.startswith(root) and not (inside.startswith(f"{root}derivatives/") and _is_bids(source))
        else:
            bad = any(map(pattern.match, written))
        if bad:
            raise DataError(
                f"the output folder '{out.place}' lies inside the input '{source}', where results would be taken for"
                " scans the next time: give a folder outside of it"
            )


def stem(path: PurePath, /) -> str:
    """A file's name without its ending."""
    return stem_of(path) or path.stem


def _on_disk(source: str, where: Where | None) -> list[_Found]:
    root = Path(os.path.abspath(Path(source).expanduser()))
    rows = find_scans(source, where=where, labels=False)
    bids = _is_bids(str(root))
    return [_Found(row["key"], row["image"], _inside(row["image"], root), bids) for row in rows]


def _at_uri(source: str, where: Where | None) -> list[_Found]:
    rows = remote.find(source, where=where)
    bids = any(row["inside"] for row in rows) and remote.is_bids(source)
    return [_Found(row["key"], row["image"], row["inside"], bids) for row in rows]


def _inside(image: str, root: Path) -> str | None:
    path = Path(image)
    return path.relative_to(root).as_posix() if root.is_dir() and path.is_relative_to(root) else None


def _real(place: str) -> str:
    if places.is_uri(place):
        return f"{place.partition('://')[0]}://{places.path_in(place)}"
    return os.path.realpath(Path(place).expanduser())


def _is_folder(place: str) -> bool:
    if places.is_uri(place):
        path = PurePath(place)
        return not (glob.has_magic(place) or stem_of(path) or path.suffix in {".csv", ".tsv", ".parquet"})
    return Path(place).is_dir()


def _is_bids(place: str) -> bool:
    return remote.is_bids(place) if places.is_uri(place) else (Path(place) / remote.DESCRIPTION).is_file()


def _job(scan: _Found) -> Job:
    if scan.bids and scan.inside:
        return _named(Job(scan.key, scan.image, "", bids=scan.inside), _bids_names(Path(scan.inside)))
    base = Path(scan.inside).with_name(stem(Path(scan.inside))) if scan.inside else Path(scan.key)
    return _named(Job(scan.key, scan.image, ""), _plain_names(base))


def _named(job: Job, name: Callable[[str], str]) -> Job:
    return replace(job, mask=name("mask"), brain=name("brain"), distance=name("distance"))


def _plain_names(base: Path) -> Callable[[str], str]:
    return lambda kind: base.with_name(f"{base.name}_{kind}.nii.gz").as_posix()


def _bids_names(path: Path) -> Callable[[str], str]:
    """Names as BIDS gives them to derivatives; only a contrast other than T1w needs to be said of a mask."""
    *entities, suffix = stem(path).split("_")
    entities = [entity for entity in entities if not entity.startswith("desc-")]
    place = next((i for i, entity in enumerate(entities) if entity.split("-")[0] in _AFTER_MOD), len(entities))
    with_mod = entities if suffix in _NEEDS_NO_MOD else [*entities[:place], f"mod-{suffix}", *entities[place:]]

    def name(kind: str) -> str:
        words = [*entities, "desc-brain", suffix] if kind == "brain" else [*with_mod, "desc-brain", kind]
        return path.with_name("_".join(words) + ".nii.gz").as_posix()

    return name


def _key(mask: str) -> str:
    return mask.removesuffix("_mask.nii.gz").replace("/", "_")


def _in_folders(job: Job, common: str) -> Job:
    folders = Path(_path(job)).parent.relative_to(common)
    return _named(job, _plain_names(folders / stem(Path(_path(job)))))


def _path(job: Job) -> str:
    """The scan's absolute path, or what looks like one for a URI."""
    image = job.image
    return f"/{image.partition(':')[0]}/{places.path_in(image)}" if places.is_uri(image) else image


def _repeated(items: Any) -> set[Any]:
    return {item for item, count in Counter(items).items() if count > 1}

"""What has been stripped: rows written as they come, joined into one table at the end, gone on with the next time."""

import fcntl
import json
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from onelabel.errors import DataError
from onelabel.imaging import metrics, places
from onelabel.imaging.places import HIDDEN, Folder
from onelabel.tasks.strip_plan import Job
from onelabel.tasks.strip_worker import SCHEMA, UNLIKE, Row, doubtful
from onelabel.tasks.tables import from_rows

TABLE = "strip.parquet"
PART_ROWS = 64
EVERY_S = 1.0  # between two writes of an unfinished part
NAMED_REASONS = 3
_PARTS = f"{HIDDEN}/part"
_MADE = b"onelabel.strip"
_PROBE = f"{HIDDEN}/writable"
_NUMBERS = re.compile(r"[(\[]*\d[\d., \])]*")  # one or several
_LIGHT = ["image", "mask", "brain", "distance", "volume_ml", "error"]


@dataclass
class Outcome:
    """What a cohort came to.

    folder : of the results; kept : scans that were done before
    reasons : the most common of failed and flagged scans: how many, which of the two, in words
    """

    folder: Folder
    scans: int = 0
    stripped: int = 0
    flagged: int = 0
    failed: int = 0
    kept: int = 0
    reasons: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def table(self) -> str:
        """Path or URI of the table."""
        return self.folder.path(TABLE)


class Record:
    """The table of an output folder, and its parts while work goes on.

    Parameters
    ----------
    out : folder of the results
    made : how masks are made; all masks of a folder are made alike

    Raises
    ------
    DataError : the folder cannot be written to, is in use, or holds masks that were made in another way.
    """

    def __init__(self, out: Folder, made: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.out, self.made = out, dict(made)
        # Of what was killed before it wrote a part there are masks that no row names.
        self._trusting = overwrite or places.times([out.path(_PROBE)])[0] is not None
        self._lock = _begin(out)
        with ExitStack() as undo:
            undo.callback(self.close)
            if overwrite:
                out.remove([TABLE, *_parts(out)])
            self._done = self._read_done()
            undo.pop_all()
        self._number = max((int(name[len(_PARTS) + 1 :][:8]) for name in _parts(out)), default=-1) + 1
        self._suffix = uuid.uuid4().hex[:8]  # nothing holds a store against another command
        self._rows: list[Row] = []
        self._written_at = 0.0

    def pending(self, jobs: Sequence[Job], /) -> list[Job]:
        """The scans of which a result is missing, is older than the scan, or failed.

        Raises
        ------
        DataError : a result would overwrite that of another scan, or a file that is no result.
        """
        self._spare_others([job for job in jobs if job.image not in self._done])
        owners = {row["mask"]: image for image, row in self._done.items() if row["error"] is None}
        for job in jobs:
            owner = owners.get(self.out.path(job.mask), job.image)
            if owner != job.image:
                raise DataError(
                    f"the mask of {job.image} would overwrite that of {owner} in '{self.out.place}': give another"
                    " output folder, or --overwrite"
                )
        listed = [job for job in jobs if self._is_listed(job)]
        scanned = places.scan_times([job.image for job in listed])
        names = [(place, self.out.path(name)) for place, job in enumerate(listed) for name in job.results]
        oldest: dict[int, float] = {}
        for (place, _), written in zip(names, places.times([name for _, name in names]), strict=True):
            oldest[place] = min(oldest.get(place, float("inf")), -1 if written is None else written)
        done = {job.image for place, job in enumerate(listed) if oldest[place] >= (scanned[place] or 0)}
        return [job for job in jobs if job.image not in done]

    def _spare_others(self, new: Sequence[Job]) -> None:
        """Refuse to write over what lies there and is of somebody else."""
        names = [] if self._trusting else [self.out.path(name) for job in new for name in job.results]
        found = [name for name, written in zip(names, places.times(names), strict=True) if written is not None]
        if found:
            raise DataError(
                f"'{found[0]}' is there already, and no result of onelabel strip in this folder: give another output"
                " folder, or --overwrite"
            )

    def add(self, row: Row, /) -> None:
        """Take in a row; it is on the disk a second later at most, or with the next one."""
        self._rows.append(row)
        if len(self._rows) >= PART_ROWS or time.monotonic() - self._written_at >= EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write what has come; a part grows until it is full."""
        if self._rows:
            with self._on_disk():
                self._write(self._rows)
            self._written_at = time.monotonic()
        if len(self._rows) >= PART_ROWS:
            self._rows, self._number = [], self._number + 1

    def finish(self, jobs: Sequence[Job], /) -> Outcome:
        """Join all parts into the table: the last row of each of these scans, and of others that succeeded before."""
        self.flush()
        wanted = {job.image for job in jobs}
        joined = _parts(self.out)
        last: dict[str, tuple[str, int]] = {}
        volumes: dict[str, float | None] = {}
        for source, place, row in self._each(_LIGHT):
            if row["image"] in wanted or row["error"] is None:
                last[row["image"]], volumes[row["image"]] = (source, place), row["volume_ml"]
        usual = metrics.usual_volume([volume for volume in volumes.values() if volume])
        outcome, reasons = Outcome(self.out), Reasons()
        with self._on_disk():
            with (
                self.out.writing(TABLE) as file,
                pq.ParquetWriter(file, SCHEMA.with_metadata(self._metadata())) as writer,
            ):
                for kept in self._kept(last):
                    rows = _compared(kept, *usual)
                    writer.write_table(rows)
                    for row in rows.drop_columns("picture").to_pylist():
                        if row["image"] in wanted:
                            _count(outcome, reasons, row)
            self.out.remove(joined)
        outcome.reasons = reasons.most_common()
        return outcome

    def close(self) -> None:
        """Leave nothing behind but results, and parts that were not joined."""
        shutil.rmtree(self.out.scratch, ignore_errors=True)
        with suppress(OSError):  # of a store that does not answer any more
            if not _parts(self.out):
                self.out.remove([HIDDEN])
        if self._lock:
            self._lock.close()

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            raise DataError(
                f"'{self.out.place}' cannot be written to ({reason}): mend that and give the same command again, which"
                " goes on from here"
            ) from error

    def _kept(self, last: Mapping[str, tuple[str, int]]) -> Iterator[pa.Table]:
        """The rows that are the last of their images, a few at a time."""
        for source in self._sources():
            for begin, batch in self._batches(source, None):
                images = enumerate(batch["image"].to_pylist())
                kept = [batch.slice(at, 1) for at, image in images if last.get(image) == (source, begin + at)]
                if kept:
                    yield pa.concat_tables(kept)

    def _is_listed(self, job: Job) -> bool:
        row = self._done.get(job.image)
        if row is None or row["error"] is not None:
            return False
        wanted = {"mask": job.mask, "brain": job.brain, "distance": job.distance}
        return all(row[name] == (self.out.path(target) if target else None) for name, target in wanted.items())

    def _read_done(self) -> dict[str, Row]:
        """The last row of each image."""
        for source in self._sources():
            self._check_made(source)
        return {row["image"]: row for _, _, row in self._each(_LIGHT)}

    def _check_made(self, source: str) -> None:
        with self._open(source) as file:
            known = (file.schema_arrow.metadata or {}).get(_MADE)
        before = json.loads(known) if known else {}
        other = [name for name in self.made if before.get(name) != self.made[name]]
        if other:
            change = ", ".join(f"{name} {before.get(name)}, not {self.made[name]}" for name in other)
            what = f"masks made with {change}" if known else f"a {TABLE} of another program or version"
            raise DataError(f"'{self.out.place}' holds {what}: give another output folder, or --overwrite")

    def _each(self, columns: list[str]) -> Iterator[tuple[str, int, Row]]:
        for source in self._sources():
            for begin, batch in self._batches(source, columns):
                yield from ((source, begin + i, row) for i, row in enumerate(batch.to_pylist()))

    def _batches(self, source: str, columns: list[str] | None) -> Iterator[tuple[int, pa.Table]]:
        with self._open(source) as file:
            begin = 0
            for batch in file.iter_batches(PART_ROWS, columns=columns):
                yield begin, pa.Table.from_batches([batch])
                begin += batch.num_rows

    def _open(self, source: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.out.store.open_input_file(source))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"'{self.out.path(source)}' cannot be read ({error}): remove it, or --overwrite") from None

    def _sources(self) -> list[str]:
        """The table, where there is one, and the parts, the older ones first."""
        there = self.out.store.get_file_info(TABLE).type == fs.FileType.File
        return [TABLE] * there + _parts(self.out)

    def _write(self, rows: list[Row]) -> None:
        with self.out.writing(f"{_PARTS}-{self._number:08d}-{self._suffix}") as file:
            pq.write_table(from_rows(rows, SCHEMA).replace_schema_metadata(self._metadata()), file)

    def _metadata(self) -> dict[bytes, bytes]:
        return {_MADE: json.dumps(self.made).encode()}


class Reasons:
    """Why scans failed or are flagged; what differs in the scan's path or in numbers alone is one reason."""

    def __init__(self) -> None:
        self._count: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], str] = {}

    def add(self, row: Mapping[str, Any], /) -> None:
        """Take in a row with `image`, `flag`, `flags` and `error`."""
        if row["error"] is not None:
            self._add("failed", row["error"].replace(row["image"] or "\0", "…"))
        elif row["flag"]:
            for flag in filter(None, (row["flags"] or "").split("; ")):
                self._add("flagged", flag)

    def most_common(self, only: str = "") -> list[tuple[int, str, str]]:
        """How many, whether they failed or are flagged, and the first one's words; if wanted of one state only."""
        wanted = [(kind, count) for kind, count in self._count.most_common() if only in ("", kind[0])]
        return [(count, kind[0], self._first[kind]) for kind, count in wanted[:NAMED_REASONS]]

    def _add(self, state: str, words: str) -> None:
        kind = state, _NUMBERS.sub("#", words)
        self._count[kind] += 1
        self._first.setdefault(kind, words)


def _count(outcome: Outcome, reasons: Reasons, row: Row) -> None:
    reasons.add(row)
    outcome.scans += 1
    outcome.failed += row["error"] is not None
    outcome.stripped += row["error"] is None
    outcome.flagged += bool(row["flag"])


def _compared(rows: pa.Table, middle: float, far: float) -> pa.Table:
    """Flag the masks whose volume is far from the cohort's, and those alone."""
    found = rows.select(["volume_ml", "flags", "flag", "error"]).to_pylist()
    for row in found:
        words = [flag for flag in (row["flags"] or "").split("; ") if flag and not flag.startswith(UNLIKE)]
        if row["volume_ml"] and abs(row["volume_ml"] - middle) > far:
            words.append(f"{UNLIKE} {middle:.0f} ml")
        if row["error"] is None:
            row |= {"flags": "; ".join(words), "flag": doubtful(words)}
    judged = from_rows(found, pa.schema([SCHEMA.field(name) for name in ("flags", "flag")]))
    for name, column in zip(judged.column_names, judged.columns, strict=True):
        rows = rows.set_column(rows.column_names.index(name), SCHEMA.field(name), column)
    return rows


def _begin(out: Folder) -> TextIO | None:
    """Make the folder, hold it against others, and clean what an earlier run left unfinished."""
    lock = None
    try:
        if not places.is_uri(out.place):
            lock = _locked(Path(out.place) / HIDDEN)
        shutil.rmtree(out.scratch, ignore_errors=True)
        with out.writing(_PROBE) as file:
            file.touch()
    except (OSError, pa.ArrowException) as error:
        if lock:
            lock.close()
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"the output folder '{out.place}' is not writable ({reason}): choose another") from error
    return lock


def _locked(folder: Path) -> TextIO:
    """A file that is held until it is closed, or the process ends, however it does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise DataError(
            f"another onelabel strip writes to '{folder.parent}': wait for it, or give another folder"
        ) from None
    return lock


def _parts(out: Folder) -> list[str]:
    listed = out.store.get_file_info(fs.FileSelector(HIDDEN, allow_not_found=True))
    return sorted(info.path for info in listed if info.path.startswith(_PARTS))

"""Files by path or by URI: fetched where they lie elsewhere, and written so that none is ever seen half done."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from onelabel.configs.passwords import has_password, without_password
from onelabel.errors import DataError

HIDDEN = ".strip"  # of a folder of results: what is only needed while work goes on
_PARTNERS = {".hdr": (".img", ".img.gz"), ".img": (".hdr",), ".HEAD": (".BRIK", ".BRIK.gz"), ".PAR": (".REC",)}
_PLAIN = "/!$&'()*+,;=:@"  # in the path of a URI, beside letters, digits and -._~


def is_uri(place: str, /) -> bool:
    """Whether this is a URI of another store than this machine's disks."""
    return "://" in place and not place.startswith("file://")


def localised(place: str, /) -> str:
    """A file:// URI as a path; anything else as it is.

    Raises
    ------
    DataError : a URI with a password, which would be recorded with every result.
    """
    _refuse_password(place)
    return filesystem(place)[1] if place.startswith("file://") else place


def filesystem(uri: str, /) -> tuple[fs.FileSystem, str]:
    """The store of a URI, and the path in it.

    Raises
    ------
    DataError : a scheme that is not known, a password, or a store that does not answer.
    """
    _refuse_password(uri)
    try:
        return fs.FileSystem.from_uri(quote(uri, safe=f"{_PLAIN}%?"))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"'{uri}' cannot be opened ({reason}): give a path, or a URI such as s3://bucket/x") from None


def at(uri: str, path: str, /) -> str:
    """The URI of another path in the store of a URI; what has a meaning in URIs is escaped."""
    query = uri.partition("?")[2]
    return f"{uri.partition('://')[0]}://{quote(path, safe=_PLAIN)}" + (f"?{query}" if query else "")


def path_in(uri: str, /) -> str:
    """The path that `filesystem` gives for a URI, with the store left alone."""
    return unquote(uri.partition("?")[0].partition("://")[2])


def _refuse_password(place: str) -> None:
    if has_password(place):
        raise DataError(
            f"'{without_password(place)}' was given with a password, which would be recorded; set AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or what else the store reads, instead"
        )


def matching(pattern: str, /) -> re.Pattern[str]:
    """A glob as a regular expression for whole paths: `*` stays in a folder, `**` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    words = (known.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)
    return re.compile("".join(words).replace("[!", "[^") + r"\Z")


@contextmanager
def fetched(place: str, /, *, scratch: Path | None = None) -> Iterator[Path]:
    """A file on this machine, for as long as it is needed; of a pair such as .hdr and .img both are there.

    scratch : folder for what is fetched

    Raises
    ------
    FileNotFoundError, ConnectionError : there is nothing at the URI, or it cannot be reached.
    """
    if not is_uri(place):
        yield Path(place)
        return
    store, path = filesystem(place)
    folder = (scratch or Path(tempfile.gettempdir())) / f"onelabel-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        with _network():
            for each in _with_partners(store, PurePosixPath(path)):
                fs.copy_files(str(each), str(folder / each.name), store, fs.LocalFileSystem())
        local = folder / PurePosixPath(path).name
        yield local
    except DataError as error:
        raise DataError(str(error).replace(str(local), place)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def times(names: Sequence[str], /) -> list[int | None]:
    """When files were last changed, ns; None where there is no such file."""
    return [info.mtime_ns if info.type == fs.FileType.File else None for info in _look(names)]


def scan_times(names: Sequence[str], /) -> list[int | None]:
    """When scans were last changed, ns: of a pair such as .hdr and .img the later one; None where a scan is not."""
    latest = times(names)
    partners = [
        (place, name.removesuffix(own) + ending)
        for place, name in enumerate(names)
        for own in [PurePosixPath(name).suffix]
        for ending in _PARTNERS.get(own, ())
    ]
    for (place, _), changed in zip(partners, times([name for _, name in partners]), strict=True):
        now = latest[place]
        latest[place] = None if now is None else max(now, changed or 0)
    return latest


@dataclass(frozen=True)
class Folder:
    """A folder of results: an absolute path, or a URI."""

    place: str

    @cached_property
    def store(self) -> fs.FileSystem:
        """Where the names in this folder are paths."""
        store, path = filesystem(self.place) if is_uri(self.place) else (fs.LocalFileSystem(), self.place)
        return fs.SubTreeFileSystem(path, store)

    @property
    def scratch(self) -> Path:
        """A folder on this machine for what is unfinished: beside the results if they are local, to rename files."""
        if not is_uri(self.place):
            return Path(self.place) / HIDDEN / "unfinished"
        known = hashlib.sha256(f"{os.getuid()} {self.place}".encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"onelabel-strip-{known}"

    def path(self, name: str, /) -> str:
        """Where a name in this folder is, for others."""
        if not is_uri(self.place):
            return str(Path(self.place) / name)
        return at(self.place, f"{filesystem(self.place)[1].rstrip('/')}/{name}")

    @contextmanager
    def writing(self, name: str, /) -> Iterator[Path]:
        """A path to write to, of the same ending; the file appears under its name when all of it is there."""
        unfinished = self.scratch / uuid.uuid4().hex / PurePosixPath(name).name
        unfinished.parent.mkdir(parents=True)
        try:
            yield unfinished
            self._publish(unfinished, name)
        finally:
            shutil.rmtree(unfinished.parent, ignore_errors=True)

    def remove(self, names: Sequence[str], /) -> None:
        """Remove those files and folders that are there."""
        for info in self.store.get_file_info(list(names)):
            if info.type == fs.FileType.Directory:
                self.store.delete_dir(info.path)
            elif info.type == fs.FileType.File:
                self.store.delete_file(info.path)

    def _publish(self, file: Path, name: str) -> None:
        if not is_uri(self.place):
            target = Path(self.place) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
            return
        with _network():
            fs.copy_files(str(file), name, fs.LocalFileSystem(), self.store)
            stored = self.store.get_file_info(name).size
        if stored != file.stat().st_size:
            raise ConnectionError(f"'{self.path(name)}' has {stored} bytes there, {file.stat().st_size} here")


@contextmanager
def _network() -> Iterator[None]:
    """Errors of a store, which carry no number, as those of a connection."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise ConnectionError(" ".join(str(error).split())) from error


def _with_partners(store: fs.FileSystem, path: PurePosixPath) -> list[PurePosixPath]:
    others = [path.with_suffix(ending) for ending in _PARTNERS.get(path.suffix, ())]
    found = store.get_file_info([str(other) for other in others])
    return [path, *(other for other, info in zip(others, found, strict=True) if info.type == fs.FileType.File)]


def _look(names: Sequence[str]) -> list[fs.FileInfo]:
    """What there is to be known of files, each store asked once."""
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        groups.setdefault("/".join(name.split("/")[:3]) if is_uri(name) else "", []).append(place)
    found: dict[int, fs.FileInfo] = {}
    for group, places in groups.items():
        store = filesystem(names[places[0]])[0] if group else fs.LocalFileSystem()
        paths = [filesystem(names[place])[1] if group else names[place] for place in places]
        with _network():
            found |= dict(zip(places, store.get_file_info(paths) if group else map(_on_disk, paths), strict=True))
    return [found[place] for place in range(len(names))]


def _on_disk(path: str) -> fs.FileInfo:
    """Of a file; of a name that no file can have, that there is none."""
    try:
        return fs.LocalFileSystem().get_file_info(path)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return fs.FileInfo(path, fs.FileType.NotFound)

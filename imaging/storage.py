"""Paths on disks or in an object store, read alike, and written so that nothing is ever seen half done."""

import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from pyarrow import fs

from onelabel.configs.passwords import without_password
from onelabel.errors import StorageError
from onelabel.imaging import places

_LOCAL = fs.LocalFileSystem()


@dataclass(frozen=True)
class StorePath:
    """A path in an object store, with what is used of `pathlib.Path`. A folder is there as long as something is in it.

    root : scheme://bucket, and a query if there is one; inside : the path in it

    Raises
    ------
    FileNotFoundError : by what reads, if nothing is there.
    StorageError : by any method, if the store refuses or does not answer.
    """

    root: str
    inside: str

    def __str__(self) -> str:
        return places.at(self.root, f"{places.path_in(self.root)}/{self.inside}") if self.inside else self.root

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(self.root, posixpath.normpath(posixpath.join(self.inside, name)))

    @property
    def name(self) -> str:
        """The last part."""
        return posixpath.basename(self.inside)

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return posixpath.splitext(self.inside)[1]

    @property
    def parent(self) -> "StorePath":
        """Where this lies."""
        return StorePath(self.root, posixpath.dirname(self.inside))

    @property
    def store(self) -> fs.FileSystem:
        """Where `key` leads here."""
        return _opened(self.root)[0]

    @property
    def key(self) -> str:
        """The path as the store has it."""
        return posixpath.join(_opened(self.root)[1], self.inside).rstrip("/")

    def resolve(self) -> "StorePath":
        """The same: there are no links."""
        return self

    def absolute(self) -> "StorePath":
        """The same."""
        return self

    def is_absolute(self) -> bool:
        """Yes."""
        return True

    def is_file(self) -> bool:
        """Whether a file is there."""
        return self._type() == fs.FileType.File

    def is_dir(self) -> bool:
        """Whether something lies below."""
        return self._type() == fs.FileType.Directory

    def exists(self) -> bool:
        """Whether anything is there."""
        return self._type() != fs.FileType.NotFound

    def _type(self) -> fs.FileType:
        with self.answering():
            return self.store.get_file_info(self.key).type

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: stores make folders of names."""

    def read_bytes(self) -> bytes:
        """All of a file."""
        with self.answering(), self.store.open_input_stream(self.key, compression=None) as stream:
            found: bytes = stream.read()
        return found

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of a text file."""
        return self.read_bytes().decode(encoding)

    def touch(self) -> None:
        """Make an empty file."""
        with self.answering(), self.store.open_output_stream(self.key, compression=None):
            pass

    def iterdir(self) -> "Iterator[StorePath]":
        """What lies here, by name."""
        with self.answering():
            found = self.store.get_file_info(fs.FileSelector(self.key, allow_not_found=True))
        yield from sorted((self / posixpath.basename(info.path) for info in found), key=str)

    def glob(self, pattern: str) -> "Iterator[StorePath]":
        """What matches, `*` part by part."""
        first, _, rest = pattern.partition("/")
        found = self.iterdir() if "*" in first else iter([self / first])
        for path in found:
            if not fnmatchcase(path.name, first):
                continue
            if rest:
                yield from path.glob(rest)
            elif "*" in first or path.exists():
                yield path

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        try:
            with self.answering():
                self.store.delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def clear(self) -> None:
        """Remove all that lies below, if there is anything."""
        if self.is_dir():
            with self.answering():
                self.store.delete_dir(self.key)

    def download(self, target: Path, /) -> None:
        """Copy a file, or a folder with all that is below, to this machine."""
        with self.answering():
            if self.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            fs.copy_files(self.key, str(target), self.store, _LOCAL)

    def upload(self, source: Path, /) -> None:
        """Take a file of this machine; it appears as a whole."""
        with self.answering():
            fs.copy_files(str(source), self.key, _LOCAL, self.store)
            stored = self.store.get_file_info(self.key).size
        if stored != source.stat().st_size:
            raise StorageError(f"'{self}' has {stored} bytes there, {source.stat().st_size} here; try again")

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Raise what the store says as a StorageError, in one sentence."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno is not None:
                raise
            raise StorageError(
                f"storage '{without_password(str(self))}' cannot be used ({' '.join(str(error).split())}); check the"
                " bucket, the credentials in the environment and the network, then give the same command again"
            ) from error


AnyPath = Path | StorePath


def path_of(place: str | AnyPath, /) -> AnyPath:
    """The path that a text names, be it a URI or not.

    Raises
    ------
    DataError : a URI with a password.
    """
    if not isinstance(place, str):
        return place
    place = places.localised(place)
    if not places.is_uri(place):
        return Path(place)
    base, mark, query = place.partition("?")
    scheme, _, rest = base.partition("://")
    bucket, _, inside = rest.partition("/")
    return StorePath(f"{scheme}://{bucket}{mark}{query}", posixpath.normpath(f"/{unquote(inside)}").strip("/"))


def answering(path: AnyPath, /) -> AbstractContextManager[None]:
    """Raise what others hear from the store of a path as a StorageError, in one sentence."""
    return path.answering() if isinstance(path, StorePath) else nullcontext()


@contextmanager
def local(path: AnyPath, /) -> Iterator[Path]:
    """A file or a folder on this machine, to be read for as long as the block lasts."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / path.name
        path.download(copy)
        yield copy


@contextmanager
def writing(path: AnyPath, /) -> Iterator[Path]:
    """A file of this machine to write, of the same ending; it appears under its name when all of it is there."""
    if isinstance(path, StorePath):
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / path.name
            yield file
            path.upload(file)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: AnyPath, text: str, /) -> None:
    """Write a text file as a whole or not at all."""
    with writing(path) as file:
        file.write_text(text, encoding="utf-8")


@contextmanager
def building(folder: AnyPath, /, *, last: str) -> Iterator[Path]:
    """A folder of this machine to fill; it gets its name as a whole.

    last : the file that a store gets when it has all others, so that the folder is complete when this one is there
    """
    if isinstance(folder, StorePath):
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
            remove(folder)
            files = (file for file in Path(scratch).rglob("*") if file.is_file())
            for file in sorted(files, key=lambda file: file == Path(scratch) / last):
                (folder / file.relative_to(scratch).as_posix()).upload(file)
        return
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def remove(folder: AnyPath, /) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if isinstance(folder, StorePath):
        folder.clear()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@lru_cache(maxsize=64)
def _opened(root: str) -> tuple[fs.FileSystem, str]:
    """The store of a root, which may take a question over the network, and where the root is in it."""
    store: tuple[fs.FileSystem, str] = places.filesystem(root)
    return store

"""The SQLite database in which MLflow keeps the record of a run that names no other place."""

import hashlib
import logging
import os
import shlex
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from onelabel.cluster import runtime
from onelabel.errors import StorageError, sentence
from onelabel.imaging import storage
from onelabel.imaging.storage import AnyPath, StorePath

log = logging.getLogger(__name__)

NAME = "mlflow.db"
SQLITE = "sqlite:///"


def home(folder: AnyPath, /) -> Path:
    """Where the record of a run lies without `tracking.uri`: SQLite needs a disk."""
    if isinstance(folder, Path):
        return folder
    return Path("mlruns", f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}").absolute()


def find(folder: AnyPath, home: Path, /) -> None:
    """Go on with the copy that an attempt on another machine left in an object store."""
    kept = folder / NAME
    if isinstance(kept, StorePath) and not (home / NAME).is_file() and kept.is_file():
        with storage.writing(home / NAME) as file:
            kept.download(file)


def command(uri: str, folder: AnyPath, /) -> str:
    """The shell command that opens the record; that of a submitted job goes with the job's folder, the copy stays."""
    if runtime.in_job() and isinstance(folder, StorePath) and uri == f"{SQLITE}{home(folder) / NAME}":
        return f"mlflow ui --backend-store-uri {SQLITE}{NAME}, where {NAME} is a copy of {folder / NAME}"
    return shlex.join(["mlflow", "ui", "--backend-store-uri", uri])


def copy(source: Path, target: AnyPath, /) -> None:
    """Copy a database that others may be writing to."""
    try:
        with (
            storage.writing(target) as file,
            closing(sqlite3.connect(source)) as before,
            closing(sqlite3.connect(file)) as after,
        ):
            before.backup(after)
    except (StorageError, sqlite3.Error) as error:
        log.warning("MLflow's database cannot be copied to '%s': %s", target, sentence(error))


def make(path: Path, open_client: Callable[[str], object], /) -> None:
    """Make an empty MLflow database: it appears under its name only when it is complete.

    MLflow builds it by its whole history of migrations, which would wait for the disk hundreds of times; a database
    that counts for nothing until it is whole need not wait.
    """
    if path.is_file():
        return
    from sqlalchemy import Engine, event

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    event.listen(Engine, "connect", _do_not_wait)
    try:
        open_client(f"{SQLITE}{unfinished}")
    finally:
        event.remove(Engine, "connect", _do_not_wait)
    os.replace(unfinished, path)


def _do_not_wait(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("PRAGMA synchronous = OFF")

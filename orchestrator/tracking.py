"""MLflow, in the driver only: a run with a nested run for each round, gone on with when the run is resumed.

MLflow takes seconds to import, so it is imported when a `Tracker` is made and not before.
"""

import importlib
import json
import logging
import math
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from onelabel.configs.passwords import without_password
from onelabel.configs.schema import RunConfig
from onelabel.errors import ClusterError, StorageError
from onelabel.imaging import storage
from onelabel.imaging.storage import AnyPath, StorePath
from onelabel.orchestrator import database
from onelabel.orchestrator.journal import Away, Entry, Journal, Refused

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

# MLflow would report to its makers what it is used for.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# MLflow's limits
MAX_PARAMS = 100  # a batch
MAX_TAGS = 100  # a batch
MAX_VALUE = 6000  # characters of a parameter

_RECORD = "mlflow.json"
_WAITING = "mlflow-waiting.jsonl"

# Usually MLflow tries for four minutes; nothing is lost here if it does not.
IMPATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
PATIENCE = IMPATIENCE | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "120"}  # a server may itself have to store what it gets


def preload() -> None:
    """Import MLflow in a thread, while there is other waiting to do."""
    threading.Thread(target=importlib.import_module, args=("mlflow",), daemon=True).start()


class RoundTracker:
    """The record of one round, or of a run. Its methods may be called from any thread; none fails for MLflow's sake."""

    def __init__(self, journal: Journal, name: str, ids: Callable[[str], str | None]) -> None:
        self._journal, self._name, self._ids = journal, name, ids

    @property
    def run_id(self) -> str | None:
        """MLflow's own name for the record, once it has heard of it."""
        return self._ids(self._name)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics; those that are not finite are left out."""
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        self._journal.add(self._entry("metrics", values=finite, step=step))

    def losses(self, row: Mapping[str, float]) -> None:
        """Log a row of losses at its `step`."""
        self.metrics({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))

    def artifact(self, path: AnyPath, folder: str | None = None) -> None:
        """Copy a file or a folder to the artifacts."""
        self._journal.add(self._entry("artifact", path=str(path), folder=folder))

    def close(self, status: str = "FINISHED") -> None:
        """Mark the run as finished, failed or killed."""
        self._journal.add(self._entry("end", status=status))

    def _entry(self, what: str, **content: Any) -> Entry:
        return {"what": what, "run": self._name, "time_ms": int(time.time() * 1000), **content}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A search that stops a trial, and Ctrl-C, raise what is no Exception.
        self.close("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")


class Tracker(RoundTracker):
    """The record of a run. While MLflow does not answer, what it should know waits in the run's folder.

    Parameters
    ----------
    config : RunConfig
        Without `tracking.uri` the record is a SQLite database in the run's folder, or for a run in an object store
        under ``mlruns`` here, with a copy in the run's folder after each round.
    folder : Path
        Of the run; ``mlflow.json`` in it remembers the MLflow runs, so that a resumed run goes on with them.

    Raises
    ------
    ClusterError : what answers is no MLflow, or its database cannot be used; known within seconds.
    """

    def __init__(self, config: RunConfig, folder: AnyPath) -> None:
        self._folder, self._config = folder.resolve(), config
        self.uri = _uri(config, self._folder)
        self._record = self._folder / _RECORD
        self._known: dict[str, Any] = json.loads(self._record.read_text()) if self._record.is_file() else {}
        self._client: MlflowClient | None = None
        super().__init__(Journal(self._folder / _WAITING, self._send), "", self._id)
        self._begun = False
        with _usable(self.uri):
            parameters = self._entry("parameters", values=flatten(config.model_dump(mode="json")))
            self._journal.add(self._entry("begin"), parameters, strict=True)
        self._begun = True

    def round(self, name: str) -> RoundTracker:
        """Begin the nested run of a round, or go on with the one of an earlier attempt."""
        track = RoundTracker(self._journal, name, self._id)
        self._journal.add(track._entry("begin"))
        return track

    def close(self, status: str = "FINISHED") -> None:
        super().close(status)
        self._journal.close()

    def command(self) -> str:
        """The shell command that opens the record."""
        if self.uri.startswith(("http://", "https://")):
            return shlex.join(["python", "-m", "webbrowser", self.uri])
        return database.command(self.uri, self._folder)

    def _send(self, entry: Entry) -> None:
        """Tell MLflow of an entry."""
        try:
            client = self._connect()
        except Refused as error:  # which is not for this entry's sake
            raise (Away(str(error)) if self._begun else _unusable(self.uri, error)) from error
        with _answering(), _environment(PATIENCE if entry["what"] == "artifact" else IMPATIENCE):
            if entry["what"] == "begin":
                self._begin(client, entry)
            elif run_id := self._id(entry["run"]):
                self._tell(client, run_id, entry)
        if entry["what"] == "end" and not self._config.tracking.uri and isinstance(self._folder, StorePath):
            database.copy(database.home(self._folder) / database.NAME, self._folder / database.NAME)

    def _connect(self) -> "MlflowClient":
        """A client, of a database and an experiment that are there."""
        if self._client:
            return self._client
        with _answering(), _environment(IMPATIENCE):
            artifacts, home = None, database.home(self._folder)
            if not self._config.tracking.uri:
                database.find(self._folder, home)
                database.make(home / database.NAME, open_client)
                artifacts = (home / "mlartifacts").as_uri()
            client = open_client(self.uri)
            self._experiment = _experiment(client, self._config.tracking.experiment, artifacts)
        self._client = client
        return client

    def _begin(self, client: "MlflowClient", entry: Entry) -> None:
        name, known = entry["run"], self._id(entry["run"])
        if known and _go_on(client, known):
            return
        parent, title = (self.run_id, name) if name else (self._config.tracking.parent, self._config.name)
        run = client.create_run(self._experiment, entry["time_ms"], _under(parent), title)
        if name:
            self._remember(self._known | {"rounds": self._known["rounds"] | {name: run.info.run_id}})
        else:
            self._remember({"run": run.info.run_id, "rounds": {}})

    def _tell(self, client: "MlflowClient", run_id: str, entry: Entry) -> None:
        from mlflow.entities import Metric

        if entry["what"] == "metrics":
            values, time_ms, step = entry["values"], entry["time_ms"], entry["step"]
            client.log_batch(run_id, metrics=[Metric(key, value, time_ms, step) for key, value in values.items()])
        elif entry["what"] == "artifact":
            with storage.local(storage.path_of(entry["path"])) as file:
                client.log_artifact(run_id, str(file), entry["folder"])
        elif entry["what"] == "parameters":
            _log_parameters(client, client.get_run(run_id), entry["values"])
        else:
            client.set_terminated(run_id, entry["status"], entry["time_ms"])

    def _id(self, name: str) -> str | None:
        """MLflow's name for the run, or for one of its rounds."""
        found: str | None = self._known.get("rounds", {}).get(name) if name else self._known.get("run")
        return found

    def _remember(self, ids: dict[str, Any]) -> None:
        self._known = ids
        storage.write_text(self._record, json.dumps(ids, indent=2))


class PastRun:
    """The record of a run that began earlier, to be read and to get more artifacts; its status stays what it is.

    copied : whether the folder is a copy, whose artifacts lie elsewhere

    Raises
    ------
    ClusterError
        There is no record, or MLflow cannot be reached; nothing is made in its place.
    """

    def __init__(self, config: RunConfig, folder: AnyPath) -> None:
        folder = folder.resolve()
        self.uri, record = _uri(config, folder), folder / _RECORD
        with _usable(self.uri), _answering():
            database.find(folder, database.home(folder))
        paths: list[AnyPath] = [record]
        if self.uri.startswith(database.SQLITE):
            paths.append(Path(self.uri.removeprefix(database.SQLITE).partition("?")[0]))
        for path in paths:
            if not path.is_file():
                raise ClusterError(f"the run has no record in MLflow: '{path}' does not exist")
        ids = json.loads(record.read_text())
        self._rounds: dict[str, str] = ids["rounds"]
        with _usable(self.uri), _answering(), _environment(IMPATIENCE):
            self._client, self.run_id = open_client(self.uri), ids["run"]
            place = self._client.get_run(self.run_id).info.artifact_uri
        # The database holds the place of its artifacts, which is another one in a copy of the folder.
        self.copied = not config.tracking.uri and not place.startswith(f"{database.home(folder).as_uri()}/")

    def artifact(self, path: AnyPath, folder: str | None = None) -> None:
        """Copy a file or a folder to the artifacts; what fails costs a warning."""
        try:
            with _answering(), storage.local(path) as file:
                self._client.log_artifact(self.run_id, str(file), folder)
        except (Away, Refused) as error:
            log.warning("MLflow did not take a record: %s", without_password(str(error)))

    def histories(self, names: Sequence[str], /) -> dict[str, dict[str, dict[int, float]]]:
        """Metrics by round (or ranker), name and step; of a step that a resumed run repeated, the later value."""
        with _usable(self.uri), _answering(), _environment(IMPATIENCE):
            return {
                name: {metric: self._history(run_id, metric) for metric in names}
                for name, run_id in self._rounds.items()
            }

    def _history(self, run_id: str, metric: str) -> dict[int, float]:
        found = sorted(self._client.get_metric_history(run_id, metric), key=lambda row: (row.step, row.timestamp))
        return {row.step: row.value for row in found}


def flatten(value: Any, key: str = "") -> dict[str, str]:
    """Dotted keys to values as text; a list of plain values, such as a size, stays one value.

    Examples
    --------
    >>> flatten({"size": [96, 128], "stages": [{"steps": 3}]})
    {'size': '[96, 128]', 'stages.0.steps': '3'}
    """
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {key: str(value)}
    return {
        dotted: text
        for name, part in value.items()
        for dotted, text in flatten(part, f"{key}.{name}" if key else str(name)).items()
    }


def open_client(uri: str) -> "MlflowClient":
    """MLflow's client for reading a record, such as that of `Tracker.uri`."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _under(parent: str | None) -> dict[str, str]:
    """Tags that make a run a nested one."""
    return {"mlflow.parentRunId": parent} if parent else {}


def _uri(config: RunConfig, folder: AnyPath) -> str:
    return config.tracking.uri or f"{database.SQLITE}{database.home(folder) / database.NAME}"


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    """The id of the experiment, made if need be; runs that begin at the same time may race for it."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise error
    return str(found.experiment_id)


def _go_on(client: "MlflowClient", run_id: str) -> "Run | None":
    """Set a run of an earlier attempt to running again; None if this MLflow does not hold it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("MLflow holds no run %s any more: a new one begins", run_id)
        return None
    return run


def _log_parameters(client: "MlflowClient", run: "Run", parameters: Mapping[str, str]) -> None:
    """Log parameters; MLflow's are written once, so what a resumed run changed becomes a tag."""
    from mlflow.entities import Param, RunTag

    known = run.data.params
    values = {re.sub(r"[^\w\-. :/]", "_", key): text[:MAX_VALUE] for key, text in parameters.items()}
    new = [Param(key, text) for key, text in values.items() if key not in known]
    changed = [RunTag(f"changed.{key}", text) for key, text in values.items() if known.get(key, text) != text]
    for start in range(0, len(new), MAX_PARAMS):
        client.log_batch(run.info.run_id, params=new[start : start + MAX_PARAMS])
    for start in range(0, len(changed), MAX_TAGS):
        client.log_batch(run.info.run_id, tags=changed[start : start + MAX_TAGS])


@contextmanager
def _answering() -> Iterator[None]:
    """Tell a server that is away from one that answers, but will not."""
    importlib.import_module("mlflow")  # waits for `preload`; to import a part of it meanwhile would lock both threads
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError, StorageError) as error:
        reason = without_password(str(_cause(error)).strip().partition("\n")[0])
        raise (Away if _is_away(error) else Refused)(reason) from error


def _is_away(error: BaseException | None) -> bool:
    """Whether what failed may work later: no answer, or one that says so; the trouble of a file stays."""
    if error is None:
        return False
    if getattr(error, "error_code", None) == "TEMPORARILY_UNAVAILABLE":
        return True
    silent = isinstance(error, OSError) and getattr(error, "response", None) is None and error.filename is None
    return silent or _is_away(error.__context__)


@contextmanager
def _usable(uri: str) -> Iterator[None]:
    """Say in one sentence what is wrong with MLflow."""
    try:
        yield
    except (Away, Refused) as error:
        raise _unusable(uri, error) from error


def _unusable(uri: str, reason: object) -> ClusterError:
    return ClusterError(
        f"MLflow at '{without_password(uri)}' cannot be used ({reason}); start its server, mend tracking.uri, or"
        " set tracking.uri=null to record in the folder of the run"
    )


def _cause(error: BaseException) -> BaseException:
    """The system's own word, such as `Connection refused`, if that is where the error began."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    return first if isinstance(first, OSError) else error


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""Records on their way to a server: sent in order, and kept in a file while it does not answer."""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from onelabel.configs.passwords import without_password
from onelabel.errors import OnelabelError, sentence
from onelabel.imaging import storage
from onelabel.imaging.storage import AnyPath

log = logging.getLogger(__name__)

RETRY_S = 30.0

Entry = dict[str, Any]


class Away(Exception):  # noqa: N818  it is no fault, but a state
    """The server does not answer: what it was sent may be sent again."""


class Refused(Exception):  # noqa: N818
    """The server will not take this, however often it is sent."""


class Journal:
    """Sends entries, from any thread. A server that is away, or an entry that is refused, costs a warning.

    Parameters
    ----------
    path : of the file with what waits, one JSON object a line; there as long as something does
    send : hands over one entry; raises Away or Refused. An entry may come twice, after a fault.
    """

    def __init__(self, path: AnyPath, send: Callable[[Entry], None], /) -> None:
        self._path, self._send, self._lock = path, send, threading.RLock()
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self._waiting: deque[Entry] = deque(map(json.loads, lines))
        self._filed, self._away, self._asked = bool(lines), False, 0.0

    def add(self, *entries: Entry, strict: bool = False) -> None:
        """Send entries after all that wait.

        Raises
        ------
        Refused : with `strict`.
        """
        with self._lock:
            self._waiting += entries
            if not self._away or time.monotonic() - self._asked > RETRY_S:
                self._hand_over(entries if strict else ())
            else:
                self._file()

    def close(self) -> None:
        """Try once more to send what waits, and keep the rest in the file."""
        with self._lock:
            if self._waiting:
                self._hand_over()
            if self._waiting:
                log.warning(
                    "%d records for MLflow wait in '%s': the same command hands them over when it answers",
                    len(self._waiting),
                    self._path,
                )

    def _hand_over(self, strict: Sequence[Entry] = ()) -> None:
        while self._waiting:
            try:
                self._send(self._waiting[0])
            except Away as error:
                self._asked = time.monotonic()
                if not self._away:
                    self._away = True
                    log.warning("MLflow does not answer (%s): its records wait in '%s'", error, self._path)
                self._file()
                return
            except Refused as error:
                if any(self._waiting[0] is one for one in strict):
                    raise
                log.warning("MLflow did not take a record: %s", without_password(str(error)))
            self._waiting.popleft()
        if self._away:
            log.info("MLflow answers again and has all records")
        self._away = False
        self._file()

    def _file(self) -> None:
        """Keep what waits."""
        try:
            if self._waiting:
                storage.write_text(self._path, "".join(f"{json.dumps(entry)}\n" for entry in self._waiting))
            elif self._filed:
                self._path.unlink(missing_ok=True)
            self._filed = bool(self._waiting)
        except (OnelabelError, OSError) as error:
            log.warning("records for MLflow cannot be kept in '%s': %s", self._path, sentence(error))

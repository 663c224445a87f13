"""What a user sees while a run goes on: progress bars on a terminal, plain log lines elsewhere."""

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)

# One for bars and log lines, so that lines appear above the bar. It writes to whatever stderr is at the time.
CONSOLE = Console(stderr=True)

LINE_EVERY_SHARE = 0.1
LINE_EVERY_S = 30.0
CHATTY = ("ray", "ray.data", "ray.train", "ray.tune", "mlflow", "alembic", "matplotlib", "urllib3")


class _PlainHandler(logging.StreamHandler[TextIO]):
    """Plain lines to whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def set_up_logging(verbose: bool = False) -> None:
    """Show this project's log lines, of others only warnings; a second call replaces the first."""
    # These two set their own levels when they are imported.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    handler: logging.Handler
    if CONSOLE.is_terminal:
        handler = RichHandler(console=CONSOLE, show_path=verbose, log_time_format="%X")
    else:
        handler = _PlainHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [old for old in root.handlers if not isinstance(old, RichHandler | _PlainHandler)] + [handler]
    logging.getLogger("onelabel").setLevel(logging.DEBUG if verbose else logging.INFO)


def stage(title: str) -> None:
    """A headline."""
    if CONSOLE.is_terminal:
        CONSOLE.rule(Text(title, style="bold"), align="left")
    else:
        log.info("== %s ==", title)


class Bar:
    """The progress of some work, as log lines. Its methods may be called from any thread.

    Parameters
    ----------
    name : str
    total : int
        Steps, scans or whatever the work consists of.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self._lock = threading.Lock()
        self._begin: tuple[int, float] | None = None  # steps done, s; a resumed work does not begin at 0
        self._shown, self._shown_at = 0, time.monotonic()

    def update(self, done: int, **figures: float) -> None:
        """Show that so much is done, and figures such as the loss."""
        with self._lock:
            now = time.monotonic()
            if self._begin is None:
                self._begin = (done, now)
            before, begin = self._begin
            words = [f"{key} {value:.3g}" for key, value in figures.items()]
            if before < done < self.total:
                words.insert(
                    0, f"{timedelta(seconds=round((now - begin) / (done - before) * (self.total - done)))} left"
                )
            if done > before:
                words.insert(0, _rate((done - before) / max(now - begin, 1e-9)))
            self._show(done, words)

    def close(self) -> None:
        """No more updates follow."""

    def _show(self, done: int, words: list[str]) -> None:
        now = time.monotonic()
        late = now - self._shown_at >= LINE_EVERY_S
        if done >= self.total or late or done - self._shown >= LINE_EVERY_SHARE * self.total:
            self._shown, self._shown_at = done, now
            log.info("%s", ", ".join((f"{self.name}: {done} of {self.total}", *words)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _TerminalBar(Bar):
    """The same as a bar that moves."""

    def __init__(self, name: str, total: int) -> None:
        super().__init__(name, total)
        words = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[words]"))
        self._progress = Progress(next(words), BarColumn(), MofNCompleteColumn(), *words, console=CONSOLE)
        self._task = self._progress.add_task(name, total=total, words="")
        self._progress.start()

    def close(self) -> None:
        self._progress.stop()

    def _show(self, done: int, words: list[str]) -> None:
        self._progress.update(self._task, completed=done, words=", ".join(words))


def bar(name: str, total: int) -> Bar:
    """A progress bar on a terminal; elsewhere a log line for every tenth of the work and every half minute."""
    return _TerminalBar(name, total) if CONSOLE.is_terminal else Bar(name, total)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Text and numbers as a table to print; columns of numbers are aligned to the right."""
    result = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        numeric = all(isinstance(row[place], int | float | None) for row in rows)
        result.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        result.add_row(*(_cell(value) for value in row))
    return result


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _rate(rate: float) -> str:
    return f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"

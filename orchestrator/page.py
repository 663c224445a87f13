"""The report of a run: one HTML page that needs no other file and no network."""

import base64
import errno
import html
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from onelabel import __version__
from onelabel.errors import SCAN_FAULTS, ClusterError, DataError, sentence
from onelabel.orchestrator import plots, sections, status, trust
from onelabel.orchestrator.report import Picture
from onelabel.orchestrator.sections import Run, Section
from onelabel.orchestrator.tracking import PastRun

log = logging.getLogger(__name__)

NAME = "report.html"
TEMPLATE = "report.html.j2"
ARTIFACTS = "report"  # folder in MLflow
# What a plot's colours are on the page, by day and by night.
COLOURS = {plots.INK: "currentColor", plots.BLUE: "var(--blue)", plots.VERMILLION: "var(--vermillion)"}

SECTIONS: dict[str, Callable[[Run], Section]] = {
    "Rounds": sections.rounds,
    "Losses": sections.losses,
    "Scores": trust.ranking,
    "Expected Dice": trust.expectation,
    "Scans": sections.scans,
    "What the network was trained on": sections.material,
    "Speed and waiting": sections.throughput,
    "Failed scans": sections.failures,
    "Settings": sections.settings,
}

# What files that are missing, torn or of an older version raise.
_FAULTS = (*SCAN_FAULTS, LookupError)


def write(folder: Path, out: Path | None = None, /) -> Path:
    """Write the report of a run, finished or not; what is missing is a sentence in it.

    Parameters
    ----------
    folder : of the run
    out : the file to write. By default `report.html` in the folder; the page and its pictures then become artifacts of
        the run in MLflow, too.

    Returns
    -------
    The page.

    Raises
    ------
    DataError : the folder holds no run, or the page cannot be written.
    ConfigError : the run's record does not fit this version.
    """
    run = Run(folder, status.settings(folder))
    page = out or folder / NAME
    with _complete(page) as unfinished:
        made = {title: _section(make, run) for title, make in SECTIONS.items()}
        unfinished.write_text(_render(run, made), encoding="utf-8")
    if out is None:
        _record(run, page, [picture for section in made.values() for picture in _pictures(section)])
    return page


def _section(make: Callable[[Run], Section], run: Run) -> Section:
    """A section, or a sentence on why there is none."""
    try:
        return make(run)
    except _FAULTS as error:
        return Section(notes=[f"This part cannot be shown: {sentence(error)}"])


def _facts(run: Run) -> list[sections.Fact]:
    try:
        return sections.facts(run)
    except _FAULTS as error:
        return [("rounds done", "–", f"unknown: {sentence(error)}")]


def _pictures(section: Section) -> list[Picture]:
    return [*section.pictures, *(picture for part in section.parts.values() for picture in _pictures(part))]


def _render(run: Run, made: dict[str, Section]) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": _cell, "embed": _embed}
    return environment.get_template(TEMPLATE).render(
        name=run.config.name,
        folder=run.folder.resolve(),
        facts=_facts(run),
        sections=made,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _embed(picture: Picture) -> str:
    """A picture as part of the page, which gives a plot its colours."""
    alt = html.escape(picture.alt)
    if not picture.plot:
        data = base64.b64encode(picture.data).decode()
        return f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    text = picture.data.decode()
    head, _, body = text[text.index("<svg") :].partition(">")
    (box,) = re.findall(r'viewBox="[^"]*"', head)
    for colour, shown in COLOURS.items():
        body = body.replace(colour, shown)
    # Ids are unique in a file, and must be so on the page.
    prefix = picture.name.removesuffix(".svg")
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", body)
    return f'<svg role="img" aria-label="{alt}" {box}>{body}'


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A file to write, which appears under its name when it is complete; DataError at once where it cannot."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    except OSError as error:
        raise DataError(f"'{path}' cannot be written ({error.strerror}); name another file by --out") from None
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _record(run: Run, page: Path, pictures: list[Picture]) -> None:
    """Make the page and its pictures artifacts of the run."""
    try:
        past = PastRun(run.config, run.folder)
    except ClusterError as error:
        log.warning("the report is not in MLflow: %s", error)
        return
    if past.copied:
        log.warning("the report is not in MLflow: '%s' is a copy of the run", run.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / ARTIFACTS
        folder.mkdir()
        for picture in pictures:
            (folder / picture.name).write_bytes(picture.data)
        past.artifact(folder)
    past.artifact(page)

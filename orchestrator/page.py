"""The report of a run: one HTML page that needs no other file and no network."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from onelabel.errors import SCAN_FAULTS, ClusterError, sentence
from onelabel.imaging.storage import AnyPath
from onelabel.orchestrator import markup, sections, status, trust
from onelabel.orchestrator.report import Picture
from onelabel.orchestrator.sections import Run, Section
from onelabel.orchestrator.tracking import PastRun

log = logging.getLogger(__name__)

NAME = "report.html"
TEMPLATE = "report.html.j2"
ARTIFACTS = "report"  # folder in MLflow

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


def write(folder: AnyPath, out: AnyPath | None = None, /) -> AnyPath:
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
    with markup.complete(page) as unfinished:
        made = {title: _section(make, run) for title, make in SECTIONS.items()}
        markup.write(
            unfinished, TEMPLATE, name=run.config.name, folder=folder.resolve(), facts=_facts(run), sections=made
        )
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


def _record(run: Run, page: AnyPath, pictures: list[Picture]) -> None:
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

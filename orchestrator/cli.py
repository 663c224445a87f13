"""The command line. Imports stand inside the commands, so that help is instant."""

import gc
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from onelabel import __version__
from onelabel.errors import OnelabelError

if TYPE_CHECKING:
    from onelabel.orchestrator.driver import Outcome
    from onelabel.orchestrator.status import RoundStatus

app = typer.Typer(
    help="Train a 3D segmentation network from one labelled scan, and know which of its masks to trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_NAMED_FAILURES = 20
_WIDE = 200
_APART = ("system", "class", "group")
_MEASURED = {
    "dice": "Dice\nmean",
    "low": "95 %\nfrom",
    "high": "\nto",
    "hd95_mm": "HD95\nmean, mm",
    "asd_mm": "ASD\nmean, mm",
    "volume_difference_percent": "volume\ndifference, %",
}


def main() -> None:
    """Run the command line: what a user can mend ends as one line on stderr and exit code 2."""
    try:
        app(prog_name="onelabel")
    except OnelabelError as error:
        typer.echo(" ".join(str(error).split()), err=True)
        sys.exit(2)
    finally:
        gc.freeze()  # the process ends: looking for cycles among torch's modules would take half a second


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onelabel {__version__}")
        raise typer.Exit


@app.callback()
def prepare(
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more about what happens.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Set up what all commands share."""
    from onelabel.orchestrator.console import set_up_logging

    set_up_logging(verbose)


@app.command()
def run(
    items: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG|KEY=VALUE", help="YAML files or presets, then settings; later ones win."),
    ],
) -> None:
    """Train: all stages of a configuration, or what is left of them."""
    from onelabel.configs.load import load
    from onelabel.orchestrator import driver

    _finish(driver.run(load(items)))


@app.command()
def search(
    items: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG|KEY=VALUE", help="YAML files or presets, then settings; later ones win."),
    ],
) -> None:
    """Try settings, each as a run, and say which are best; the same command goes on."""
    from onelabel.configs.load import load
    from onelabel.orchestrator import search as searching
    from onelabel.orchestrator import surface

    found = searching.search(load(items))
    table = surface.table(found.trials, found.objective)
    _show("Trials, the best first", table.columns, table.rows)
    for what, place in found.places().items():
        typer.echo(f"{what}: {place}")
    raise typer.Exit(bool(found.failed))


@app.command()
def submit(
    items: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG|KEY=VALUE", help="As for `run`; paths must mean the same on the cluster."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of the cluster's dashboard; by default RAY_API_SERVER_ADDRESS."),
    ] = None,
    status: Annotated[str | None, typer.Option(metavar="JOB", help="Say how a job is, and end.")] = None,
    stop: Annotated[str | None, typer.Option(metavar="JOB", help="Stop a job, and end.")] = None,
) -> None:
    """Train on a cluster: `run`, or `search` where one is set, as a Ray job, whose log is followed.

    onelabel submit singlestrip data.labelled=/shared/head.nii.gz ... --address http://HEAD:8265
    """
    if bool(items) + (status is not None) + (stop is not None) != 1:
        raise typer.BadParameter("give a CONFIG, or --status JOB, or --stop JOB")
    from onelabel.cluster.submit import Jobs, exit_code
    from onelabel.configs.load import load

    config = load(items) if items else None
    jobs = Jobs(address)
    if config is None:
        details = jobs.details(status) if status else jobs.stop(stop or "")
        typer.echo(f"{status or stop}: {details.status.lower()}")
        return
    job = jobs.submit(config)
    typer.echo(f"job {job}", err=True)
    try:
        details = jobs.follow(job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        if _wants(f"stop job {job}?"):
            jobs.stop(job)
        else:
            typer.echo(f"job {job} goes on; see it with --status {job}, end it with --stop {job}", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"job {job} {details.status.lower()}", err=True)
    raise typer.Exit(exit_code(details))


@app.command()
def preview(
    items: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG|KEY=VALUE", help="YAML files or presets, then settings; later ones win."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the sheet and the samples.")] = Path("preview"),
    count: Annotated[int, typer.Option(min=1, max=100, help="Samples.")] = 24,
) -> None:
    """Show what the network will see: samples of the first stage."""
    from onelabel.configs.load import load
    from onelabel.orchestrator import preview as previewing

    typer.echo(previewing.preview(load(items), out, count=count))


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="Folder of the demo's scans; fetched when not given.")] = None,
    storage: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
) -> None:
    """Run the whole method on a few public heads."""
    from onelabel.orchestrator import demo as demonstration

    made = demonstration.run_demo(storage=storage, data=data)
    for table in demonstration.tables(made):
        _show(*table)
    for what, place in demonstration.places(made):
        typer.echo(f"{what}: {place}")
    _finish(made.outcome)


@app.command()
def strip(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Scans: files, folders, globs, manifests, BIDS datasets; paths or URIs."),
    ],
    out: Annotated[str, typer.Option(help="Folder or URI for the masks and strip.parquet.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A checkpoint folder, or the folder of a run; by default onelabel's own."),
    ] = None,
    image: Annotated[bool, typer.Option("--image", help="Write the stripped image too.")] = False,
    distance: Annotated[bool, typer.Option("--distance", help="Write the signed distance to the edge, in mm.")] = False,
    border: Annotated[float, typer.Option(metavar="MM", help="Move the mask's edge outwards; inwards if < 0.")] = 0.0,
    each_frame: Annotated[
        bool, typer.Option("--each-frame", help="4D: a mask for each volume, not one of their mean.")
    ] = False,
    subject: Annotated[list[str] | None, typer.Option(help="BIDS: only this subject; may be given again.")] = None,
    session: Annotated[list[str] | None, typer.Option(help="BIDS: only this session; may be given again.")] = None,
    suffix: Annotated[list[str] | None, typer.Option(help="BIDS: only this suffix, such as T1w.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Scans at a time; by default as many as there are CPUs, or GPUs.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the network runs.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads a worker; by default all of one, 1 of several.")
    ] = None,
    trust: Annotated[bool, typer.Option(help="Say what Dice to expect of each mask.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew instead of going on.")] = False,
) -> None:
    """Write a mask for every scan, in the scan's own grid, and say how far to trust it.

    The same command again does only what is missing. A BIDS dataset becomes derivatives:

    onelabel strip study/ --out study/derivatives/onelabel
    """
    from onelabel.imaging.storage import path_of
    from onelabel.orchestrator import strip as stripping
    from onelabel.tasks.strip_worker import Settings

    outcome = stripping.strip(
        inputs,
        out=out,
        checkpoint=path_of(checkpoint) if checkpoint else None,
        settings=Settings(device, threads, trust, border, each_frame),
        where=stripping.entities(subject, session, suffix),
        image=image,
        distance=distance,
        overwrite=overwrite,
        workers=workers,
    )
    for count, state, words in outcome.reasons:
        typer.echo(f"{count} {state}: {words}", err=True)
    before = f" ({outcome.kept} of them before)" if outcome.kept else ""
    typer.echo(
        f"{outcome.stripped} stripped{before}, {outcome.flagged} flagged, {outcome.failed} failed: {outcome.table}"
    )
    raise typer.Exit(bool(outcome.failed))


@app.command()
def rank(
    masks: Annotated[str, typer.Argument(help="Masks of any tool: a folder, a glob, a manifest or one file.")],
    image: Annotated[Path, typer.Option(help="The labelled scan.")],
    mask: Annotated[Path, typer.Option(help="Its true mask.")],
    out: Annotated[Path, typer.Option(help="Table to write, .parquet or .csv.")],
    images: Annotated[str | None, typer.Option(help="Scans of the masks, named like them; needs --checkpoint.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="PATH", help="A checkpoint or run folder whose network looks at the scans.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="CONFIG|KEY=VALUE", help="Change the preset `rank`."),
    ] = None,
) -> None:
    """Say which masks to trust: a score, an expected Dice and flags for each, learned from one labelled scan."""
    from onelabel.imaging.storage import path_of
    from onelabel.orchestrator import rank as ranking

    network = path_of(checkpoint) if checkpoint else None
    table = ranking.rank(
        masks, image=image, mask=mask, out=out, images=images, segmenter=network, settings=settings or ()
    )
    rows = table.to_pylist()
    errors = [row for row in rows if row["error"]]
    columns = ("key", "score", "expected_dice", "expected_low", "expected_high", "flag", "flags")
    worst = [row for row in rows if not row["error"]][-_NAMED_FAILURES:][::-1]
    shown = [tuple(row[name] for name in columns) for row in worst]
    _show("The masks to look at first", ("mask", "score", "expected\nDice", "90 %\nfrom", "\nto", "low", "seen"), shown)
    for row in errors[:_NAMED_FAILURES]:
        typer.echo(f"{row['key']}: {row['error']}", err=True)
    flagged = sum(bool(row["flag"] or row["flags"]) for row in rows)
    typer.echo(f"{len(rows)} masks, {flagged} flagged, {len(errors)} errors: {out}")
    raise typer.Exit(bool(errors))


@app.command()
def evaluate(
    predictions: Annotated[str, typer.Argument(help="Masks: a folder, a glob, a manifest or one file.")],
    truth: Annotated[str, typer.Argument(help="True masks, given likewise.")],
    out: Annotated[Path, typer.Option(help="Table to write, .parquet or .csv.")],
    against: Annotated[list[str] | None, typer.Option(help="Masks of another system; may be given again.")] = None,
    by: Annotated[str | None, typer.Option(help="Column of the truth's manifest that groups scans.")] = None,
) -> None:
    """Measure masks against the truth, scan by scan, and systems against each other."""
    from onelabel.orchestrator import evaluate as evaluating

    evaluating.check_target(out)
    groups = evaluating.groups_of(truth, by) if by else None
    systems = list(dict.fromkeys([predictions, *(against or [])]))
    rows = [row for one in systems for row in evaluating.evaluate(one, truth, groups=groups, system=one)]
    evaluating.write(rows, out)
    errors = [row for row in rows if row["error"]]
    for row in errors[:_NAMED_FAILURES]:
        typer.echo(f"{row['key']}: {row['error']}", err=True)
    _show_agreement(evaluating.summarise(rows))
    compared = evaluating.compare_systems(rows)
    if compared:
        rounded = [row | {name: f"{row[name]:.2g}" for name in ("p", "p_holm")} for row in compared]
        _show("Paired differences", tuple(compared[0]), [tuple(row.values()) for row in rounded])
    misses = sum(bool(row["miss"]) for row in rows)
    scans = len({row["key"] for row in rows})
    typer.echo(f"{scans} scans, {misses} misses, {len(errors)} errors: {out}")
    raise typer.Exit(bool(errors))


@app.command()
def status(folder: Annotated[str, typer.Argument(help="Folder of a run: path or URI.")]) -> None:
    """Show how far a run is, and how good."""
    from onelabel.imaging.storage import path_of
    from onelabel.orchestrator.status import read

    _show_rounds(read(path_of(folder)))


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="Folder of a run: path or URI.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; report.html in the folder when not given.")] = None,
) -> None:
    """Write a page with the figures, plots and masks of a run."""
    from onelabel.imaging.storage import path_of
    from onelabel.orchestrator import page

    typer.echo(page.write(path_of(folder), out))


def _wants(question: str) -> bool:
    """Ask on a terminal; elsewhere, or at another Ctrl-C, the answer is no."""
    try:
        return sys.stdin.isatty() and typer.confirm(question, err=True)
    except typer.Abort:
        return False


def _finish(outcome: "Outcome") -> None:
    """What a run came to, and the exit code."""
    from onelabel.orchestrator.status import read

    _show_rounds(read(outcome.folder))
    typer.echo(f"folder: {outcome.folder}")
    if outcome.report.is_file():
        typer.echo(f"report: {outcome.report}")
    typer.echo(f"losses and measures: {outcome.mlflow_command}")
    if outcome.failures:
        typer.echo(f"{outcome.failures} scans failed: their rows in scores.parquet say why", err=True)
    raise typer.Exit(bool(outcome.failures))


def _show_rounds(rounds: "Sequence[RoundStatus]") -> None:
    from onelabel.orchestrator.status import COLUMNS

    _show("Rounds", COLUMNS, [now.cells() for now in rounds])


def _show_agreement(summary: Sequence[Mapping[str, Any]]) -> None:
    """A row for each system, class and group; what does not tell them apart is left out."""
    if not summary:
        return
    names = [name for name in summary[0] if name not in _APART or len({row[name] for row in summary}) > 1]
    titles = tuple(_MEASURED.get(name, name) for name in names)
    _show("Agreement", titles, [tuple(row[name] for name in names) for row in summary])


def _show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console

    from onelabel.orchestrator.console import table

    # A file or a pipe has no width to fit into.
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table(title, columns, rows))

"""Pages of one file: a template filled in, its pictures part of it, complete as soon as it has its name."""

import base64
import errno
import html
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from onelabel import __version__
from onelabel.errors import DataError
from onelabel.imaging import storage
from onelabel.imaging.storage import AnyPath, StorePath
from onelabel.orchestrator import plots
from onelabel.orchestrator.report import Picture

# What a plot's colours are on the page, by day and by night.
COLOURS = {plots.INK: "currentColor", plots.BLUE: "var(--blue)", plots.VERMILLION: "var(--vermillion)"}


def write(path: Path, template: str, /, **values: Any) -> None:
    """Fill in a template of this folder, piece by piece; `written` and `version` are known to all of them."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": _cell, "embed": embed}
    made = environment.get_template(template).stream(
        **values, written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), version=__version__
    )
    made.dump(str(path), encoding="utf-8")


def embed(picture: Picture, /) -> str:
    """A picture as part of the page, which gives a plot its colours."""
    alt = html.escape(picture.alt)
    if not picture.plot:
        data = base64.b64encode(picture.data).decode()
        return f'<img alt="{alt}" decoding="async" src="data:image/png;base64,{data}">'
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
def complete(path: AnyPath, /) -> Iterator[Path]:
    """A file to write, which appears under its name when it is complete; DataError at once where it cannot."""
    if isinstance(path, StorePath):
        with storage.writing(path) as unfinished:
            yield unfinished
        return
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


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

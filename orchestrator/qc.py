"""The quality page of a stripped cohort: the masks to look at first on top, with what to expect of each."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from onelabel.errors import DataError
from onelabel.orchestrator import markup, plots
from onelabel.orchestrator.report import Picture, Row
from onelabel.tasks.strip_record import Reasons

NAME = "qc.html"
TEMPLATE = "qc.html.j2"
MOST_CARDS = 1000  # of scans that failed, and of those that did not
ENOUGH_SCANS = 3  # for a plot
BATCH_ROWS = 64  # read at a time, with their pictures

SECONDS = ("seconds_load", "seconds_predict", "seconds_trust", "seconds_save")
WORDS = ("key", "image", "structures_ml", "flags", "error_class", "error")
NUMBERS = ("volume_ml", "score", "expected_dice", "expected_low", "expected_high", *SECONDS)

Fact = tuple[str, str, str]  # a title, a figure, more about it


def write(table_path: str | Path, html_path: Path, /, *, store: fs.FileSystem | None = None, place: str = "") -> Path:
    """Write the quality page of a table of masks, with nothing but the table at hand.

    Of a cohort of any size the page shows the worst: `MOST_CARDS` masks and as many failures; no other picture is
    held in memory.

    Parameters
    ----------
    table_path : `strip.parquet`; where columns other than `key` are missing or null, the page says nothing of them
    html_path : the file to write
    store, place : where the table is a path, and what that is called; by default this machine, and the table's folder

    Returns
    -------
    The page.

    Raises
    ------
    DataError : the table cannot be read, or the page cannot be written.
    """
    place = place or str(Path(table_path).resolve().parent)
    table = _read(str(table_path), store)
    places = _worst_first(table)
    failed = _failed(table)
    shown = np.concatenate([part[:MOST_CARDS] for part in (places[failed[places]], places[~failed[places]])])
    rows = table.take(pa.array(shown)).to_pylist()
    pictures = _pictures(str(table_path), store, set(shown.tolist()))
    with markup.complete(html_path) as unfinished:
        markup.write(
            unfinished,
            TEMPLATE,
            name=f"Masks in {place.partition('?')[0].rstrip('/').rpartition('/')[2]}",
            folder=place,
            facts=_facts(table, failed),
            reasons=_reasons(table),
            plots=_plots(table, failed),
            cards=(_card(row, pictures.get(place)) for row, place in zip(rows, shown.tolist(), strict=True)),
            count=len(rows),
            hidden=table.num_rows - len(rows),
        )
    return html_path


def _read(path: str, store: fs.FileSystem | None) -> pa.Table:
    """All but the pictures; columns that are missing are null."""
    try:
        known = pq.read_schema(path, filesystem=store).names
        wanted = [name for name in (*WORDS, *NUMBERS, "flag") if name in known]
        table = pq.read_table(path, columns=wanted, filesystem=store)
        if "key" not in known:
            raise DataError(f"'{path}' has the columns {', '.join(known)}: a table of masks needs 'key'.")
        types = dict.fromkeys(WORDS, pa.string()) | dict.fromkeys(NUMBERS, pa.float64()) | {"flag": pa.bool_()}
        columns = {
            name: table[name].cast(kind) if name in known else pa.nulls(table.num_rows, kind)
            for name, kind in types.items()
        }
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"'{path}' cannot be read as a table of masks ({error}): strip the scans again.") from None
    return pa.table(columns | {"flag": columns["flag"].fill_null(False)})


def _failed(table: pa.Table) -> plots.Rows:
    """(n,): which scans have no mask."""
    rows: plots.Rows = pc.is_valid(table["error"]).to_numpy()
    return rows


def _worst_first(table: pa.Table) -> NDArray[np.int64]:
    """(n,) rows: what failed, then what is flagged; each by expected Dice, by score and by key, the unknown last."""
    orders = {"failed": "descending", "flag": "descending"} | dict.fromkeys(
        ("expected_dice", "score", "key"), "ascending"
    )
    whole = table.append_column("failed", pc.is_valid(table["error"]))
    places: NDArray[np.int64] = pc.sort_indices(whole, sort_keys=[*orders.items()]).to_numpy().astype(np.int64)
    return places


def _pictures(path: str, store: fs.FileSystem | None, places: set[int]) -> dict[int, bytes]:
    """The pictures of some rows, by row."""
    found: dict[int, bytes] = {}
    with pq.ParquetFile(path, filesystem=store) as file:
        if "picture" not in file.schema_arrow.names:
            return found
        place = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=["picture"]):
            for picture in batch["picture"]:
                if place in places and picture.is_valid:
                    found[place] = picture.as_py()
                place += 1
    return found


def _facts(table: pa.Table, failed: plots.Rows) -> list[Fact]:
    """What stands at the top of the page."""
    count, masks = table.num_rows, int((~failed).sum())
    flagged = int((table["flag"].to_numpy() & ~failed).sum())
    facts = [
        ("stripped", f"{masks} of {count}", _middle(table, "volume_ml", "median volume {:,.0f} ml")),
        ("flagged", str(flagged), f"{flagged / masks:.1%} of the masks" if masks else ""),
        ("failed", str(count - masks), f"{(count - masks) / count:.1%} of the scans have no mask" if count else ""),
    ]
    expected = _middle(table, "expected_dice", "{:.3f}")
    if expected:
        facts.append(
            ("expected Dice, median", expected, _middle(table, "expected_dice", "nine in ten above {:.3f}", 0.1))
        )
    return facts


def _middle(table: pa.Table, column: str, words: str, share: float = 0.5) -> str:
    """A quantile of a column in words, or nothing where all is unknown."""
    values = _known(table, column)
    return words.format(np.quantile(values, share)) if len(values) else ""


def _known(table: pa.Table, column: str) -> plots.Values:
    values: plots.Values = table[column].to_numpy()
    return values[np.isfinite(values)]


def _reasons(table: pa.Table) -> list[tuple[int, str, str]]:
    """How many scans, whether they failed or are flagged, and why; of each the most common, first the failures."""
    reasons = Reasons()
    few = table.select(["image", "flags", "flag", "error"]).filter(pc.or_(table["flag"], pc.is_valid(table["error"])))
    for batch in few.to_batches(max_chunksize=BATCH_ROWS):
        for row in batch.to_pylist():
            reasons.add(row)
    return [*reasons.most_common("failed"), *reasons.most_common("flagged")]


def _plots(table: pa.Table, failed: plots.Rows) -> list[Picture]:
    """How volumes and expected Dice are distributed, where enough of them are known."""
    pictures = []
    flagged = table["flag"].to_numpy()
    for column, title, axis in (
        ("volume_ml", "Volume", "volume, ml"),
        ("expected_dice", "Expected Dice", "expected Dice"),
    ):
        values = table[column].to_numpy()
        known = np.isfinite(values) & ~failed
        if known.sum() >= ENOUGH_SCANS:
            parts = {"not flagged": values[known & ~flagged], "flagged": values[known & flagged]}
            pictures.append(plots.histogram(column, parts, title=f"{title} of {known.sum()} masks", axis=axis))
    return pictures


def _card(row: Row, picture: bytes | None) -> dict[str, Any]:
    """What the page shows of a scan."""
    state = "failed" if row["error"] is not None else "flagged" if row["flag"] else ""
    alt = f"Three slices of {row['key']} with the outline of its mask."
    return {
        "key": row["key"],
        "state": state,
        "words": row["error"] or row["flags"] or "",
        "figures": list(_figures(row)) if state != "failed" else [],
        "picture": picture and Picture("slices.png", alt, picture),
    }


def _figures(row: Row) -> Iterator[tuple[str, str]]:
    if row["volume_ml"] is not None:
        yield "volume", f"{row['volume_ml']:,.0f} ml"
    for name, volume_ml in json.loads(row["structures_ml"] or "{}").items():
        yield name, f"{volume_ml:,.1f} ml"
    if row["expected_dice"] is not None:
        known = row["expected_low"] is not None and row["expected_high"] is not None
        interval = f" ({row['expected_low']:.3f} to {row['expected_high']:.3f})" if known else ""
        yield "expected Dice", f"{row['expected_dice']:.3f}{interval}"
    elif row["score"] is not None:
        yield "score", f"{row['score']:.3f}"
    seconds: Sequence[float] = [row[name] for name in SECONDS if row[name] is not None]
    if seconds:
        yield "time", f"{sum(seconds):.1f} s"

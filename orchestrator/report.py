"""Pictures of masks and bins, to be judged at a glance."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from onelabel.errors import DataError
from onelabel.imaging import volume
from onelabel.imaging.labels import AIR, BinnedScan, label_map

Row = Mapping[str, Any]  # key, image, mask; label, score, dice and error where there are such

BACKGROUND, TEXT, FAINT = "#101418", "#f2f2f2", "#9aa5b1"
MASK, TRUTH = "#ffb000", "#33ccff"
STRUCTURES = ("Oranges_r", "Greens_r", "Purples_r", "Reds_r")  # in turn, for their bins
TILE_INCHES = 3.4
TITLE_INCHES = 0.6
DPI = 150
TILE_DPI = 110  # of a tile by itself, of which a page holds many
MARGIN_MM = 25  # shown around the mask: enough to see the skull
GAP_MM = 4  # between the views of a tile
KEY_LENGTH = 17  # characters: what a tile has room for
SHOWN = 4  # of the best scans, and of the worst


Words = tuple[str, str, int, str]  # text, colour, size in points, weight


@dataclass(frozen=True)
class Picture:
    """The content of an SVG or PNG file, its name, in words what it shows, and what may stand below it."""

    name: str
    alt: str
    data: bytes
    caption: str = ""

    @property
    def plot(self) -> bool:
        """Whether it is an SVG."""
        return self.name.endswith(".svg")


@dataclass(frozen=True)
class _View:
    """A slice, gray or RGB: the first axis runs to the right of the picture, the second up."""

    image: NDArray[Any]
    outlines: dict[str, NDArray[Any]]  # colour -> label map
    edges_mm: tuple[float, float]  # of a pixel

    @property
    def size_mm(self) -> tuple[float, float]:
        return self.image.shape[0] * self.edges_mm[0], self.image.shape[1] * self.edges_mm[1]


def contact_sheet(
    rows: Sequence[Row], out: Path, /, *, title: str, columns: int = 4, headings: Mapping[int, str] | None = None
) -> None:
    """Draw a tile for each scan: coronal, sagittal and axial slice through the centre of its mask, or of the scan.

    Parameters
    ----------
    rows : sequence of mappings
        With `key` and `image`, and where known `mask` and `label` (paths, on the image's voxel grid), `score` and
        `dice`; those with an `error` are left out.
    out : Path
        The PNG to write.
    title : str
    columns : int
        Tiles side by side.
    headings : mapping from int to str
        Words in the tile of a row, by its place.

    Raises
    ------
    DataError
        An image or a mask cannot be read.
    """
    shown = [row for row in rows if not row.get("error")]
    _draw(shown, out, title=title, columns=columns, headings=headings or {})


def best_and_worst(rows: Sequence[Row], out: Path, /, *, k: int = SHOWN, title: str) -> None:
    """Draw the scans with the highest scores above those with the lowest; each from its extreme inwards.

    Scans without a mask or a score are left out, and none is shown twice.
    """
    ranked = [row for row in rows if _has_mask(row) and _finite(row.get("score"))]
    ranked.sort(key=lambda row: (-row["score"], row["key"]))
    best, worst = ranked[:k], ranked[k:][::-1][:k]
    headings = {0: "highest scores"} | ({len(best): "lowest scores"} if worst else {})
    _draw(best + worst, out, title=title, columns=k, headings=headings)


def tile(row: Row, /) -> bytes:
    """A PNG of one scan, as in `contact_sheet`.

    Raises
    ------
    DataError
        The image or the mask cannot be read.
    """
    return _png(_views(row), _words(row))


def bins(scan: BinnedScan, counts: tuple[int, int], /, *, spacing_mm: tuple[float, float, float]) -> bytes:
    """A PNG of a scan's intensity bins, from dark to bright: blue outside, orange and others inside, air black.

    Parameters
    ----------
    scan : on the network's grid
    counts : bins outside, bins inside each structure
    spacing_mm : of the grid
    """
    outside, inside = counts
    each = (outside, *[inside] * (len(scan.tables) - 1))
    ramps = [
        colormaps[name](np.linspace(0.1, 0.9, count))[:, :3]
        for name, count in zip(chain(["Blues_r"], cycle(STRUCTURES)), each, strict=False)
    ]
    colours = np.concatenate([np.zeros((AIR + 1, 3)), *ramps])
    views = _cut(colours[label_map(scan, each)], {MASK: scan.target > 0}, np.array(spacing_mm))
    words = [(f"{inside} bins inside", MASK, 12, "bold"), (f"{outside} bins outside", TRUTH, 12, "bold")]
    return _png([replace(view, outlines={}) for view in views], words)


def _png(views: Sequence[_View], words: Sequence[Words]) -> bytes:
    """A tile by itself."""
    figure = Figure(figsize=(TILE_INCHES, TILE_INCHES), facecolor=BACKGROUND)
    _draw_planes(figure.add_axes((0, 0, 1, 1)), views, words)
    content = io.BytesIO()
    figure.savefig(content, dpi=TILE_DPI, facecolor=BACKGROUND)
    return content.getvalue()


def _has_mask(row: Row) -> bool:
    return bool(row.get("mask")) and not row.get("error")


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _draw(rows: Sequence[Row], out: Path, *, title: str, columns: int, headings: Mapping[int, str]) -> None:
    """Draw tiles row by row; headings stand left of the tiles whose place they name."""
    columns = max(2, min(columns, len(rows)))
    lines = max(1, math.ceil(len(rows) / columns))
    width, height = columns * TILE_INCHES, lines * TILE_INCHES + TITLE_INCHES
    figure = Figure(figsize=(width, height), facecolor=BACKGROUND)
    y = 1 - 0.45 * TITLE_INCHES / height
    figure.text(0.012, y, title, color=TEXT, fontsize=15, weight="bold", va="center")
    if not rows:
        figure.text(0.5, 0.45, "nothing to show", color=FAINT, fontsize=14, ha="center")
    for place, row in enumerate(rows):
        line, column = divmod(place, columns)
        left, top = column / columns, lines - 1 - line
        area = (left, top * TILE_INCHES / height, 1 / columns, TILE_INCHES / height)
        _draw_tile(figure.add_axes(area), row, headings.get(place, " " if headings else None))
    handles = [Line2D([], [], color=MASK, lw=2.5, label="mask")]
    if any(row.get("label") for row in rows):
        handles.append(Line2D([], [], color=TRUTH, lw=2.5, label="truth"))
    figure.legend(
        handles=handles,
        loc="center right",
        bbox_to_anchor=(1, y),
        ncols=2,
        frameon=False,
        labelcolor=TEXT,
        fontsize=12,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=DPI, facecolor=BACKGROUND)


def _draw_tile(axes: Axes, row: Row, heading: str | None) -> None:
    """Draw a scan, with a heading above its words."""
    _draw_planes(axes, _views(row), [*([(heading, TEXT, 12, "bold")] if heading else []), *_words(row)])


def _words(row: Row) -> list[Words]:
    """The key of a scan and its figures."""
    figures = [
        (f"{name} {row[name.lower()]:.3f}", colour, 13, "bold")
        for name, colour in (("score", MASK), ("Dice", TRUTH))
        if _finite(row.get(name.lower()))
    ]
    return [(_short(row["key"]), FAINT, 8, "normal"), *figures]


def _draw_planes(axes: Axes, views: Sequence[_View], words: Sequence[Words]) -> None:
    """Draw coronal (top left), sagittal (top right), axial (bottom left); words fill the fourth place."""
    coronal, sagittal, axial = views
    right, low = coronal.size_mm[0] + GAP_MM, -axial.size_mm[1] - GAP_MM
    for view, corner in ((coronal, (0.0, 0.0)), (sagittal, (right, 0.0)), (axial, (0.0, low))):
        _draw_view(axes, view, corner)
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.set_xlim(-GAP_MM, right + sagittal.size_mm[0] + GAP_MM)
    axes.set_ylim(low - GAP_MM, coronal.size_mm[1] + GAP_MM)

    for x, y in ((3.0, 3.0), (3.0, low + 3.0)):
        axes.text(x, y, "L", color=FAINT, fontsize=9)

    for line, (text, colour, size, weight) in enumerate(words):
        below = (0, -6 - 20 * line)
        place = (right + 2, -GAP_MM)
        style: dict[str, Any] = {"color": colour, "fontsize": size, "weight": weight, "va": "top", "parse_math": False}
        axes.annotate(text, place, below, textcoords="offset points", **style)


def _draw_view(axes: Axes, view: _View, corner: tuple[float, float]) -> None:
    """Draw a slice and its outlines, its lower left corner at a place in mm."""
    (x, y), (width, height) = corner, view.size_mm
    axes.imshow(
        view.image.swapaxes(0, 1),
        cmap="gray",
        vmin=0,
        vmax=1,
        origin="lower",
        extent=(x, x + width, y, y + height),
        interpolation="bilinear",
    )
    for colour, mask in view.outlines.items():
        for structure in np.unique(mask[mask > 0]):
            padded = np.pad(mask == structure, 1).T.astype(float)  # closes outlines at the edge
            xs, ys = (
                start + (np.arange(n + 2) - 0.5) * edge
                for start, n, edge in zip(corner, mask.shape, view.edges_mm, strict=True)
            )
            axes.contour(xs, ys, padded, levels=[0.5], colors=[colour], linewidths=1.2 if colour == MASK else 1.8)


def _views(row: Row) -> list[_View]:
    """The slices of a scan with the outlines of its mask and its truth."""
    image = volume.reorient(volume.load(row["image"]))
    paths = {TRUTH: row.get("label"), MASK: row.get("mask")}  # the mask is drawn over the truth
    outlines = {colour: volume.reorient(volume.load(path, labels=True)).data for colour, path in paths.items() if path}
    for colour, mask in outlines.items():
        if mask.shape != image.shape:
            raise DataError(f"{paths[colour]} has shape {mask.shape}, its image {image.shape}: they must be equal.")
    return _cut(volume.scale(image.data), outlines, np.array(image.spacing_mm))


def _cut(data: NDArray[Any], outlines: dict[str, NDArray[Any]], spacing_mm: NDArray[np.float64]) -> list[_View]:
    """Coronal, sagittal and axial slice through the centre of the mask, cut to its surroundings.

    data : (*size) gray or (*size, 3) RGB, in [0, 1]; outlines : colour -> (*size), above 0 where a structure is
    """
    box, centre = _around(outlines.get(MASK, np.zeros(data.shape[:3], bool)) > 0, spacing_mm)
    views = []
    for across in (1, 0, 2):
        place = centre[across]
        slices = {colour: np.take(mask[box], place, across) for colour, mask in outlines.items()}
        right, up = np.delete(spacing_mm, across).tolist()
        views.append(_View(np.take(data[box], place, across), slices, (right, up)))
    return views


def _around(mask: NDArray[np.bool_], spacing_mm: NDArray[np.float64]) -> tuple[tuple[slice, ...], list[int]]:
    """A box with a margin around the mask, and the voxel within the box at the mask's centre of mass."""
    found = np.argwhere(mask)
    if not len(found):
        return (slice(None),) * 3, [n // 2 for n in mask.shape]
    margin = np.ceil(MARGIN_MM / spacing_mm).astype(int)
    low = np.maximum(found.min(axis=0) - margin, 0)
    high = np.minimum(found.max(axis=0) + margin + 1, mask.shape)
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return box, [int(n) for n in np.rint(found.mean(axis=0)) - low]


def _short(key: str) -> str:
    """A key that fits: its middle gives way."""
    if len(key) <= KEY_LENGTH:
        return key
    half = (KEY_LENGTH - 1) // 2
    return f"{key[:half]}…{key[-half:]}"

"""What the network will see: samples of a configuration's first stage beside real scans, on one sheet and as files."""

import logging
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onelabel.configs.schema import RunConfig
from onelabel.errors import SCAN_FAULTS, sentence
from onelabel.imaging import outputs, volume
from onelabel.imaging.classes import Classes, load_target
from onelabel.imaging.labels import BinnedScan
from onelabel.imaging.prepare import image_on_grid, scan_on_grid
from onelabel.imaging.random import derive
from onelabel.imaging.volume import Grid, Volume
from onelabel.orchestrator import report
from onelabel.orchestrator.setup import Cohorts, open_cohorts
from onelabel.tasks import streams
from onelabel.tasks.cohort import Cohort, open_cohort

log = logging.getLogger(__name__)

SHEET = "preview.png"
COLUMNS = 6


def preview(config: RunConfig, out: Path, /, *, count: int = 24) -> Path:
    """Draw the first samples that training would draw from the labelled scans, below real scans on the same grid.

    Parameters
    ----------
    out : folder for `preview.png`, and for `real-NN_image.nii.gz` and `sample-NN_image.nii.gz` with their labels

    Returns
    -------
    The sheet.

    Raises
    ------
    DataError : a labelled scan that cannot be used.
    """
    cohorts = open_cohorts(config)
    out.mkdir(parents=True, exist_ok=True)
    real = [
        _write(out, f"real-{place:02d}", key, image, label, config)
        for place, (key, image, label) in enumerate(islice(_real(config, cohorts), COLUMNS))
    ]
    drawn = [
        _write(out, f"sample-{index:02d}", f"sample {index}", image, label, config)
        for index, (image, label) in enumerate(_samples(config, _scans(config, cohorts), count))
    ]
    headings = {0: "real", len(real): "synthetic"}
    title = f"{config.name}: {config.stages[0].name}"
    report.contact_sheet(real + drawn, out / SHEET, title=title, columns=COLUMNS, headings=headings)
    return out / SHEET


def material(config: RunConfig, /, *, count: int) -> list[report.Picture]:
    """Draw what the first stage learns from: the first labelled scan, its bins (fewest and most), and samples of it.

    Raises
    ------
    DataError : a labelled scan that cannot be found or used; the unlabelled ones are not looked at.
    """
    source = config.data.labelled
    found = open_cohort(source.path, where=source.where, label_column=source.label_column, require_labels=True)
    cohorts = Cohorts(Cohort(found.table.slice(0, 1)), None, None)
    scans = _scans(config, cohorts)
    pictures = []
    with tempfile.TemporaryDirectory() as folder:

        def draw(name: str, key: str, alt: str, image: NDArray[Any], label: NDArray[np.int8] | None) -> None:
            row = _write(Path(folder), name, key, image, label, config)
            pictures.append(report.Picture(f"{name}.png", alt, report.tile(row), key))

        for key, image, label in _real(config, cohorts):
            draw(
                "labelled", f"labelled: {key}", f"The labelled scan {key}, with the outline of its mask.", image, label
            )
        bins = config.synthesis.bins
        for words, counts in zip(("fewest", "most"), zip(bins.background, bins.foreground, strict=True), strict=True):
            alt = f"The labelled scan in {counts[1]} bins inside each structure and {counts[0]} outside."
            data = report.bins(scans[0], counts, spacing_mm=config.grid.spacing_mm)
            pictures.append(report.Picture(f"bins-{words}.png", alt, data, f"{words} bins"))
        for index, sample in enumerate(_samples(config, scans, count)):
            alt = f"Training sample {index} of the first stage, with the outline of its label."
            draw(f"sample-{index:02d}", f"sample {index}", alt, *sample)
    return pictures


def _real(config: RunConfig, cohorts: Cohorts) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.int8] | None]]:
    """The first labelled scan, then unlabelled ones from all over the cohort, as the network would see them."""
    grid = Grid(config.grid.spacing_mm, config.grid.size)
    row = cohorts.labelled.rows()[0]
    image, target = load_target(row["image"], row["label"], Classes.of(config.data))
    on_grid = volume.conform_mask(target, grid)
    yield row["key"], image_on_grid(image, grid).data, on_grid.data.astype(np.int8)
    others = cohorts.unlabelled.rows() if cohorts.unlabelled else []
    for row in others[:: max(1, len(others) // COLUMNS)]:
        try:
            yield row["key"], image_on_grid(volume.load(row["image"]), grid).data, None
        except SCAN_FAULTS as error:
            log.warning("'%s' is not shown: %s", row["key"], sentence(error))


def _scans(config: RunConfig, cohorts: Cohorts) -> list[BinnedScan]:
    """The labelled scans as samples are drawn from them."""
    classes = Classes.of(config.data)
    grid = Grid(config.grid.spacing_mm, config.grid.size)
    return [
        scan_on_grid(row["image"], row["label"], grid, bins=config.synthesis.bins, classes=classes, seed=config.seed)
        for row in cohorts.labelled.rows()
    ]


def _samples(
    config: RunConfig, scans: list[BinnedScan], count: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int8]]]:
    """Samples of the first stage's first stream."""
    ((name, parts), *_) = config.stages[0].streams.items()
    seed = derive(derive(config.seed, 0), name)
    stream = streams.build(parts, config, scans={"labelled": (scans, [1.0] * len(scans))}, seed=seed)
    for index in range(count):
        image, label, _ = streams.draw(stream, index)
        yield image, label


def _write(
    out: Path,
    name: str,
    key: str,
    image: NDArray[np.float32] | NDArray[np.uint8],
    label: NDArray[np.int8] | None,
    config: RunConfig,
) -> report.Row:
    """Write an image and, where there is one, its label; the row of the sheet."""
    affine = np.diag([*config.grid.spacing_mm, 1.0])
    row = {"key": key}
    for column, kind, data in (("image", "image", image), ("mask", "label", label)):
        if data is not None:
            row[column] = str(out / f"{name}_{kind}.nii.gz")
            outputs.save(Volume(data, affine), Path(row[column]))
    return row

"""What the network will see: samples of a configuration's first stage beside real scans, on one sheet and as files."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onelabel.configs.schema import RunConfig
from onelabel.errors import SCAN_FAULTS, sentence
from onelabel.imaging import volume
from onelabel.imaging.prepare import image_on_grid, scan_on_grid
from onelabel.imaging.random import derive
from onelabel.imaging.volume import Grid, Volume
from onelabel.orchestrator import report
from onelabel.orchestrator.setup import Cohorts, open_cohorts
from onelabel.tasks import streams

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
        for index, (image, label) in enumerate(_samples(config, cohorts, count))
    ]
    headings = {0: "real", len(real): "synthetic"}
    title = f"{config.name}: {config.stages[0].name}"
    report.contact_sheet(real + drawn, out / SHEET, title=title, columns=COLUMNS, headings=headings)
    return out / SHEET


def _real(config: RunConfig, cohorts: Cohorts) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.int8] | None]]:
    """The first labelled scan, then unlabelled ones from all over the cohort, as the network would see them."""
    grid = Grid(config.grid.spacing_mm, config.grid.size)
    row = cohorts.labelled.rows()[0]
    image, label = volume.load_labelled(row["image"], row["label"])
    on_grid = volume.conform_mask(Volume((label.data > 0).astype(np.int32), label.affine), grid)
    yield row["key"], image_on_grid(image, grid).data, on_grid.data.astype(np.int8)
    others = cohorts.unlabelled.rows() if cohorts.unlabelled else []
    for row in others[:: max(1, len(others) // COLUMNS)]:
        try:
            yield row["key"], image_on_grid(volume.load(row["image"]), grid).data, None
        except SCAN_FAULTS as error:
            log.warning("'%s' is not shown: %s", row["key"], sentence(error))


def _samples(config: RunConfig, cohorts: Cohorts, count: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int8]]]:
    """Samples of the first stage's first stream."""
    grid = Grid(config.grid.spacing_mm, config.grid.size)
    scans = [
        scan_on_grid(row["image"], row["label"], grid, bins=config.synthesis.bins, seed=config.seed)
        for row in cohorts.labelled.rows()
    ]
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
            volume.save(Volume(data, affine), Path(row[column]))
    return row

"""What the network will see: samples of a configuration's first stage, on one sheet and as files."""

from pathlib import Path

import numpy as np

from onelabel.configs.schema import RunConfig
from onelabel.imaging import volume
from onelabel.imaging.prepare import scan_on_grid
from onelabel.imaging.random import derive
from onelabel.imaging.volume import Grid, Volume
from onelabel.orchestrator import report
from onelabel.orchestrator.setup import open_cohorts
from onelabel.tasks import streams

SHEET = "preview.png"


def preview(config: RunConfig, out: Path, /, *, count: int = 24) -> Path:
    """Draw the first samples that training would draw from the labelled scans.

    Parameters
    ----------
    out : folder for `preview.png` and, for each sample, `sample-NN_image.nii.gz` and `sample-NN_label.nii.gz`

    Returns
    -------
    The sheet.

    Raises
    ------
    DataError : a labelled scan that cannot be used.
    """
    rows = open_cohorts(config).labelled.rows()
    grid = Grid(config.grid.spacing_mm, config.grid.size)
    scans = [
        scan_on_grid(row["image"], row["label"], grid, bins=config.synthesis.bins, seed=config.seed) for row in rows
    ]
    ((name, parts), *_) = config.stages[0].streams.items()
    seed = derive(derive(config.seed, 0), name)
    stream = streams.build(parts, config, scans={"labelled": (scans, [1.0] * len(scans))}, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*config.grid.spacing_mm, 1.0])
    shown = []
    for index in range(count):
        image, label, _ = streams.draw(stream, index)
        paths = {kind: out / f"sample-{index:02d}_{kind}.nii.gz" for kind in ("image", "label")}
        for kind, data in (("image", image), ("label", label)):
            volume.save(Volume(data, affine), paths[kind])
        shown.append({"key": f"sample {index}", "image": str(paths["image"]), "mask": str(paths["label"])})
    report.contact_sheet(shown, out / SHEET, title=f"{config.name}: {config.stages[0].name}", columns=6)
    return out / SHEET

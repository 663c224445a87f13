"""Write scribbles of dense label files, for studies: `python benchmarks/scribble.py LABELS OUT`.

Train on them with `data.classes`, `data.ignore=255` and streams of type `real`.
"""

import argparse
from pathlib import Path

import numpy as np

from onelabel.imaging import outputs, volume
from onelabel.imaging.labels import IGNORE
from onelabel.imaging.scribbles import scribble
from onelabel.imaging.volume import Volume


def main() -> None:
    """Write a file of the same name for each label file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", type=Path, help="folder of dense label files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ignore", type=int, default=255, help="value of what is not annotated")
    parser.add_argument("--across", type=int, default=2, help="voxel axis along which slices follow each other")
    args = parser.parse_args()
    for path in sorted(args.labels.glob("*.nii*")):
        label = volume.load(path, labels=True)
        lines = scribble(label.data, spacing_mm=label.spacing_mm, across=args.across)
        found = np.where(lines == IGNORE, args.ignore, lines).astype(np.int16)
        outputs.save(Volume(found, label.affine), args.out / path.name, like=path)


if __name__ == "__main__":
    main()

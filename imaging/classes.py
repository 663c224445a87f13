"""What the values of a label file mean."""

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from onelabel.configs.data import BACKGROUND, FOREGROUND, DataConfig
from onelabel.errors import DataError
from onelabel.imaging import volume
from onelabel.imaging.labels import IGNORE
from onelabel.imaging.storage import AnyPath
from onelabel.imaging.volume import Volume

_UNNAMED = -2


@dataclass(frozen=True)
class Classes:
    """The classes of a network, and how files write them.

    names : by index, background first
    values : of each class in files, the first one in results; (): one structure, whatever is above 0
    ignore : value of what nobody annotated
    largest : what is one piece in a predicted mask: each class, or all together
    """

    names: tuple[str, ...] = (BACKGROUND, FOREGROUND)
    values: tuple[tuple[int, ...], ...] = ()
    ignore: int | None = None
    largest: Literal["class", "all"] = "class"

    def __post_init__(self) -> None:
        # JSON knows lists alone.
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "values", tuple(map(tuple, self.values)))

    @classmethod
    def of(cls, config: DataConfig, /) -> Self:
        """Those of a run."""
        return cls(config.names, tuple(config.values.values()), config.ignore, config.largest)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, labels: NDArray[Any], path: str | AnyPath, /) -> NDArray[np.int32]:
        """The class of every voxel (*size), IGNORE where nobody annotated; of the values (*size) of a file.

        Raises
        ------
        DataError : the file, at path, holds a value that no class has.
        """
        target = np.full(labels.shape, _UNNAMED, np.int32)
        for index, values in enumerate(self.values):
            for value in values:
                target[labels == value] = index
        if not self.values:
            np.greater(labels, 0, out=target, casting="unsafe")
        if self.ignore is not None:
            target[labels == self.ignore] = IGNORE
        unnamed = labels[target == _UNNAMED]
        if unnamed.size:
            several = np.unique(unnamed).tolist()
            raise DataError(
                f"{path} holds labels that data.classes does not name ({', '.join(map(str, several[:5]))}): name them, "
                "or set data.ignore."
            )
        return target

    def write(self, target: NDArray[Any], /) -> NDArray[Any]:
        """The values (*size) that stand for classes (*size) in a file, in the smallest unsigned type."""
        if not self.values:
            return target.astype(np.uint8, copy=False)
        table = np.array([values[0] for values in self.values])
        written: NDArray[Any] = table.astype(np.min_scalar_type(table.max()))[target]
        return written


def load_target(image_path: str | AnyPath, label_path: str | AnyPath, classes: Classes, /) -> tuple[Volume, Volume]:
    """Read an image and the class (*size) int32 of each of its voxels, IGNORE where nobody annotated.

    Raises
    ------
    DataError : see `volume.load_labelled` and `Classes.read`; or nothing is background, or a structure, for certain.
    """
    image, label = volume.load_labelled(image_path, label_path)
    target = classes.read(label.data, label_path)
    for known, what in ((target > 0, "structure"), (target == 0, "background (0)")):
        if not known.any():
            raise DataError(f"{label_path} labels no voxel as {what}: it needs both background and structure.")
    return image, Volume(target, label.affine)

"""One scan stripped for a program: what `onelabel.strip` is. No Ray, no files but the scan's own."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from onelabel.imaging import series
from onelabel.imaging.storage import AnyPath, path_of
from onelabel.tasks.strip_worker import Clock, Settings, Stripper, doubtful

Scan = str | os.PathLike[str] | SpatialImage | tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class Stripped:
    """A scan's mask, and how far to trust it.

    Attributes
    ----------
    mask : (*size) or (*size, frames)
        On the scan's own voxel grid; uint8, of labels above 255 a larger type.
    affine : (4, 4), voxel index -> mm, RAS
    volume_ml : float
        Of the mask; of several their mean.
    score, expected_dice, expected_low, expected_high : float or None
        The quality score, the Dice that it speaks for, and the interval that holds nine masks of ten; of several masks
        those of the worst; None where the checkpoint has learned none.
    flag : bool
        Look at this mask.
    flags : what speaks against it, or should be known of it, in words
    """

    mask: NDArray[Any]
    affine: NDArray[np.float64]
    volume_ml: float
    score: float | None
    expected_dice: float | None
    expected_low: float | None
    expected_high: float | None
    flag: bool
    flags: tuple[str, ...]

    def image(self) -> nib.Nifti1Image:
        """The mask as a nibabel image."""
        return nib.Nifti1Image(self.mask, self.affine)


def strip(
    scan: Scan,
    /,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
    trust: bool = True,
    border_mm: float = 0.0,
    each_frame: bool = False,
) -> Stripped:
    """Find the brain in one scan, in this process.

    Parameters
    ----------
    scan : path, nibabel image, or (array, affine)
        3D; of a 4D series the mask is made of the mean over the last axis, or with `each_frame` of each volume.
    checkpoint : path or URI
        A checkpoint folder, or the folder of a run; None: the one that comes with onelabel, for brains. The last one
        used is kept in memory.
    device, threads, trust, border_mm, each_frame : see `Settings`

    Raises
    ------
    DataError : the scan cannot be used.
    CheckpointError : no usable checkpoint.
    ClusterError : cuda without a GPU.

    Examples
    --------
    >>> from onelabel import strip
    >>> found = strip("head.nii.gz")  # doctest: +SKIP
    >>> found.mask.sum(), found.volume_ml, found.expected_dice  # doctest: +SKIP
    """
    settings = Settings(device, threads, trust, border_mm, each_frame)
    stripper = _stripper(path_of(os.fspath(checkpoint)).resolve() if checkpoint else None, settings)
    mask, worst, volume_ml = stripper.segment_all(_volumes(scan, each=each_frame), Clock())
    flags, known = worst.flags(), worst.trust
    return Stripped(
        mask=mask,
        affine=worst.volume.affine,
        volume_ml=volume_ml,
        score=known.score if known else None,
        expected_dice=known.expected_dice if known else None,
        expected_low=known.expected_low if known else None,
        expected_high=known.expected_high if known else None,
        flag=doubtful(flags),
        flags=tuple(flags),
    )


def _volumes(scan: Scan, *, each: bool) -> Any:
    if isinstance(scan, tuple):
        data, affine = scan
        return series.volumes(nib.Nifti1Image(np.asarray(data, np.float32), affine), Path("the array"), each=each)
    if isinstance(scan, SpatialImage):
        return series.volumes(scan, Path(scan.get_filename() or "the image"), each=each)
    return series.read(Path(scan), each=each)


@lru_cache(maxsize=1)
def _stripper(checkpoint: AnyPath | None, settings: Settings) -> Stripper:
    return Stripper(checkpoint, settings)

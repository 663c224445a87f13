"""Voxels out of files, to the last byte: what a header claims and what a checksum says is held against the file."""

import gzip
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from onelabel.errors import DataError

PACKED = (".gz", ".mgz")
PACKED_TIGHTER = (".bz2", ".zst")  # whose blocks have checksums
MOST_PACKED = 1032  # bytes that gzip can make one
CHUNK = 2**20


def read(image: SpatialImage, part: Any = (), /, *, dtype: type[np.floating[Any]] | None) -> NDArray[Any]:
    """Read all voxels, or the part of them that an index gives, without a look at the rest.

    nibabel stops at the last voxel of a packed file, before the checksum; and takes the memory that a header asks for.

    Parameters
    ----------
    image : as nibabel opened it
    dtype : of the result; None for that of the file

    Returns
    -------
    (*size)

    Raises
    ------
    DataError : voxels that are not real numbers.
    EOFError, OSError, zlib.error, ... : a damaged file.
    """
    if image.get_data_dtype().kind not in "biuf":
        raise DataError(
            f"{image.get_filename()} has voxels of type {image.get_data_dtype()}: only real numbers are images."
        )
    if part != ():
        return np.asarray(image.dataobj[part], dtype)
    proxy, name = image.dataobj, image.file_map.get("image")
    if type(proxy) is not ArrayProxy or name is None or name.filename is None:
        return np.asarray(proxy, dtype)
    path = Path(name.filename)
    ending = path.suffix.lower()
    packed = ending in PACKED
    need = proxy.offset + math.prod(proxy.shape) * proxy.dtype.itemsize
    size = path.stat().st_size
    if ending not in PACKED_TIGHTER and need > size * (MOST_PACKED if packed else 1):
        raise EOFError(f"its header speaks of {need:,} bytes, more than can be in a file of {size:,} bytes")
    if packed:
        proxy = ArrayProxy(
            io.BytesIO(_unpacked(path, need)), (proxy.shape, proxy.dtype, proxy.offset, proxy.slope, proxy.inter)
        )
    return np.asarray(proxy, dtype)


def _unpacked(path: Path, need: int) -> bytes:
    """The first bytes of a file, all of which is read, for its checksum stands at the end."""
    with gzip.open(path) as stream:
        content = stream.read(need)
        while stream.read(CHUNK):
            pass
    return content

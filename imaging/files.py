"""Voxels out of files, to the last byte: what a header claims and what a checksum says is held against the file."""

import gzip
import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.brikhead import AFNIImageError
from nibabel.cifti2.cifti2 import Cifti2HeaderError
from nibabel.filebasedimages import ImageFileError
from nibabel.freesurfer.mghformat import MGHError
from nibabel.minc1 import MincError
from nibabel.parrec import PARRECError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError, ImageDataError, SpatialImage
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from onelabel.errors import DataError

PACKED = (".gz", ".mgz")
PACKED_TIGHTER = (".bz2", ".zst")  # whose blocks have checksums
MOST_PACKED = 1032  # bytes that gzip can make one
CHUNK = 2**20
UNREADABLE = (
    ImageFileError,
    HeaderDataError,
    HeaderTypeError,
    WrapStructError,
    ImageDataError,
    Cifti2HeaderError,
    ExpatError,
    MGHError,
    MincError,
    PARRECError,
    AFNIImageError,
    OSError,  # with gzip.BadGzipFile
    EOFError,
    zlib.error,
    ValueError,
    KeyError,  # an unknown type of voxel in an MGZ header
    TypeError,  # fewer voxels than the header says
    OverflowError,
    MemoryError,
    ImportError,  # MINC 2 needs h5py
)


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
    proxy, path = image.dataobj, _path(image)
    if type(proxy) is not ArrayProxy or path is None:
        return np.asarray(proxy, dtype)
    packed = is_packed(image)
    need = proxy.offset + math.prod(proxy.shape) * proxy.dtype.itemsize
    size = path.stat().st_size
    if path.suffix.lower() not in PACKED_TIGHTER and need > size * (MOST_PACKED if packed else 1):
        raise EOFError(f"its header speaks of {need:,} bytes, more than can be in a file of {size:,} bytes")
    if packed:
        proxy = ArrayProxy(
            io.BytesIO(_unpacked(path, need)), (proxy.shape, proxy.dtype, proxy.offset, proxy.slope, proxy.inter)
        )
    return np.asarray(proxy, dtype)


@contextmanager
def damage_named(path: Path, /) -> Iterator[None]:
    """Whatever reading voxels may raise as a sentence about the file."""
    try:
        yield
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read to its end ({error}): it is damaged, get it again.") from error


@contextmanager
def forwards(image: SpatialImage, /) -> Iterator[SpatialImage]:
    """A packed image opened such that its volumes, read one after the other, are unpacked once and to the end."""
    path = _path(image)
    assert path
    with gzip.open(path) as stream:
        holders = {name: copy(holder) for name, holder in image.file_map.items()}
        holders["image"].fileobj = stream
        yield type(image).from_file_map(holders)
        _drain(stream)


def is_packed(image: SpatialImage, /) -> bool:
    """Whether the voxels come from a stream with a checksum at its end."""
    path = _path(image)
    return type(image.dataobj) is ArrayProxy and path is not None and path.suffix.lower() in PACKED


def _path(image: SpatialImage) -> Path | None:
    holder = image.file_map.get("image")
    return Path(holder.filename) if holder and holder.filename else None


def _unpacked(path: Path, need: int) -> bytes:
    """The first bytes of a file."""
    with gzip.open(path) as stream:
        content = stream.read(need)
        _drain(stream)
    return content


def _drain(stream: gzip.GzipFile) -> None:
    """Read all of a file, for its checksum stands at the end."""
    while stream.read(CHUNK):
        pass

"""Images written into the grid of another one, with the geometry of its header bit by bit."""

import gzip
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from numpy.typing import DTypeLike, NDArray

from onelabel.errors import DataError
from onelabel.imaging import places, storage
from onelabel.imaging.storage import AnyPath, path_of
from onelabel.imaging.volume import Volume, open_image

_GEOMETRY_FIELDS = (
    *("dim_info", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def save(
    volume: Volume, path: str | AnyPath, /, *, like: str | AnyPath | None = None, dtype: DTypeLike | None = None
) -> None:
    """Write a NIfTI file: it appears under its name only when it is complete.

    Parameters
    ----------
    volume : Volume
        (*size), or (*size, frames).
    path : str, or a path of a disk or a store
        Ends in .nii or .nii.gz; missing folders are made.
    like : likewise, optional
        The image from which the volume was made: if it is NIfTI, its version and geometry (affines with their codes,
        voxel size, units) are taken over bit by bit.
    dtype : optional
        On disk; by default uint8 for booleans, else the array's own.
    """
    path = _named(path_of(path))
    wanted = np.dtype(dtype or (np.uint8 if volume.data.dtype == bool else volume.data.dtype))
    data = volume.data.astype(wanted, copy=False)
    if wanted.kind in "iu" and not np.array_equal(data, volume.data):
        raise DataError(f"{path} cannot be written as {wanted}: the volume holds values that it cannot represent.")
    if like is None:
        header = _header_at(volume.affine, data.shape)
    else:
        with places.fetched(str(like)) as file:
            header = _header_from(open_image(file), volume.affine, data.shape)
    header.set_data_dtype(wanted)
    _write(path, _block(header), data.astype(wanted.newbyteorder(header.endianness), copy=False))


def _header_from(source: SpatialImage, affine: NDArray[np.float64], shape: tuple[int, ...]) -> nib.Nifti1Header:
    """The header of what was made from an image, at `affine` where that is no NIfTI file."""
    if not isinstance(source.header, nib.Nifti1Header):
        return _header_at(affine, shape)
    if source.shape[:3] != shape[:3]:
        name = source.get_filename()
        raise DataError(f"{name} has shape {source.shape}, the volume made from it {shape}: they must be equal.")
    # Axes of length one belong to the shape too.
    return _header_like(source, source.shape if math.prod(source.shape) == math.prod(shape) else shape)


def save_inside(mask: NDArray[Any], path: str | Path, /, *, like: str | Path) -> None:
    """Write an image as it is inside a mask, and what stands for 0 elsewhere.

    Of a NIfTI file all of the header, extensions and scaling are kept, and the voxels as they are stored.

    Parameters
    ----------
    mask : (*size), or (*size, frames); not 0 inside
    path : ends in .nii or .nii.gz
    like : the image
    """
    source = open_image(Path(like))
    known = isinstance(source.header, nib.Nifti1Header | nib.freesurfer.mghformat.MGHHeader)
    proxy: Any = source.dataobj
    raw = np.require(proxy.get_unscaled() if known else _values(source), None, "W")
    inside = mask.reshape(mask.shape + (1,) * (raw.ndim - mask.ndim)) > 0
    np.copyto(raw, _stored_zero(source, raw.dtype) if known else 0, where=~inside)
    if isinstance(source.header, nib.Nifti1Header):
        block = _block_of(source)
    else:
        header = _header_at(source.affine, raw.shape)
        header.set_data_dtype(raw.dtype)
        block, raw = _block(header), raw.astype(raw.dtype.newbyteorder(header.endianness), copy=False)
    _write(_named(Path(path)), block, raw)


def _values(source: SpatialImage) -> NDArray[Any]:
    """Voxels of an image of another format: as they are stored, or if they are scaled float32."""
    values = np.asarray(source.dataobj)
    return values if values.dtype == source.get_data_dtype() else values.astype(np.float32)


def _stored_zero(source: SpatialImage, dtype: np.dtype[Any]) -> Any:
    """What is stored for 0, or for what comes next to it."""
    slope, inter = getattr(source.dataobj, "slope", 1.0), getattr(source.dataobj, "inter", 0.0)
    zero = -inter / slope
    if dtype.kind in "iu":
        known = np.iinfo(dtype)
        return dtype.type(min(max(round(zero), known.min), known.max))
    return dtype.type(zero)


def _header_at(affine: NDArray[np.float64], shape: tuple[int, ...]) -> nib.Nifti1Header:
    """A new header for a place in space."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_xyzt_units("mm")
    header.set_qform(affine, code=1)
    header.set_sform(affine, code=1)
    return header


def _header_like(source: SpatialImage, shape: tuple[int, ...]) -> nib.Nifti1Header:
    """A new header of the same version, byte order and geometry."""
    stored = _stored_header(source)
    header = _single(stored)(endianness=stored.endianness)
    header.set_data_shape(shape)
    for field in _GEOMETRY_FIELDS:
        header[field] = stored[field]
    return header


def _stored_header(source: SpatialImage) -> nib.Nifti1Header:
    """The header as the file has it: nibabel mends what it reads."""
    known: Any = source.header
    with source.file_map.get("header", source.file_map["image"]).get_prepare_fileobj("rb") as file:
        stored: nib.Nifti1Header = type(known)(file.read(known.sizeof_hdr), endianness=known.endianness, check=False)
    return stored


def _single(header: nib.Nifti1Header) -> type[nib.Nifti1Header]:
    """The kind of header that stands in one file with its voxels."""
    return nib.Nifti2Header if isinstance(header, nib.Nifti2Header) else nib.Nifti1Header


def _block(header: nib.Nifti1Header) -> bytes:
    """A new header as all that stands before the voxels."""
    header.set_data_offset(header.single_vox_offset)
    header["scl_slope"], header["scl_inter"] = 1, 0
    return bytes(header.binaryblock).ljust(header.single_vox_offset, b"\0")


def _block_of(source: SpatialImage) -> bytes:
    """All that stands before the voxels of a file; that of a pair as it is in a single file."""
    if "header" not in source.file_map:
        proxy: Any = source.dataobj
        with source.file_map["image"].get_prepare_fileobj("rb") as file:
            return bytes(file.read(proxy.offset))
    stored = _stored_header(source)
    kind = _single(stored)
    header = kind(stored.binaryblock, endianness=stored.endianness, check=False)
    header["magic"], header["vox_offset"] = kind.single_magic, kind.single_vox_offset
    return bytes(header.binaryblock).ljust(kind.single_vox_offset, b"\0")


def _named(path: AnyPath) -> AnyPath:
    if not path.name.endswith((".nii.gz", ".nii")):
        raise DataError(f"{path} cannot be written: the name must end in .nii.gz or .nii.")
    return path


def _write(path: AnyPath, block: bytes, data: NDArray[Any]) -> None:
    """Write what stands before the voxels, and the voxels; the same input gives the same bytes."""
    with storage.writing(path) as unfinished, unfinished.open("wb") as file:
        packed = gzip.GzipFile("", "wb", 1, file, mtime=0) if path.suffix == ".gz" else None
        to = packed or file
        to.write(block)
        for plane in range(data.shape[-1]):
            to.write(data[..., plane].tobytes("F"))
        if packed:
            packed.close()

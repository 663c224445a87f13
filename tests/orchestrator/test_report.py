import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from onelabel.configs.augmentation import BinsConfig
from onelabel.errors import DataError
from onelabel.imaging.labels import bin_scan
from onelabel.imaging.outputs import save
from onelabel.imaging.volume import Volume
from onelabel.orchestrator import report

TILE_PIXELS = round(report.TILE_INCHES * report.DPI)
TITLE_PIXELS = round(report.TITLE_INCHES * report.DPI)

TURN = np.array([[0.9, -0.3, 0.1, 5], [0.3, 0.9, -0.2, 2], [0.0, 0.2, 0.95, -9], [0, 0, 0, 1]])
AFFINES = {
    "isotropic": np.diag([4.0, 4.0, 4.0, 1]),
    "anisotropic": np.diag([2.0, 4.0, 9.0, 1]),
    "flipped": np.diag([-4.0, 4.0, -4.0, 1]),
    "permuted": np.diag([4.0, 4.0, 4.0, 1])[[2, 0, 1, 3]],
    "oblique": TURN @ np.diag([3.0, 3.0, 5.0, 1]),
}


def ball(shape: tuple[int, ...], radius: float) -> NDArray[np.bool_]:
    at = np.indices(shape).T / (np.array(shape) - 1)
    return (np.linalg.norm(at - 0.5, axis=-1) < radius).T


def scan(folder: Path, key: str, affine: NDArray[np.float64], radius: float = 0.3, **more: Any) -> dict[str, Any]:
    shape = (30, 36, 24)
    noise = np.random.default_rng(0).uniform(0, 20, shape)
    image, mask = folder / f"{key}.nii.gz", folder / f"{key}_mask.nii.gz"
    save(Volume((100 * ball(shape, 0.4) + noise).astype(np.float32), affine), image)
    save(Volume(ball(shape, radius).astype(np.int32), affine), mask)
    return {"key": key, "image": str(image), "mask": str(mask), **more}


def pixels(path: Path | io.BytesIO) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def count(picture: NDArray[np.uint8], colour: str) -> int:
    """Pixels of about this colour below the title."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(picture[TITLE_PIXELS:].astype(int) - wanted).max(axis=-1) < 40).sum())


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("labelled", [False, True])
def test_a_sheet_of_any_geometry(tmp_path: Path, affine: NDArray[np.float64], labelled: bool) -> None:
    row = scan(tmp_path, "one", affine, score=0.9)
    if labelled:
        row |= {"label": scan(tmp_path, "truth", affine, radius=0.35)["mask"], "dice": 0.8}
    report.contact_sheet([row], tmp_path / "new" / "sheet.png", title="any")
    picture = pixels(tmp_path / "new" / "sheet.png")
    assert picture.shape == (TILE_PIXELS + TITLE_PIXELS, 2 * TILE_PIXELS, 3)
    assert count(picture, report.MASK) > 500
    assert (count(picture, report.TRUTH) > 500) == labelled


def test_aspect_is_that_of_the_head(tmp_path: Path) -> None:
    # The same ball in mm, in voxels of two shapes.
    for name, edges, shape in (("cubes", (4, 4, 4), (40, 40, 40)), ("slices", (2, 4, 8), (80, 40, 20))):
        affine = np.diag([*edges, 1.0]).astype(float)
        image = (100 * ball(shape, 0.4)).astype(np.float32)
        save(Volume(image, affine), tmp_path / f"{name}.nii.gz")
        save(Volume(ball(shape, 0.3).astype(np.int32), affine), tmp_path / f"{name}_mask.nii.gz")
        views = report._views({"image": tmp_path / f"{name}.nii.gz", "mask": tmp_path / f"{name}_mask.nii.gz"})
        for view in views:
            rows = view.outlines[report.MASK].any(axis=1).sum() * view.edges_mm[0]
            columns = view.outlines[report.MASK].any(axis=0).sum() * view.edges_mm[1]
            assert rows == pytest.approx(96, abs=16) and columns == pytest.approx(96, abs=16)


def test_left_is_left_however_a_scan_is_stored(tmp_path: Path) -> None:
    data = np.zeros((20, 22, 24), np.float32)
    data[:8] = 100  # the left half, at small x
    data[:, :, 20:] += 50  # the top
    affine = np.diag([4.0, 4.0, 4.0, 1])
    mask = ball(data.shape, 0.4).astype(np.uint8)
    for code in ("RAS", "LPS", "PIR"):
        ornt = nib.orientations.axcodes2ornt(tuple(code))
        for array, name in ((data, "image"), (mask, "mask")):
            stored = nib.Nifti1Image(array, affine).as_reoriented(
                nib.orientations.ornt_transform(nib.orientations.axcodes2ornt(("R", "A", "S")), ornt)
            )
            nib.save(stored, tmp_path / f"{code}-{name}.nii.gz")
        row = {"image": tmp_path / f"{code}-image.nii.gz", "mask": tmp_path / f"{code}-mask.nii.gz"}
        coronal, sagittal, axial = report._views(row)
        assert coronal.image[0, 0] > coronal.image[-1, 0] and coronal.image[-1, -1] > coronal.image[-1, 0]
        assert sagittal.image[0, -1] > sagittal.image[0, 0]
        assert axial.image[0, 0] > axial.image[-1, 0]


def test_different_masks_look_different(tmp_path: Path) -> None:
    pictures = []
    for radius in (0.3, 0.3, 0.36):
        report.contact_sheet([scan(tmp_path, "one", AFFINES["isotropic"], radius)], tmp_path / "a.png", title="a")
        pictures.append(pixels(tmp_path / "a.png"))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_best_and_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [scan(tmp_path, f"s{i}", AFFINES["isotropic"], score=score) for i, score in enumerate((3, 1, 4, 1, 5))]
    rows += [{"key": "bad", "image": "x", "mask": None, "score": None, "error": "damaged"}]
    rows += [{**rows[0], "key": "unscored", "score": None}, {**rows[0], "key": "odd", "score": float("nan")}]
    shown: list[str] = []
    real = report._draw_tile
    monkeypatch.setattr(
        report, "_draw_tile", lambda axes, row, heading: (shown.append(row["key"]), real(axes, row, heading))
    )
    report.best_and_worst(rows, tmp_path / "a.png", k=2, title="a")
    assert shown == ["s4", "s2", "s3", "s1"]
    assert pixels(tmp_path / "a.png").shape == (2 * TILE_PIXELS + TITLE_PIXELS, 2 * TILE_PIXELS, 3)

    shown.clear()
    report.best_and_worst(rows[:3], tmp_path / "b.png", k=4, title="b")
    assert shown == ["s2", "s0", "s1"]


@pytest.mark.parametrize("rows", [[], [{"key": "a", "image": "x", "mask": None, "score": None, "error": "damaged"}]])
def test_nothing_to_show(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    report.best_and_worst(rows, tmp_path / "a.png", title="a")
    report.contact_sheet(rows, tmp_path / "b.png", title="b")
    assert np.array_equal(pixels(tmp_path / "a.png")[TITLE_PIXELS:], pixels(tmp_path / "b.png")[TITLE_PIXELS:])


def test_an_empty_mask_has_no_outline(tmp_path: Path) -> None:
    row = scan(tmp_path, "one", AFFINES["isotropic"], radius=0.0)
    report.contact_sheet([row], tmp_path / "a.png", title="a")
    assert count(pixels(tmp_path / "a.png"), report.MASK) == 0


def test_another_grid_is_refused(tmp_path: Path) -> None:
    row = scan(tmp_path, "one", AFFINES["isotropic"])
    save(Volume(np.ones((5, 5, 5), np.int32), np.eye(4)), row["mask"])
    with pytest.raises(DataError, match="must be equal"):
        report.contact_sheet([row], tmp_path / "a.png", title="a")


def test_long_keys_are_cut_in_the_middle() -> None:
    assert report._short("sub-01") == "sub-01"
    short = report._short("a" * 30 + "b" * 30)
    assert len(short) <= report.KEY_LENGTH and short.startswith("aa") and short.endswith("bb")


def test_a_tile_by_itself(tmp_path: Path) -> None:
    row = scan(tmp_path, "one", AFFINES["oblique"], score=0.9)
    picture = pixels(io.BytesIO(report.tile(row)))
    edge = round(report.TILE_INCHES * report.TILE_DPI)
    assert picture.shape == (edge, edge, 3)
    assert count(picture, report.MASK) > 300 and count(picture, report.TRUTH) == 0
    Path(row["mask"]).unlink()
    with pytest.raises(DataError, match="does not exist"):
        report.tile(row)


def test_a_key_is_no_formula(tmp_path: Path) -> None:
    assert report.tile(scan(tmp_path, "a", AFFINES["isotropic"]) | {"key": r"$\nonsense$"})


def test_bins_inside_and_outside_differ_in_colour() -> None:
    shape = (30, 36, 24)
    image = np.clip(0.7 * ball(shape, 0.4) + np.random.default_rng(0).uniform(0, 0.3, shape), 0, 1)
    target = ball(shape, 0.25).astype(np.int8)
    config = BinsConfig(foreground=(2, 5), background=(3, 6))
    binned = bin_scan(image.astype(np.float32), target, spacing_mm=(4.0, 4.0, 4.0), config=config)
    shades = []
    for counts in ((3, 2), (6, 5)):
        picture = pixels(io.BytesIO(report.bins(binned, counts, spacing_mm=(4.0, 4.0, 4.0)))).astype(int)
        red, blue = picture[..., 0] - picture[..., 2] > 40, picture[..., 2] - picture[..., 0] > 40
        assert red.sum() > 1000 and blue.sum() > 1000
        shades.append(len(np.unique(picture[red | blue].reshape(-1, 3), axis=0)))
    assert shades[1] > shades[0]

import io

import numpy as np
import pytest
from PIL import Image

from onelabel.imaging.picture import HEIGHT, overlay
from onelabel.imaging.volume import Volume

COLOUR = (255, 96, 32)


def ball(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> np.ndarray:
    axes = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing_mm, strict=True)), indexing="ij"
    )
    return (sum(axis**2 for axis in axes) < 60**2).astype(np.uint8)


def picture(volume: Volume, mask: np.ndarray) -> np.ndarray:
    file = overlay(volume, mask)
    assert file.startswith(b"\x89PNG")
    assert len(file) < 15_000
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (1.0, 1.0, 6.0), (5.0, 1.0, 1.2)])
def test_it_shows_three_slices_with_the_masks_outline(spacing_mm: tuple[float, ...]) -> None:
    shape = tuple(int(180 / step) for step in spacing_mm)
    mask = ball(shape, spacing_mm)
    noise = np.random.default_rng(0).normal(100, 10, shape).astype(np.float32)
    drawn = picture(Volume(noise * (0.2 + mask), np.diag([-spacing_mm[0], *spacing_mm[1:], 1])), mask)
    assert drawn.shape[0] == HEIGHT
    assert 280 <= drawn.shape[1] <= 300
    outline = (drawn == COLOUR).all(-1)
    for panel in np.array_split(outline, 3, axis=1):
        rows, columns = np.nonzero(panel)
        for along in (rows, columns):
            assert along.max() - along.min() == pytest.approx(HEIGHT * 120 / 180, abs=5)


def test_each_structure_has_an_outline_of_its_own_colour() -> None:
    whole = ball((180, 180, 180), (1, 1, 1))
    labels = whole * 7
    labels[:90] *= 2
    drawn = picture(Volume(whole.astype(np.float32), np.eye(4)), labels)
    for colour in (COLOUR, (51, 204, 255)):
        assert (drawn == colour).all(-1).any(), colour


def test_up_is_up_and_front_is_front() -> None:
    data = np.zeros((40, 50, 60), np.float32)
    data[20:, 25:, 30:] = 1  # right, front, top
    sheet = picture(Volume(data, np.eye(4)), np.zeros(data.shape, np.uint8))[..., 0]
    sagittal, coronal, axial = sheet[:, :80], sheet[:, 82:146], sheet[:, 148:]
    for panel in (sagittal, coronal, axial):
        middle = panel.shape[1] // 2
        assert panel[: HEIGHT // 2 - 2, middle + 2 :].min() > 200
        assert panel[HEIGHT // 2 + 2 :].max() < 50


def test_an_empty_mask_and_an_even_slice_have_a_picture_too() -> None:
    data = np.zeros((10, 300, 4), np.float32)
    data[0, 0, 0] = 1
    drawn = picture(Volume(data, np.diag([1.0, 1, 1, 1])), np.zeros(data.shape, np.uint8))
    assert drawn.shape[0] == HEIGHT
    assert not (drawn == COLOUR).all(-1).any()

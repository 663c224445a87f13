from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onelabel.configs.augmentation import BinsConfig
from onelabel.configs.data import DataConfig
from onelabel.errors import DataError
from onelabel.imaging.classes import Classes, load_target
from onelabel.imaging.labels import IGNORE
from onelabel.imaging.outputs import save
from onelabel.imaging.prepare import scan_on_grid
from onelabel.imaging.volume import Grid, Volume, conform_mask

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
HEART = {1: "right ventricle", 2: "wall", 3: "left ventricle", 9: "wall", 12: "background"}


def classes(**settings: Any) -> Classes:
    return Classes.of(DataConfig.model_validate({"labelled": "unused", **settings}))


def labels(*values: int) -> np.ndarray:
    """(12, 12, 12): a slab of two voxels for each value."""
    return np.repeat(np.resize(values, 6), 2)[:, None, None] * np.ones((1, 12, 12), np.int32)


def written(folder: Path, label: np.ndarray) -> tuple[str, str]:
    image = np.random.default_rng(0).random(label.shape, np.float32)
    save(Volume(image, AFFINE), folder / "a.nii.gz")
    save(Volume(label.astype(np.int32), AFFINE), folder / "b.nii.gz")
    return str(folder / "a.nii.gz"), str(folder / "b.nii.gz")


def test_by_default_whatever_is_above_zero_is_one_structure() -> None:
    plain = classes()
    assert plain == Classes() and plain.names == ("background", "foreground") and len(plain) == 2
    assert plain.read(np.array([-3, 0, 1, 700]), "x").tolist() == [0, 0, 1, 1]
    assert plain.write(np.array([0, 1])).tolist() == [0, 1]


def test_values_of_one_name_are_one_class() -> None:
    heart = classes(classes=HEART, ignore=255)
    assert heart.names == ("background", "right ventricle", "wall", "left ventricle")
    assert heart.read(np.array([0, 1, 2, 3, 9, 12, 255]), "x").tolist() == [0, 1, 2, 3, 2, 0, IGNORE]
    back = heart.write(np.arange(4))
    assert back.tolist() == [0, 1, 2, 3] and back.dtype == np.uint8
    assert classes(classes={700: "a"}).write(np.array([0, 1])).tolist() == [0, 700]
    assert classes(classes=["background", "a", "b"]) == classes(classes={1: "a", 2: "b"})


def test_what_files_hold_comes_back() -> None:
    several = classes(classes={40: "a", 3: "b", 300: "c"})
    target = np.random.default_rng(0).integers(0, 4, (5, 6, 7))
    assert np.array_equal(several.read(several.write(target), "x"), target)


def test_a_value_without_a_name_is_an_error() -> None:
    with pytest.raises(DataError, match=r"scan.nii holds labels that data.classes does not name \(4, 7\)"):
        classes(classes=HEART).read(labels(0, 1, 4, 7), "scan.nii")


@pytest.mark.parametrize(
    ("label", "part"), [(labels(0, 255), "as structure"), (labels(1, 255, 12), ""), (labels(1, 0, 255), "")], ids=str
)
def test_both_sides_are_annotated(label: np.ndarray, part: str, tmp_path: Path) -> None:
    label[0, 0, 0] = 0
    paths = written(tmp_path, label)
    heart = classes(classes=HEART, ignore=255)
    if part:
        with pytest.raises(DataError, match=part):
            load_target(*paths, heart)
    else:
        target = load_target(*paths, heart)[1].data
        assert np.array_equal(target == IGNORE, label == 255)


def test_classes_keep_apart_on_the_grid(tmp_path: Path) -> None:
    paths = written(tmp_path, labels(0, 1, 2, 3, 9, 0))
    scan = scan_on_grid(*paths, Grid((4, 4, 4), (8, 8, 8)), bins=BinsConfig(), seed=0, classes=classes(classes=HEART))
    assert scan.tables.shape[0] == 4
    assert scan.target[1:7, 4, 4].tolist() == [0, 1, 2, 3, 2, 0]
    one = scan_on_grid(*paths, Grid((4, 4, 4), (8, 8, 8)), bins=BinsConfig(), seed=0)
    assert np.array_equal(one.target, scan.target > 0) and one.tables.shape[0] == 2


def test_a_class_that_the_grid_loses_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    label = labels(0, 1, 1, 1, 0, 0)
    label[4, 6, 6] = 3
    paths = written(tmp_path, label)
    scan_on_grid(*paths, Grid((4, 4, 4), (8, 8, 8)), bins=BinsConfig(), seed=0, classes=classes(classes=HEART))
    assert "'left ventricle'" in caplog.text and "'wall'" not in caplog.text


@pytest.mark.parametrize("step", [0.7, 1.0, 2.0, 3.0])
def test_lines_of_one_voxel_outlive_any_grid(step: float) -> None:
    size = 36
    line = np.full((size, size, size), IGNORE, np.int32)
    line[6:30, 12, 18], line[6:30, 25, 18] = 1, 2
    line[:, 5, 18] = 0
    grid = Grid((step,) * 3, (round(size / step),) * 3)
    found = conform_mask(Volume(line, np.eye(4)), grid).data
    wide = conform_mask(Volume(line, np.eye(4)), Grid((step,) * 3, (round(60 / step),) * 3)).data
    assert all((wide.take(end, axis) == IGNORE).all() for axis in range(3) for end in (0, -1))  # out of view
    place = (np.indices(grid.size) + 0.5).reshape(3, -1).T * step
    for value, y in ((0, 5.5), (1, 12.5), (2, 25.5)):
        near = place[(found == value).ravel()]
        across = np.hypot(near[:, 1] - y, near[:, 2] - 18.5)
        assert across.max() <= max(1.0, step)  # no wider than about a voxel of either grid
        along = np.unique(near[:, 0])
        assert len(along) >= 0.9 * (36 if value == 0 else 24) / step

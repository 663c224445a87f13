import pytest
import torch
from torch import Tensor

from onelabel.models.windows import slide


def voxelwise(image: Tensor) -> Tensor:
    """Probabilities that hang on the voxel alone."""
    return torch.cat([1 - image, 0.25 * image, 0.75 * image], dim=1)


@pytest.mark.parametrize("window", [(8, 8, 8), (16, 5, 9), (16, 20, 9), (7, 20, 4)])
def test_what_hangs_on_single_voxels_is_found_by_any_window(window: tuple[int, int, int]) -> None:
    image = torch.rand(2, 1, 16, 20, 9)
    if window[2] > 8 or window == (8, 8, 8):
        seen: list[tuple[int, ...]] = []

        def noted(part: Tensor) -> Tensor:
            seen.append(tuple(part.shape[2:]))
            return voxelwise(part)

        found = slide(noted, image, window)
        assert set(seen) == {window}
    else:
        found = slide(voxelwise, image, window)
    assert torch.allclose(found, voxelwise(image), atol=1e-6)


def test_a_volume_of_one_window_is_seen_once() -> None:
    image = torch.rand(1, 1, 6, 6, 6)
    assert torch.equal(slide(voxelwise, image, (6, 6, 6)), voxelwise(image))


def test_the_middle_of_a_window_counts_most() -> None:
    calls: list[int] = []

    def numbered(part: Tensor) -> Tensor:
        calls.append(len(calls))
        return torch.full((1, 1, *part.shape[2:]), float(calls[-1]))

    found = slide(numbered, torch.zeros(1, 1, 24, 8, 8), (8, 8, 8))[0, 0, :, 4, 4]
    assert len(calls) == 5  # a half of each overlaps
    assert (found.diff() >= 0).all() and found[0] == 0 and found[-1] == 4
    assert found[3] < 0.1 and abs(found[12] - 2) < 0.1

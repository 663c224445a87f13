from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from onelabel.configs.schema import AutoencoderNetworkConfig
from onelabel.configs.streams import PseudoLabelConfig, ViewsConfig
from onelabel.imaging.classes import Classes
from onelabel.imaging.labels import read_probability
from onelabel.imaging.volume import Volume
from onelabel.models import networks
from onelabel.models.networks.autoencoder import Autoencoder, views
from onelabel.models.predictor import Prediction
from onelabel.models.pseudo import PseudoLabeller
from onelabel.models.rankers import AutoencoderRanker
from onelabel.models.rankers.base import Predict, agreement
from onelabel.models.rankers.views import sample_views, seen_by

SIZE = (12, 14, 9)
VIEWS = ViewsConfig(passes=3)


def says(factor: float) -> Predict:
    """A network that believes a share of the brightness."""

    def predict(image: Tensor, /, *, dropout: bool = False) -> Tensor:
        return torch.cat([1 - factor * image, factor * image], dim=1)

    return predict


NETWORKS = [says(1.0), says(0.5), says(0.0)]


def image_of(*, seed: int = 0) -> Tensor:
    """(1, 1, *SIZE): a noisy box, in a dark border."""
    image = torch.zeros(1, 1, *SIZE)
    noise = torch.rand((6, 7, 5), generator=torch.Generator().manual_seed(seed))
    image[0, 0, 3:9, 3:10, 2:7] = 0.55 + 0.45 * noise
    return image


def prediction_of(image: Tensor, *, native: Sequence[int] = SIZE) -> Prediction:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    return Prediction(Volume(np.zeros(native, np.uint8), affine), image, says(1.0)(image), affine)


def test_by_itself_it_is_the_present_networks_probability() -> None:
    image = image_of()
    found = PseudoLabeller(PseudoLabelConfig(), says(1.0)).on_grid(prediction_of(image))
    assert torch.equal(found, image[0])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seen", [None, VIEWS])
def test_it_is_the_mean_over_networks_and_views(count: int, seen: ViewsConfig | None) -> None:
    image = image_of()
    labeller = PseudoLabeller(PseudoLabelConfig(views=seen), NETWORKS[0], earlier=NETWORKS[1:count])
    passes = [predict(image) for predict in NETWORKS[:count]]
    if seen:
        views = sample_views(seen)
        passes += [each for one in NETWORKS[:count] for each in seen_by(one, image, views, own=one(image))]
    found = labeller.on_grid(prediction_of(image))
    assert torch.allclose(found, torch.stack(passes).mean(0)[0, 1:], atol=1e-6)
    assert found.shape == (1, *SIZE)


class Eroding(Autoencoder):
    """Gives back a mask without what has no neighbour below, and is sure of it."""

    def forward(self, mask: Tensor) -> Tensor:
        kept = mask[:, 1] * mask[:, 1].roll(1, -1)
        return 200 * torch.stack([0.5 - kept, kept - 0.5], dim=1)


class Sharing(Autoencoder):
    """Gives back the shares that it sees."""

    def forward(self, mask: Tensor) -> Tensor:
        return mask.clamp(min=1e-9).log()


def small(*, dims: int = 2, pool: int = 1) -> AutoencoderNetworkConfig:
    return AutoencoderNetworkConfig.model_validate({"size": 64, "width": 1, "latent": 1, "dims": dims, "pool": pool})


def test_a_projected_mask_is_what_the_autoencoder_says() -> None:
    image = image_of()
    ranker = AutoencoderRanker(Eroding(small()))
    labeller = PseudoLabeller(PseudoLabelConfig(project=True), says(1.0), autoencoder=ranker)
    mask = image[0, 0] > 0.5
    assert mask.any()
    # Slices run along the last axis, so the last axis of a slice is the second of the volume.
    expected = (mask & mask.roll(1, 1)).float()
    assert torch.equal(labeller.on_grid(prediction_of(image))[0], expected)


def test_a_fitted_autoencoder_is_asked_as_the_ranker_asks_it() -> None:
    network = networks.build(AutoencoderNetworkConfig(size=64, width=4, latent=4, pool=1)).eval()
    assert isinstance(network, Autoencoder)
    mask = (image_of()[0, 0] > 0.5).long()
    found = AutoencoderRanker(network).reconstruct(mask)[0]
    with torch.no_grad():
        again = network(views(mask, network.config)).softmax(1)[2:7, 1, 2:14, 1:15]
    assert ((again > 0) & (again < 1)).all()
    assert torch.allclose(found.movedim(2, 0)[2:7], again, atol=1e-6)
    assert not found[:, :, :2].any() and not found[:, :, 7:].any()  # slices that were empty


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("size", [(12, 14, 9), (33, 7, 64), (64, 63, 62), (31, 30, 29)])
def test_reconstructions_lie_where_the_mask_does(dims: int, size: tuple[int, ...]) -> None:
    mask = (torch.rand(size, generator=torch.Generator().manual_seed(0)) > 0.5).long()
    assert torch.allclose(AutoencoderRanker(Sharing(small(dims=dims))).reconstruct(mask)[0], mask.float(), atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("pool", [2, 3])
@pytest.mark.parametrize("size", [(44, 40, 42), (43, 47, 40)])
def test_blocks_come_back_where_they_were(dims: int, pool: int, size: tuple[int, ...]) -> None:
    place = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in size], indexing="ij"))
    centre = torch.tensor([20.3, 19.0, 21.7])[:, None, None, None]
    mask = ((place - centre).norm(dim=0) < 14).long()
    found = AutoencoderRanker(Sharing(small(dims=dims, pool=pool))).reconstruct(mask)[0]
    assert found.shape == size and 0 <= found.min() and found.max() <= 1
    assert agreement(mask, (found > 0.5).long()) > 0.97
    weighed = (place * found).flatten(1).sum(1) / found.sum()
    assert torch.allclose(weighed, centre.flatten(), atol=0.1)


def test_the_scans_own_grid_holds_bytes() -> None:
    image = image_of()
    found = PseudoLabeller(PseudoLabelConfig(), says(1.0))(prediction_of(image))
    assert found.data.dtype == np.uint8
    assert np.abs(found.data / 255 - image[0, 0].numpy()).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(found.data > 127, image[0, 0].numpy() > 0.5)
    wide = PseudoLabeller(PseudoLabelConfig(), says(1.0))(prediction_of(image, native=(20, 20, 20)))
    assert np.array_equal(wide.data[:12, :14, :9], found.data) and wide.data[12:].max() == 0


def test_pseudo_labels_are_cleaned_as_masks_are() -> None:
    image = image_of()
    image[0, 0, 6, 6, 4] = 0.3  # a hole
    image[0, 0, 1, 1, 0:2] = 0.9  # an island
    image[0, 0, 1, 3, 0] = 0.4  # no structure
    found = PseudoLabeller(PseudoLabelConfig(), says(1.0))(prediction_of(image)).data
    assert found[6, 6, 4] == 255
    assert found[1, 1].max() == 0
    assert found[1, 3, 0] == 102


def test_where_two_networks_differ_is_no_structure() -> None:
    image = (image_of() > 0.5).float()
    found = PseudoLabeller(PseudoLabelConfig(), says(1.0), earlier=[says(0.0)])(prediction_of(image)).data
    assert set(np.unique(found)) == {0, 127}


NAMES = Classes(("background", "a", "b", "c"), ((0,), (1,), (2,), (3,)))


def three(image: Tensor, /, *, dropout: bool = False) -> Tensor:
    """A network that parts what it sees along the first axis into three structures."""
    parts = torch.zeros(1, 3, *SIZE)
    parts[:, 0, :5], parts[:, 1, 5:7], parts[:, 2, 7:] = image[0, :, :5], image[0, :, 5:7], image[0, :, 7:]
    return torch.cat([1 - parts.sum(1, keepdim=True), parts], dim=1)


def test_of_several_structures_each_has_its_probability() -> None:
    image = image_of()
    image[0, 0, 1, 3, 0] = 0.4  # no structure
    image[0, 0, 1, 1, 0] = 0.9  # an island
    affine = np.eye(4)
    prediction = Prediction(Volume(np.zeros(SIZE, np.uint8), affine), image, three(image), affine)
    found = PseudoLabeller(PseudoLabelConfig(), three, classes=NAMES)(prediction).data
    assert found.shape == (*SIZE, 3) and found.dtype == np.uint8
    target = read_probability(np.moveaxis(found, -1, 0))
    assert [np.unique(target[part]).tolist() for part in (slice(5), slice(5, 7), slice(7, None))] == [
        [0, 1],
        [0, 2],
        [0, 3],
    ]
    assert found[1, 1, 0].tolist() == [0, 0, 0] and found[1, 3, 0].tolist() == [102, 0, 0]
    inside = image[0, 0].numpy() > 0.5
    inside[1, 1, 0] = False
    assert np.array_equal(target > 0, inside)


@pytest.mark.parametrize("dims", [2, 3])
def test_reconstructions_keep_classes(dims: int) -> None:
    config = AutoencoderNetworkConfig.model_validate({"size": 64, "width": 1, "latent": 1, "pool": 1} | {"dims": dims})
    config = config.model_copy(update={"classes": 4})
    mask = torch.randint(0, 4, (20, 14, 9), generator=torch.Generator().manual_seed(0))
    found = AutoencoderRanker(Sharing(config)).reconstruct(mask)
    assert found.shape == (3, 20, 14, 9)
    assert torch.equal(torch.cat([torch.full_like(found[:1], 0.5), found]).argmax(0), mask)

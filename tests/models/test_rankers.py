import pytest
import torch
from torch import Tensor, nn

from onelabel.configs.schema import AutoencoderConfig, AutoencoderNetworkConfig, UNetConfig
from onelabel.models import networks
from onelabel.models.learners import LEARNERS, Progress, Samples
from onelabel.models.networks.autoencoder import Autoencoder
from onelabel.models.rankers import AutoencoderRanker

SIZE = (24, 28, 20)
STEPS = 60


def mask_of(*, radius: float = 9.0, shift: float = 0.0) -> Tensor:
    """(24, 28, 20) int8: a ball."""
    place = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in SIZE], indexing="ij"))
    centre = torch.tensor([11.5 + shift, 13.5, 9.5])
    return ((place - centre[:, None, None, None]).norm(dim=0) < radius).to(torch.int8)


def score(ranker: AutoencoderRanker, *masks: Tensor) -> list[float]:
    label = torch.stack(masks)
    probability = torch.stack([label == 0, label == 1], dim=1).float()
    scores = ranker.score(torch.zeros(len(masks), 1, *SIZE), probability, lambda image: image)
    assert scores.shape == (len(masks),)
    assert scores.dtype == torch.float32
    found: list[float] = scores.tolist()
    return found


@pytest.fixture(scope="module")
def ranker() -> AutoencoderRanker:
    """Fitted to one ball, a little moved."""
    torch.manual_seed(0)
    network = networks.build(AutoencoderNetworkConfig(size=64, width=8, latent=16, dropout=0))
    config = AutoencoderConfig(learning_rate=5e-3, slices=12)
    learner = LEARNERS["autoencoder"](config, network, device=torch.device("cpu"), bf16=False)
    for step in range(STEPS):
        torch.manual_seed(step)
        label = mask_of(shift=float(torch.randint(-1, 2, ()))).unsqueeze(0)
        learner.step({"train": Samples(torch.zeros(1, 1, *SIZE), label, torch.ones(1))}, Progress(step, STEPS))
    return AutoencoderRanker(learner.predictor())


def test_the_training_mask_scores_above_a_damaged_one(ranker: AutoencoderRanker) -> None:
    good = mask_of()
    half = good.clone()
    half[:, 14:] = 0
    scattered = good * (torch.rand(SIZE, generator=torch.Generator().manual_seed(0)) < 0.5)
    elsewhere = good.roll((10, 12), (0, 1))
    scores = score(ranker, good, half, scattered, elsewhere)
    assert scores[0] > 0.85
    assert max(scores[1:]) < scores[0] - 0.1
    assert all(0 <= value <= 1 for value in scores)


def test_an_empty_mask_scores_nothing(ranker: AutoencoderRanker) -> None:
    assert score(ranker, torch.zeros_like(mask_of()), mask_of())[0] == 0


def test_scores_repeat_and_do_not_depend_on_the_batch(ranker: AutoencoderRanker) -> None:
    masks = [mask_of(), mask_of(radius=6), mask_of(shift=4)]
    together = score(ranker, *masks)
    assert together == score(ranker, *masks)
    assert together == pytest.approx([score(ranker, mask)[0] for mask in masks], abs=1e-6)
    assert len(set(together)) == 3


class Eroding(Autoencoder):
    """Gives back a mask without what has no neighbour below."""

    def forward(self, mask: Tensor) -> Tensor:
        kept = mask[:, 1] * mask[:, 1].roll(1, -1)
        return torch.stack([1 - kept, kept], dim=1)


def test_the_score_is_the_dice_with_the_reconstruction() -> None:
    mask = mask_of()
    # Slices run along the last axis, so the last axis of a slice is the second of the volume.
    kept = mask & mask.roll(1, 1)
    expected = 2 * kept.sum() / (mask.sum() + kept.sum())
    found = score(AutoencoderRanker(Eroding(AutoencoderNetworkConfig(size=64, width=1, latent=1))), mask)
    assert found == pytest.approx([expected.item()], abs=1e-6)
    assert found[0] < 0.99


def test_a_ranker_evaluates() -> None:
    network = networks.build(AutoencoderNetworkConfig(size=64, width=8, latent=16, dropout=0.9))
    assert network.training
    masks = [mask_of(), mask_of(radius=5)]
    built = AutoencoderRanker(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert score(built, *masks) == score(built, *masks)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_three_dimensions_are_ranked_too() -> None:
    config = AutoencoderNetworkConfig(dims=3, size=64, width=2, latent=2)
    (value,) = score(AutoencoderRanker(networks.build(config)), mask_of())
    assert 0 <= value <= 1


def test_only_an_autoencoder_ranks() -> None:
    other: nn.Module = networks.build(UNetConfig(channels=(4,)))
    with pytest.raises(TypeError, match="needs an Autoencoder, not a UNet"):
        AutoencoderRanker(other)

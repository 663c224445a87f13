import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onelabel.configs.schema import (
    AutoencoderConfig,
    AutoencoderNetworkConfig,
    ConfidenceRankerConfig,
    ConsistencyRankerConfig,
    PosteriorRankerConfig,
    UNetConfig,
)
from onelabel.configs.streams import ViewsConfig
from onelabel.models import networks
from onelabel.models.learners import LEARNERS, Progress, Samples
from onelabel.models.networks.autoencoder import Autoencoder
from onelabel.models.rankers import (
    AutoencoderRanker,
    ConfidenceRanker,
    ConsistencyRanker,
    PosteriorRanker,
    Ranker,
    build,
    fuse,
)
from onelabel.models.rankers.base import agreement
from onelabel.models.rankers.views import View, back, look, sample_views

SIZE = (24, 28, 20)
STEPS = 160


def mask_of(*, radius: float = 9.0, shift: float = 0.0) -> Tensor:
    """(24, 28, 20) int8: a ball."""
    place = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in SIZE], indexing="ij"))
    centre = torch.tensor([11.5 + shift, 13.5, 9.5])
    return ((place - centre[:, None, None, None]).norm(dim=0) < radius).to(torch.int8)


def same(image: Tensor, /, *, dropout: bool = False) -> Tensor:
    """A network that sees nothing but the brightness: bright voxels are the structure."""
    return torch.cat([1 - image, image], dim=1)


def score(ranker: Ranker, *masks: Tensor) -> list[float]:
    label = torch.stack(masks)
    probability = torch.stack([label == 0, label == 1], dim=1).float()
    scores = ranker.score(torch.zeros(len(masks), 1, *SIZE), probability, same)
    assert scores.shape == (len(masks),)
    assert scores.dtype == torch.float32
    found: list[float] = scores.tolist()
    return found


@pytest.fixture(scope="module")
def ranker() -> AutoencoderRanker:
    """Fitted to one ball, a little moved."""
    torch.manual_seed(0)
    network = networks.build(AutoencoderNetworkConfig(pool=1, size=64, width=8, latent=16, dropout=0))
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
        return 99 * torch.stack([1 - kept, kept], dim=1)


def test_the_score_is_the_dice_with_the_reconstruction() -> None:
    mask = mask_of()
    # Slices run along the last axis, so the last axis of a slice is the second of the volume.
    kept = mask & mask.roll(1, 1)
    expected = 2 * kept.sum() / (mask.sum() + kept.sum())
    found = score(AutoencoderRanker(Eroding(AutoencoderNetworkConfig(pool=1, size=64, width=1, latent=1))), mask)
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


# Views


def test_what_a_view_shows_comes_back() -> None:
    mask = mask_of(radius=6)[None, None].float()
    for view in sample_views(ViewsConfig(flip_axes=(0, 1, 2), rotate_deg=40, passes=12)):
        again = back(same(look(mask, view)), view, own=same(mask)).argmax(1)
        assert agreement(mask[0, 0].long(), again[0]) > 0.97


def test_views_turn_by_voxels_whatever_the_shape() -> None:
    # A bar along the first axis, turned by a quarter, lies along the second.
    image = torch.zeros(1, 1, 24, 16, 4)
    image[..., 6:18, 7:9, 1:3] = 1
    turned = look(image, View(0, 1, (), torch.pi / 2))[0, 0] > 0.5
    found = turned.nonzero()
    assert (found.amax(0) - found.amin(0) + 1).tolist() == [2, 12, 2]


def test_views_mirror_the_axes_that_they_name() -> None:
    image = torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(look(image, View(0, 1, (2,), 0)), image.flip(4))
    assert torch.equal(look(image, View(0, 1, (), 0)), image)
    assert torch.allclose(look(image, View(0.1, 0.9, (), 0)), ((image - 0.1) / 0.8).clamp(0, 1))


def test_what_a_view_did_not_show_is_as_the_image_itself_has_it() -> None:
    nothing, structure = torch.zeros(1, 1, *SIZE), torch.ones(1, 1, *SIZE)
    own, other = torch.cat([structure, nothing], dim=1), torch.cat([nothing, structure], dim=1)
    seen = back(other, View(0, 1, (), torch.pi / 4), own=own)
    assert torch.allclose(seen.sum(1), torch.ones(1, *SIZE), atol=1e-4)
    assert all(torch.allclose(back(own, view, own=own), own, atol=1e-4) for view in sample_views(ViewsConfig()))
    assert seen[0, 0, 0, 0].min() > 0.99 and seen[0, 1, 11, 13].min() > 0.99


def test_views_repeat_and_differ() -> None:
    config = ViewsConfig()
    assert sample_views(config) == sample_views(config)
    assert len(set(sample_views(config))) == len(sample_views(config)) == config.passes


# Consistency and confidence


def looked_at(ranker: Ranker, image: Tensor) -> float:
    """Score of what `same` says of an image (*size)."""
    batch = image[None, None]
    return float(ranker.score(batch, same(batch), same)[0])


def test_consistency_is_high_where_views_agree() -> None:
    ranker = build(ConsistencyRankerConfig())
    assert isinstance(ranker, ConsistencyRanker)
    ball = mask_of().float()
    clear, noise = ball, torch.rand(SIZE, generator=torch.Generator().manual_seed(1))
    scores = [looked_at(ranker, image) for image in (clear, noise)]
    assert scores[0] > 0.97 > 0.93 > scores[1]
    assert looked_at(ranker, torch.zeros(SIZE)) == 0


def test_consistency_falls_where_an_edge_hangs_on_the_contrast() -> None:
    place = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in SIZE], indexing="ij"))
    distance = (place - torch.tensor([11.5, 13.5, 9.5])[:, None, None, None]).norm(dim=0)
    sharp, soft = (distance < 7).float(), (1 - distance / 14).clamp(0, 1)
    ranker = ConsistencyRanker(ConsistencyRankerConfig(rotate_deg=0, contrast=0.2))
    assert looked_at(ranker, sharp) == 1 > 0.98 > looked_at(ranker, soft)
    blind = ConsistencyRanker(ConsistencyRankerConfig(rotate_deg=0, contrast=0))
    assert looked_at(blind, soft) == 1


@pytest.mark.parametrize("of", ["prediction", "views"])
def test_confidence_falls_as_probabilities_near_one_half(of: str) -> None:
    ranker = build(ConfidenceRankerConfig.model_validate({"of": of}))
    assert isinstance(ranker, ConfidenceRanker)
    ball = mask_of().float()
    sure, less, least = (looked_at(ranker, 0.5 + (ball - 0.5) * scale) for scale in (1, 0.8, 0.2))
    assert 1 >= sure > 0.7 > least >= 0
    assert sure > less > least
    assert looked_at(ranker, torch.zeros(SIZE)) == 0


def test_confidence_by_hand() -> None:
    # Probability 3/4 inside, 0 elsewhere, and no voxel around: the entropy of a coin of 3/4, in bits.
    ranker = ConfidenceRanker(ConfidenceRankerConfig(dilate=0))
    entropy = -(0.75 * torch.tensor(0.75).log2() + 0.25 * torch.tensor(0.25).log2())
    assert looked_at(ranker, mask_of() * 0.75) == pytest.approx(1 - entropy.item(), abs=1e-5)
    assert looked_at(ConfidenceRanker(ConfidenceRankerConfig(dilate=2)), mask_of() * 0.75) > 1 - entropy


def test_confidence_by_dropout_draws_the_same_passes_each_time() -> None:
    asked: list[bool] = []

    def shaky(image: Tensor, /, *, dropout: bool = False) -> Tensor:
        asked.append(dropout)
        moved = (image + 0.4 * (torch.rand(()) - 0.5)).clamp(0, 1)
        return torch.cat([1 - moved, moved], dim=1)

    config = ConfidenceRankerConfig(of="dropout", views=ViewsConfig(passes=5))
    image = (mask_of() * 0.8)[None, None]
    ranker = ConfidenceRanker(config)
    scores = [float(ranker.score(image, same(image), shaky)[0]) for _ in range(2)]
    assert scores[0] == scores[1]
    assert asked == [True] * 10


# Fusion


def test_ranks_are_averaged() -> None:
    scores = np.array([[0.1, 0.9, 0.5], [10.0, 20.0, 30.0]])
    assert fuse(scores).tolist() == [0, 0.75, 0.75]
    assert fuse(scores, (3, 1)).tolist() == [0, 0.875, 0.625]
    assert fuse(scores[:, ::-1]).tolist() == [0.75, 0.75, 0]
    assert fuse(np.exp(scores)).tolist() == fuse(scores).tolist()  # only the order counts


def test_equal_scores_share_their_rank_and_what_failed_has_none() -> None:
    assert fuse(np.array([[0.5, 0.5, 0.9]])).tolist() == [0.25, 0.25, 1]
    fused = fuse(np.array([[0.5, np.nan, 0.9], [0.5, 0.7, 0.9]]))
    assert np.isnan(fused[1]) and fused[[0, 2]].tolist() == [0, 1]
    assert np.isnan(fuse(np.array([[np.nan]]))).all()
    assert fuse(np.array([[0.3]])).tolist() == [0]


STILL = PosteriorRankerConfig(contrast=0, flip_axes=(), rotate_deg=0, passes=1)


def judged(image: Tensor, mask: Tensor, config: PosteriorRankerConfig = STILL) -> float:
    """Posterior of a mask, whoever made it, on an image of which the network believes the brightness."""
    label = mask.unsqueeze(0)
    given = torch.stack([label == 0, label == 1], dim=1).float()
    return float(PosteriorRanker(config).score(image[None, None], given, same)[0])


def test_the_posterior_is_the_dice_to_expect() -> None:
    ball = mask_of()
    assert judged(ball * 0.8, ball) == pytest.approx(2 * 0.8 / 1.8)
    assert judged(ball.float(), ball) == 1
    assert judged(ball.float(), mask_of(radius=0)) == 0
    # What a fair coin decides, voxel by voxel, has that Dice in the mean.
    rng = torch.Generator().manual_seed(0)
    drawn = [(torch.rand(SIZE, generator=rng) < ball * 0.8).to(torch.int8) for _ in range(50)]
    mean = np.mean([float(agreement(ball, one)) for one in drawn])
    assert judged(ball * 0.8, ball) == pytest.approx(mean, abs=0.005)


def test_the_posterior_sees_what_is_wrong_with_a_mask_of_another_tool() -> None:
    image = mask_of() * 0.9
    wrong = [mask_of(shift=2), mask_of(shift=4), mask_of(shift=8)]
    scores = [judged(image, mask) for mask in (mask_of(), *wrong)]
    assert scores == sorted(scores, reverse=True) and scores[-1] < 0.7
    assert max(judged(image, mask_of(radius=6)), judged(image, mask_of(radius=12))) < scores[0]


def test_the_posterior_averages_over_views() -> None:
    # Half of the structure is so faint that some contrasts lose it.
    image = mask_of() * 0.9
    image[:, :, 10:] *= 0.1
    config = PosteriorRankerConfig(contrast=0.3, flip_axes=(0,), rotate_deg=10, passes=6)
    assert 0 < judged(image, mask_of(), config) < judged(mask_of() * 0.9, mask_of(), config) <= 1


# Several structures


def several(*values: int) -> Tensor:
    """Probabilities (1, 4, *SIZE), sure of a class in each slab along the second axis, four voxels thick."""
    label = torch.tensor(values).repeat_interleave(4).view(1, 1, -1, 1).expand(1, *SIZE)
    return torch.stack([label == index for index in range(4)], dim=1).float()


def test_agreement_is_the_mean_over_structures() -> None:
    one, other = several(0, 1, 2, 2, 2, 2, 0).argmax(1)[0], several(0, 1, 1, 2, 2, 2, 0).argmax(1)[0]
    assert float(agreement(one, one)) == 1
    assert float(agreement(one, other)) == pytest.approx((2 / 3 + 6 / 7) / 2)
    assert float(agreement(one, several(0, 1, 2, 2, 2, 2, 3).argmax(1)[0])) == pytest.approx(2 / 3)
    assert float(agreement(torch.zeros_like(one), one)) == 0


class Confusing(Autoencoder):
    """Takes all of the third class for the second."""

    def forward(self, mask: Tensor) -> Tensor:
        again = torch.stack([mask[:, 0], mask[:, 1], mask[:, 2] + mask[:, 3], torch.zeros_like(mask[:, 3])], dim=1)
        return 99 * again


def test_every_ranker_sees_each_class() -> None:
    image, sure = torch.zeros(1, 1, *SIZE), several(0, 1, 1, 1, 2, 3, 0)

    def steady(image: Tensor, /, *, dropout: bool = False) -> Tensor:
        return sure

    config = AutoencoderNetworkConfig(pool=1, size=64, width=1, latent=1, classes=4)
    again = AutoencoderRanker(Confusing(config)).score(image, sure, steady)
    assert float(again[0]) == pytest.approx((1 + 2 / 3 + 0) / 3, abs=1e-5)
    # What is unsure between two structures counts as much as what is unsure of the structure itself.
    for ranker in (ConfidenceRanker(ConfidenceRankerConfig()), PosteriorRanker(STILL)):
        unsure = sure.clone()
        unsure[:, 1:3, :, 12:20] = 0.5
        unsure[:, [0, 3], :, 12:20] = 0
        scores = [float(ranker.score(image, given, lambda *_, given=given, **__: given)[0]) for given in (sure, unsure)]
        assert scores[0] == pytest.approx(1) and scores[1] < 0.95


def test_one_structure_scores_as_before_whatever_the_others() -> None:
    # Two classes of which the second has no voxel score like one.
    ball = mask_of().float() * 0.8
    two = torch.stack([1 - ball, ball])[None]
    three = torch.cat([two, torch.zeros(1, 1, *SIZE)], dim=1)
    image = ball[None, None]
    for given in (two, three):
        ranker = PosteriorRanker(STILL)
        score = ranker.score(image, given, lambda *_, given=given, **__: given)
        assert float(score[0]) == pytest.approx(2 * 0.8 / 1.8, abs=1e-6)

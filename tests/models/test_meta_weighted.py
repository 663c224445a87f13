"""Weights from the derivative along the clean gradient are those of two backward passes; views are undone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from toys import batch, learner, samples, step, weights

from onelabel.configs.learners import MetaWeightedConfig
from onelabel.configs.load import load
from onelabel.configs.schema import UNetConfig
from onelabel.errors import ConfigError
from onelabel.imaging import random
from onelabel.imaging.labels import IGNORE
from onelabel.models import networks
from onelabel.models.learners import Progress
from onelabel.models.learners.meta_weighted import (
    Warp,
    consistency,
    costs,
    enhanced,
    look,
    look_at_label,
    meta_weights,
    sample_warps,
    unwarp,
    warp,
)

WARPS = [Warp(), Warp(1.3), Warp(1 / 1.3), Warp(flip=(0, 2))]


@pytest.mark.parametrize("dims", [2, 3])
def test_weights_are_those_of_two_backward_passes(dims: int) -> None:
    # A virtual step of plain gradient descent down sum(e C), and the meta loss after it, by e at 0.
    network = networks.build(UNetConfig.model_validate({"dims": dims, "channels": (4, 8), "patch": 1, "classes": 3}))
    network.double()
    image, clean_image = torch.rand(2, 2, 1, *[8] * dims, dtype=torch.float64)
    label, clean_label = torch.randint(0, 3, (3, 2, *[8] * dims)).split([2, 1])
    label[0, 0, 0] = IGNORE
    parameters = dict(network.named_parameters())
    share = torch.zeros(label.shape, dtype=torch.float64, requires_grad=True)
    cost = (share * costs(network(image), label)).sum()
    moves = torch.autograd.grad(cost, list(parameters.values()), create_graph=True)
    moved = {name: p - 0.1 * move for (name, p), move in zip(parameters.items(), moves, strict=True)}
    meta = F.cross_entropy(functional_call(network, moved, (clean_image,)), clean_label[0])
    expected = (-torch.autograd.grad(meta, share)[0]).clamp(min=0)
    expected /= expected.sum((0, 2, *range(3, expected.ndim)), keepdim=True)

    clean = F.cross_entropy(network(clean_image), clean_label[0])
    gradient = dict(zip(parameters, torch.autograd.grad(clean, list(parameters.values())), strict=True))
    found = meta_weights(network, image, label, gradient, views=1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    assert 0.1 < (found > 0).float().mean() < 0.9
    assert not found[0, 0, 0].any()


def test_weights_of_an_image_sum_to_one_over_its_views_and_both_label_sets() -> None:
    network = networks.build(UNetConfig(channels=(4, 8)))
    given = samples()
    image, label = look(given.image, WARPS), look_at_label(given.label, WARPS)
    gradient = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    found = meta_weights(network, image, torch.stack([label, label]), gradient, views=len(WARPS))
    assert (found >= 0).all()
    assert found.unflatten(1, (len(WARPS), 2)).sum((0, 1, 3, 4, 5)).tolist() == pytest.approx([1, 1], rel=1e-4)
    nothing = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    assert not meta_weights(network, image, torch.stack([label, label]), nothing, views=len(WARPS)).any()


def test_batch_norm_is_left_alone_by_weighing() -> None:
    network = networks.build(UNetConfig(channels=(4, 8), norm="batch")).train()
    before = {name: b.clone() for name, b in network.named_buffers()}
    label = samples().label
    gradient = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    meta_weights(network, samples().image, torch.stack([label, label]), gradient, views=1)
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())


def test_a_right_label_weighs_more_than_a_wrong_one() -> None:
    subject = learner("meta_weighted", 1, flip_axes=(), zoomed_in=0, zoomed_out=0)
    given = samples()
    wrong = torch.where(given.label == IGNORE, given.label, 1 - given.label)
    logits = subject.network(given.image)
    F.cross_entropy(logits, given.label.long(), ignore_index=IGNORE).backward()
    gradient = {name: p.grad for name, p in subject.network.named_parameters() if p.grad is not None}
    both = torch.stack([given.label, wrong])
    right, wrong_weight = meta_weights(subject.network, given.image, both, gradient, views=1).flatten(1).sum(1)
    assert right > 2 * wrong_weight


@pytest.mark.parametrize("view", WARPS)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_view_is_undone(view: Warp, dims: int) -> None:
    if dims == 2 and view.flip:
        view = Warp(flip=(0, 1))
    place = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 16)] * dims, indexing="ij"))
    smooth = (torch.cos(place).prod(0) + place[0] * 0.3)[None, None]
    back = unwarp(warp(smooth, view), view)
    inner = (..., *[slice(4, 12)] * dims)
    torch.testing.assert_close(back[inner], smooth[inner], atol=0.02, rtol=0)
    assert (view == Warp()) == torch.equal(warp(smooth, view), smooth)


def test_a_label_is_unknown_beyond_the_edge() -> None:
    label = torch.randint(0, 3, (2, 8, 8, 8), dtype=torch.int8)
    same, larger, smaller, mirrored = look_at_label(label, WARPS).chunk(4)
    assert torch.equal(same, label)
    assert torch.equal(mirrored, label.flip((1, 3)))
    assert (larger != IGNORE).all()
    assert (smaller[:, 0] == IGNORE).all() and (smaller[:, 2:6, 2:6, 2:6] != IGNORE).all()


def sure(label: Tensor) -> Tensor:
    return 20.0 * F.one_hot(label.clamp(min=0).long(), 2).movedim(-1, 1)


def test_views_that_say_the_same_agree_and_are_the_enhanced_label() -> None:
    label = samples().label.clamp(min=0)
    views = look_at_label(label, WARPS)
    logits = sure(views).requires_grad_()
    assert consistency(logits, WARPS) < 0.02  # edges are interpolated
    found = enhanced(logits.detach(), WARPS)
    assert (found == views).float().mean() > 0.98
    # One view that errs is outvoted.
    wrong = torch.cat([1 - views[:2].clamp(min=0), views[2:]])
    assert (enhanced(sure(wrong), WARPS)[4:] == views[4:]).float().mean() > 0.9
    apart = consistency(torch.randn_like(logits).requires_grad_(), WARPS)
    assert apart > 0.05


def test_consistency_pulls_at_every_view() -> None:
    logits = torch.randn(len(WARPS), 2, 8, 8, 8, requires_grad=True)
    consistency(logits, WARPS).backward()
    assert logits.grad is not None
    assert all(each.any() for each in logits.grad)
    assert consistency(logits[:1], WARPS[:1]) == 0


def test_views_are_drawn_as_asked_for() -> None:
    config = MetaWeightedConfig(zoomed_in=2, zoomed_out=3, zoom=(1.1, 1.2), flip_axes=(0, 1))
    drawn = [sample_warps(config, random.generator(seed)) for seed in range(40)]
    for same, *zoomed, _ in drawn:
        assert same == Warp()
        assert [view.zoom > 1 for view in zoomed] == [True, True, False, False, False]
        assert all(1.1 <= max(view.zoom, 1 / view.zoom) <= 1.2 for view in zoomed)
    assert {views[-1].flip for views in drawn} == {(0,), (1,), (0, 1)}


def test_the_teacher_is_never_reset_and_its_buffers_follow() -> None:
    subject = learner("meta_weighted", 1, network={"norm": "batch"}, ema=0.75)
    assert subject.mean
    expected: list[Tensor] = []
    subject.optimiser.register_step_post_hook(lambda *_: expected.append(weights(subject)))
    for index in range(3):
        step(subject, index)
    mean = expected[0]
    for each in expected[1:]:
        mean = 0.75 * mean + 0.25 * each
    assert len(expected) == 6 == int(subject.mean.n_averaged)
    torch.testing.assert_close(weights(subject.predictor()), mean)
    buffers = [b for name, b in subject.predictor().named_buffers() if name.endswith("running_mean")]
    assert buffers and all(b.any() for b in buffers)


def test_what_differentiates_forwards_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match="compute.compile cannot: turn it off"):
        load(["mlbseg", "data={labelled: one.nii.gz, unlabelled: many}", "compute.compile=true"])


def test_initial_labels_are_read() -> None:
    one, two = learner("meta_weighted", 1), learner("meta_weighted", 1)
    for subject, other in ((one, 0), (two, 1)):
        given = batch(subject) | {"pseudo": samples(7)}
        if other:
            given["pseudo"] = type(given["pseudo"])(
                samples(7).image, 1 - samples(7).label.clamp(min=0), samples(7).weight
            )
        torch.manual_seed(0)
        subject.step(given, Progress(0, 5))
    assert not torch.equal(weights(one), weights(two))

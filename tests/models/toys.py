"""Small learners and a problem that they can learn."""

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from onelabel.configs.learners import LearnerConfig, OptimiserConfig
from onelabel.configs.schema import AutoencoderNetworkConfig, UNetConfig
from onelabel.imaging.labels import IGNORE
from onelabel.models import networks
from onelabel.models.learners import LEARNERS, Learner, Progress, Samples
from onelabel.models.learners.base import keep

CONFIGS: dict[str, type[OptimiserConfig]] = {
    config.model_fields["type"].default: config for config in get_args(get_args(LearnerConfig)[0])
}
CPU = torch.device("cpu")
STEPS = 30
# Few slices, passes and views, for speed; the default where there must be a mean.
_SETTINGS: dict[str, dict[str, Any]] = {
    "autoencoder": {"slices": 4},
    "curriculum": {"views": {"passes": 1}, "ema": 0.9},
    "meta_weighted": {"zoomed_out": 0, "ema": 0.9},
    "scribble": {"ema": 0.9},
}


def learner(
    name: str,
    seed: int = 0,
    *,
    bf16: bool = False,
    average: Callable[[list[nn.Parameter]], None] = keep,
    network: dict[str, Any] | None = None,
    **changes: Any,
) -> Learner:
    torch.manual_seed(seed)
    heads = {"heads": 1} if name == "scribble" else {}
    unet = UNetConfig.model_validate({"channels": (8, 16), "patch": 2} | heads | (network or {}))
    autoencoder = AutoencoderNetworkConfig(size=64, width=8, latent=8, dropout=0.1)
    settings = {"learning_rate": 1e-2, "weight_decay": 0} | _SETTINGS.get(name, {}) | changes
    config = CONFIGS[name].model_validate(settings)
    built = networks.build(autoencoder if name == "autoencoder" else unet)
    return LEARNERS[name](config, built, device=CPU, bf16=bf16, average=average)


def samples(seed: int = 0, classes: int = 2) -> Samples:
    """Bright balls in noise, with their masks and some voxels unknown; one half is of a third class, if wanted."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij"))
    centres = 6 + 4 * torch.rand(2, 3, generator=generator)
    label = torch.stack([(place - c[:, None, None, None]).norm(dim=0) < 5 for c in centres]).to(torch.int8)
    image = label.float() * 0.5 + 0.4 * torch.rand(label.shape, generator=generator)
    if classes == 3:
        label += (label > 0) & (place[0] > 8)
    label[:, 0] = IGNORE
    return Samples(image.unsqueeze(1), label, torch.tensor([1.0, 0.5]))


def batch(subject: Learner, index: int = 0, classes: int = 2) -> dict[str, Samples]:
    """A batch of every stream, of images of its own."""
    return {name: samples(10 * index + place, classes) for place, name in enumerate(subject.streams)}


def step(subject: Learner, index: int = 0, steps: int = STEPS) -> dict[str, float]:
    """One step, whose randomness follows from its index as in training."""
    torch.manual_seed(1000 + index)
    return subject.step(batch(subject, index), Progress(index, steps))


def weights(subject: Learner | nn.Module) -> Tensor:
    network = subject.network if isinstance(subject, Learner) else subject
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def part(given: Samples, index: int) -> Samples:
    """One sample of a batch, as a batch."""
    return Samples(*(each[index : index + 1] for each in (given.image, given.label, given.weight)))

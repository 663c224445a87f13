"""A trained network on disk: a folder with weights and a page of facts."""

import hashlib
import json
import pickle
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from onelabel import __version__
from onelabel.configs.schema import NetworkConfig, UNetConfig
from onelabel.errors import CheckpointError
from onelabel.imaging import storage
from onelabel.imaging.classes import Classes
from onelabel.imaging.storage import AnyPath
from onelabel.models import networks

DEFAULT = Path(__file__).parent / "brain"  # comes with onelabel: docs/model-card.md
_WEIGHTS = "weights.pt"
META = "meta.json"  # comes last


@dataclass(frozen=True)
class Meta:
    """What a checkpoint is: enough to build its network and to know where it came from.

    network : config of the network; grid : spacing_mm, size and patch
    classes : names by index; labels : how files write them, the other fields of `imaging.classes.Classes`
    """

    network: dict[str, Any]
    learner: str
    grid: dict[str, Any]
    step: int
    seed: int
    manifest_digest: str
    classes: tuple[str, ...] = ("background", "foreground")
    versions: dict[str, str] = field(default_factory=dict)
    git: str = ""
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def patch(self) -> tuple[int, ...] | None:
        """Voxels of the patches that the network learned from, if not from whole grids."""
        known = self.grid.get("patch")  # early checkpoints have none
        return tuple(known) if known else None

    def __post_init__(self) -> None:
        # JSON knows lists alone.
        object.__setattr__(self, "classes", tuple(self.classes))


def save(folder: AnyPath, network: nn.Module, meta: Meta, /) -> None:
    """Write a checkpoint as a whole or not at all."""
    with storage.building(folder, last=META) as unfinished:
        torch.save(network.state_dict(), unfinished / _WEIGHTS)
        (unfinished / META).write_text(json.dumps(asdict(meta), indent=1, sort_keys=True))


def load(path: AnyPath, /) -> tuple[nn.Module, Meta]:
    """Read a checkpoint folder, or the newest one in a run's folder; the network comes in evaluation mode.

    Raises
    ------
    CheckpointError : nothing there, or not a checkpoint of this version.
    StorageError : an object store that does not answer.
    """
    folder = find(path)
    try:
        meta = Meta(**json.loads((folder / META).read_text()))
        config: Any = TypeAdapter(NetworkConfig).validate_python(meta.network)
        network = networks.build(config)
        with storage.local(folder / _WEIGHTS) as weights:
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except (OSError, EOFError, ValueError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint '{folder}' cannot be read ({reason}); train it again") from None
    return network.eval(), meta


def load_segmenter(path: AnyPath, /) -> tuple[nn.Module, Meta]:
    """Like `load`, for checkpoints that segment images."""
    network, meta = load(path)
    if meta.network["type"] != UNetConfig().type:
        raise CheckpointError(f"checkpoint '{path}' holds a {meta.network['type']}, not a segmentation network")
    _check_grid(path, meta)
    _check_classes(path, meta)
    return network, meta


def _check_grid(path: AnyPath, meta: Meta) -> None:
    """The grid must be one that the network can work on."""
    try:
        size, spacing_mm = tuple(meta.grid["size"]), tuple(meta.grid["spacing_mm"])
        window = meta.patch or size
        divisors = UNetConfig.model_validate(meta.network).divisors
        sound = len(size) == len(spacing_mm) == 3 and min(spacing_mm) > 0 and min(size) > 0
        sound = sound and not any(n % divisor for n, divisor in zip(window, divisors, strict=True))
        sound = sound and all(part <= whole for part, whole in zip(window, size, strict=True))
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(f"checkpoint '{path}' has a grid {meta.grid} that its network cannot use; train it again")


def _check_classes(path: AnyPath, meta: Meta) -> None:
    """There must be a name for each class that the network tells apart."""
    try:
        sound = len(Classes(meta.classes, **meta.labels).names) == UNetConfig.model_validate(meta.network).classes
    except (ValueError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"checkpoint '{path}' names the classes {meta.classes}, which its network lacks or this version does"
            " not know; train it again"
        )


def digest(path: AnyPath, /) -> str:
    """Tells one trained network, with all that belongs to it, from any other.

    Raises
    ------
    CheckpointError : there is none.
    """
    known = hashlib.sha256()
    with storage.local(find(path)) as folder:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            known.update(file.relative_to(folder).as_posix().encode() + b"\0")
            known.update(file.read_bytes())
    return known.hexdigest()[:16]


def is_there(folder: AnyPath, /) -> bool:
    """Whether a checkpoint folder is complete."""
    return (folder / META).is_file()


def find(path: AnyPath, /) -> AnyPath:
    """The checkpoint folder itself, or that of the last trained round in a run's folder."""
    if is_there(path):
        return path
    # By length first: round-100 comes after round-99.
    metas: Iterable[AnyPath] = path.glob(f"round-*/checkpoint/{META}")
    found = sorted(metas, key=lambda meta: (len(str(meta)), str(meta)))
    if not found:
        raise CheckpointError(f"no checkpoint at '{path}'; give a checkpoint folder or the folder of a run")
    return found[-1].parent


def provenance() -> dict[str, Any]:
    """Versions and, in a checkout, the commit: `versions` and `git` of a Meta."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        git = ""
    return {"versions": {"onelabel": __version__, "torch": torch.__version__, "python": python_version()}, "git": git}

"""One scan stripped: read, segmented, judged and written, as a row that says how it went. No Ray."""

import errno
import json
import math
import resource
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from onelabel import __version__
from onelabel.errors import SCAN_FAULTS, ClusterError, ConfigError, sentence
from onelabel.imaging import edges, outputs, picture, places, series
from onelabel.imaging.places import Folder
from onelabel.imaging.storage import AnyPath
from onelabel.imaging.volume import Volume
from onelabel.models import checkpoint as checkpoints
from onelabel.models import quality
from onelabel.models.predictor import Predictor
from onelabel.models.quality import Trust
from onelabel.tasks.strip_plan import Job

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "image", "mask", "brain", "distance")),
        *((name, pa.float64()) for name in ("volume_ml", "score", "expected_dice", "expected_low", "expected_high")),
        ("structures_ml", pa.string()),
        ("flag", pa.bool_()),
        ("flags", pa.string()),
        ("grid", pa.string()),
        *((f"seconds_{phase}", pa.float64()) for phase in ("load", "predict", "trust", "save")),
        ("peak_memory_mb", pa.float64()),
        ("picture", pa.binary()),
        ("error_class", pa.string()),
        ("error", pa.string()),
    ]
)
EMPTY, FULL, LOW, EDGE = "empty", "full", "low expected Dice", "touches the edge of the field of view"
CUT = "cut off where the network's view ends"
UNLIKE = "volume unlike the others'"
WAIT_S = 1.0  # before a scan is tried again
FAULTS = (*SCAN_FAULTS, ArithmeticError, AttributeError, EOFError, LookupError, TypeError, struct.error, zlib.error)
_PASSING = {
    *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENETDOWN, errno.ENETUNREACH),
    *(errno.EHOSTUNREACH, errno.ESTALE, errno.ETIMEDOUT),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How scans are stripped.

    threads : CPU threads; None: PyTorch decides
    trust : judge masks, where the checkpoint has learned to
    border_mm : how far the mask's edge is moved outwards
    each_frame : a mask for each volume of a 4D series instead of one for all
    """

    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None
    trust: bool = True
    border_mm: float = 0.0
    each_frame: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.border_mm):
            raise ConfigError(f"the border {self.border_mm} is no length: give it in mm")


@dataclass(frozen=True)
class Segmented:
    """A volume, its mask (*size) of label values, mostly uint8, and what to expect of it.

    cut : the mask reaches an end of the network's grid where the scan goes on
    """

    volume: Volume
    mask: NDArray[Any]
    trust: Trust | None
    cut: bool

    @property
    def volume_ml(self) -> float:
        """Of the mask."""
        return np.count_nonzero(self.mask) * self.volume.voxel_mm3 / 1000

    def flags(self) -> list[str]:
        """What speaks against the mask, or should be known of it."""
        inside = self.mask > 0
        if not inside.any():
            return [EMPTY]
        if inside.all():
            return [FULL]
        low = self.trust is not None and self.trust.flag
        edge = any(inside.take(place, axis).any() for axis in range(3) for place in (0, -1))
        return [LOW] * low + [CUT] * self.cut + [EDGE] * edge


class Clock:
    """Seconds by phase; each may be entered several times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time until the end of the block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin


class Stripper:
    """Strips one scan a call; loads the networks once.

    checkpoint : None: the one that comes with onelabel, wherever that lies on this machine

    Raises
    ------
    CheckpointError : no usable checkpoint.
    ClusterError : cuda without a GPU.
    """

    def __init__(self, checkpoint: AnyPath | None, settings: Settings, out: Folder | None = None) -> None:
        checkpoint = checkpoint or checkpoints.DEFAULT
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise ClusterError("PyTorch finds no CUDA device on this machine: use device cpu")
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings, self.out = settings, out
        self.predictor = Predictor(checkpoint, device=settings.device)
        self.judge = quality.load(checkpoint, self.predictor) if settings.trust else None

    def __call__(self, job: Job) -> Row:
        """Strip a scan into the output folder; whatever goes wrong is in its row, see `SCHEMA`."""
        _forget_peak()
        row = self._try(job)
        return row | {"peak_memory_mb": _peak_memory_mb()}

    def segment_all(self, frames: Iterator[Volume], clock: Clock, /) -> tuple[NDArray[Any], Segmented, float]:
        """Segment and judge the volumes of a scan.

        Returns
        -------
        The mask (*size), of several (*size, frames); the one that is least to be trusted; their mean volume in ml.
        """
        masks, volumes_ml, worst = [], [], None
        while True:
            with clock("load"):
                volume = next(frames, None)
            if volume is None:
                break
            found = self._segment(volume, clock)
            masks.append(found.mask)
            volumes_ml.append(found.volume_ml)
            worst = found if worst is None or _doubt(found) < _doubt(worst) else worst
        assert worst
        mask = masks[0] if len(masks) == 1 else np.stack(masks, -1)
        return mask, worst, math.fsum(volumes_ml) / len(volumes_ml)

    def _segment(self, volume: Volume, clock: Clock) -> Segmented:
        with clock("predict"):
            prediction = self.predictor(volume)
        with clock("trust"):
            trust = self.judge(prediction) if self.judge else None
        with clock("predict"):
            mask = edges.move(prediction.mask.data, self.settings.border_mm, volume.spacing_mm)
        return Segmented(volume, mask, trust, prediction.cut)

    def _try(self, job: Job) -> Row:
        """Strip a scan, twice if what failed the first time can pass."""
        for last in (False, True):
            row: Row = dict.fromkeys(SCHEMA.names) | {"key": job.key, "image": job.image}
            try:
                return row | self._strip(job)
            except FAULTS as error:
                row |= {"error_class": type(error).__name__, "error": sentence(error)}
                if last or not can_pass(error):
                    break
                time.sleep(WAIT_S)
        if self.out:
            with suppress(OSError):  # what an earlier command made is not of this scan, or not of this network
                self.out.remove(job.results)
        return row

    def _strip(self, job: Job) -> Row:
        assert self.out
        clock = Clock()
        with places.fetched(job.image, scratch=self.out.scratch) as path:
            frames = series.read(path, each=self.settings.each_frame)
            labels, worst, volume_ml = self.segment_all(frames, clock)
            with clock("save"):
                mask = Volume(labels, worst.volume.affine)
                self._save(job, mask, path)
                drawn = picture.overlay(worst.volume, worst.mask)
        flags = worst.flags()
        found = {
            "mask": self.out.path(job.mask),
            "brain": self.out.path(job.brain) if job.brain else None,
            "distance": self.out.path(job.distance) if job.distance else None,
            "volume_ml": volume_ml,
            "structures_ml": self._structures_ml(mask),
            "flags": "; ".join(flags),
            "grid": grid_words(mask.data.shape, worst.volume.spacing_mm),
            "picture": drawn,
        }
        trust = asdict(worst.trust) if worst.trust else {}
        seconds = {f"seconds_{phase}": took for phase, took in clock.seconds.items()}
        return found | trust | seconds | {"flag": doubtful(flags)}

    def _structures_ml(self, mask: Volume) -> str | None:
        """Volume of each of several structures by name, as JSON; of several masks the mean."""
        classes, masks = self.predictor.classes, math.prod(mask.data.shape[3:])
        if len(classes) == 2:
            return None
        values = {name: known[0] for name, known in zip(classes.names[1:], classes.values[1:], strict=True)}
        found = {name: np.count_nonzero(mask.data == value) * mask.voxel_mm3 for name, value in values.items()}
        return json.dumps({name: round(mm3 / 1000 / masks, 3) for name, mm3 in found.items()})

    def _save(self, job: Job, mask: Volume, like: Path) -> None:
        """Write what is wanted, the mask last."""
        assert self.out
        if job.brain:
            with self.out.writing(job.brain) as file:
                outputs.save_inside(mask.data, file, like=like)
        if job.distance:
            with self.out.writing(job.distance) as file:
                outputs.save(_distance(mask), file, like=like)
        if job.bids:
            for name, facts in _sidecars(job, self.settings):
                with self.out.writing(name) as file:
                    file.write_text(json.dumps(facts, indent=2) + "\n")
        with self.out.writing(job.mask) as file:
            outputs.save(mask, file, like=like)


def doubtful(flags: Sequence[str], /) -> bool:
    """Whether one of the flags asks for a look at the mask."""
    return any(flag.startswith((EMPTY, FULL, LOW, CUT, UNLIKE)) for flag in flags)


def can_pass(error: BaseException, /) -> bool:
    """Whether what failed may work a moment later, as a connection may, and a damaged file may not."""
    if isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno in _PASSING):
        return True
    return error.__cause__ is not None and can_pass(error.__cause__)


def grid_words(size: Sequence[int], spacing_mm: Sequence[float], /) -> str:
    """A voxel grid in words: `182 x 218 x 182, 1 x 1 x 1 mm`."""
    return f"{' x '.join(map(str, size))}, {' x '.join(f'{step:.4g}' for step in spacing_mm)} mm"


def _doubt(found: Segmented) -> float:
    return found.trust.expected_dice if found.trust else found.volume_ml


def _distance(mask: Volume) -> Volume:
    inside = mask.data > 0
    frames = inside if inside.ndim == 4 else inside[..., None]
    maps = [edges.distance(frames[..., frame], mask.spacing_mm) for frame in range(frames.shape[3])]
    return Volume(np.stack(maps, -1) if inside.ndim == 4 else maps[0], mask.affine)


def _sidecars(job: Job, settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """What BIDS wants to be said beside each image."""
    source = {"Sources": [f"bids:raw:{job.bids}"], "GeneratedBy": f"onelabel {__version__}"}
    kinds: dict[str, dict[str, Any]] = {
        job.mask: {"Type": "Brain", "BorderMillimeters": settings.border_mm},
        job.brain: {"SkullStripped": True},
        job.distance: {"Units": "mm", "Description": "distance to the mask's edge, negative inside"},
    }
    for name, facts in kinds.items():
        if name:
            yield name.removesuffix(".nii.gz") + ".json", facts | source


def _forget_peak() -> None:
    """Begin anew with the peak of this process's memory, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak_memory_mb() -> float:
    """Peak of this process's memory since `_forget_peak`, or since its start."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

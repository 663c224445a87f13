"""What a checkpoint knows about the trust in its own masks: a ranker, and the Dice that its scores speak for."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from onelabel.configs.schema import RankerConfig, single_rankers
from onelabel.errors import CheckpointError
from onelabel.imaging import storage
from onelabel.imaging.storage import AnyPath
from onelabel.models import checkpoint, rankers
from onelabel.models.predictor import Prediction, Predictor
from onelabel.models.rankers.expectation import Expectation

FOLDER = "quality"  # in a checkpoint
_RANKER, _EXPECTATION = "ranker.json", "expectation.json"


def save(
    folder: AnyPath, ranker: RankerConfig, fitted: Sequence[AnyPath | None], expectation: Expectation, /, *, bad: float
) -> None:
    """Put a ranker and what its scores speak for into a checkpoint, as a whole or not at all.

    Parameters
    ----------
    folder : of the checkpoint
    fitted : checkpoint of the network of each of the ranker's `single_rankers`, or None
    bad : a mask whose expected Dice is lower is flagged
    """
    with storage.building(folder / FOLDER, last=_RANKER) as unfinished:
        (unfinished / _RANKER).write_text(json.dumps({"ranker": ranker.model_dump(mode="json"), "bad": bad}))
        expectation.save(unfinished / _EXPECTATION)
        for place, path in enumerate(fitted):
            if path:
                with storage.local(path) as network:
                    shutil.copytree(network, unfinished / str(place))


@dataclass(frozen=True)
class Trust:
    """What to expect of a mask: its Dice, the interval of nine in ten, and whether it is too low.

    score : what the expectation rests on: the ranker's; of several, the weighted mean of what each lets expect
    """

    score: float
    expected_dice: float
    expected_low: float
    expected_high: float
    flag: bool


class Quality:
    """Judges the masks of a predictor as the ranker of its training did."""

    def __init__(self, folder: Path, predictor: Predictor, /) -> None:
        try:
            read: dict[str, Any] = json.loads((folder / _RANKER).read_text())
            self.expectation = Expectation.load(folder / _EXPECTATION)
            config: RankerConfig = TypeAdapter(RankerConfig).validate_python(read["ranker"])
            self.bad = float(read["bad"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"'{folder}' cannot be read ({error}); remove it, or train again") from None
        self.predictor = predictor
        paths = [folder / str(place) for place in range(len(single_rankers(config)))]
        fitted = [path if path.is_dir() else None for path in paths]
        self.rankers = rankers.load(config, fitted, device=predictor.device, bf16=predictor.bf16)

    @torch.inference_mode()
    def __call__(self, prediction: Prediction, /) -> Trust:
        """Judge one mask; an empty one is flagged whatever is expected."""
        scores = [
            ranker.score(prediction.image, prediction.probability, self.predictor.probability).numpy(force=True)
            for ranker in self.rankers
        ]
        given = np.array(scores, np.float64)
        (score,), (expected, low, high) = self.expectation.score(given).tolist(), self.expectation(given)[:, 0].tolist()
        return Trust(score, expected, low, high, expected < self.bad or not prediction.mask.data.any())


def load(folder: AnyPath, predictor: Predictor, /) -> Quality | None:
    """What a checkpoint (or the newest one in a run's folder) knows of its masks, if anything.

    Raises
    ------
    CheckpointError : it is there, but cannot be read.
    """
    found = checkpoint.find(folder) / FOLDER
    if not found.is_dir():
        return None
    with storage.local(found) as here:
        return Quality(here, predictor)

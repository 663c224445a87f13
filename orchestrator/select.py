"""Scores to a selection: pure, the same whatever the order of the rows."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from onelabel.configs.selection import SelectConfig, ThresholdConfig


def select(scores: pa.Table, config: SelectConfig, number: int = 0, /) -> pa.Table:
    """The rows with the best scores, best first, and their `weight`; ties go to the smaller key.

    A scan that failed, has no score or an empty mask is never selected, so fewer than wanted may come back.

    Parameters
    ----------
    scores : with columns key, score, volume_mm3, error; expected_dice for a threshold; thumbnail to leave out what is
        alike
    number : of the round in its stage, from 0
    """
    usable = pc.and_(pc.is_null(scores["error"]), pc.greater(pc.fill_null(scores["volume_mm3"], 0), 0))
    scored = pc.is_finite(pc.fill_null(scores["score"], float("nan")))
    kept = scores.filter(pc.and_(usable, scored)).sort_by([("score", "descending"), ("key", "ascending")])
    if isinstance(config, ThresholdConfig):
        enough = pc.greater_equal(pc.fill_null(kept["expected_dice"], 0), config.expected_dice)
        kept = kept.filter(enough) if pc.any(enough).as_py() else kept.slice(0, 1)
    if config.alike < 1:
        kept = kept.take(_unlike(kept, config.alike))
    kept = kept.slice(0, config.most(len(scores), number))
    return kept.append_column("weight", pa.array(_weights(kept["score"].to_numpy(), config.weight), pa.float64()))


def _unlike(scores: pa.Table, alike: float) -> list[int]:
    """Places of the rows whose image resembles none that stands before it."""
    images = np.stack([np.frombuffer(image, np.uint8) for image in scores["thumbnail"].to_pylist()]).astype(np.float64)
    images -= images.mean(1, keepdims=True)
    images /= np.linalg.norm(images, axis=1, keepdims=True).clip(min=1e-9)
    taken: list[int] = []
    for place, image in enumerate(images):
        if not taken or (images[taken] @ image).max() < alike:
            taken.append(place)
    return taken


def _weights(score: np.ndarray, rule: str) -> np.ndarray:
    """By score: its share of the best one's, so that the best weighs 1."""
    if rule == "equal" or not len(score) or score.max() <= 0:
        return np.ones(len(score))
    return np.asarray((score / score.max()).clip(min=0))

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
    most = config.most(len(scores), number)
    usable = pc.and_(pc.is_null(scores["error"]), pc.greater(pc.fill_null(scores["volume_mm3"], 0), 0))
    scored = pc.is_finite(pc.fill_null(scores["score"], float("nan")))
    places = best_first(scores, pc.and_(usable, scored))
    if isinstance(config, ThresholdConfig):
        enough = pc.greater_equal(pc.fill_null(scores["expected_dice"].take(places), 0), config.expected_dice)
        places = places.filter(enough) if pc.any(enough).as_py() else places.slice(0, 1)
    if config.alike < 1:
        places = places.take(pa.array(_unlike(scores["thumbnail"].take(places), config.alike, most), pa.int64()))
    kept = scores.take(places.slice(0, most))
    return kept.append_column("weight", pa.array(_weights(kept["score"].to_numpy(), config.weight), pa.float64()))


def best_first(scores: pa.Table, wanted: pa.ChunkedArray, /) -> pa.Array:
    """Places of the wanted rows; of many rows nothing but score and key is moved."""
    places = pa.array(np.arange(len(scores)))
    narrow = scores.select(["score", "key"]).append_column("place", places).filter(wanted)
    return narrow.sort_by([("score", "descending"), ("key", "ascending")])["place"].combine_chunks()


def _unlike(thumbnails: pa.ChunkedArray, alike: float, most: int) -> list[int]:
    """The first places, up to so many, of images that resemble none that stands before them."""
    taken: list[int] = []
    images: list[np.ndarray] = []
    for place, thumbnail in enumerate(thumbnails):
        image = np.frombuffer(thumbnail.as_py(), np.uint8).astype(np.float64)
        image -= image.mean()
        image /= max(float(np.linalg.norm(image)), 1e-9)
        if not taken or (np.stack(images) @ image).max() < alike:
            taken.append(place)
            images.append(image)
            if len(taken) == most:
                break
    return taken


def _weights(score: np.ndarray, rule: str) -> np.ndarray:
    """By score: its share of the best one's, so that the best weighs 1."""
    if rule == "equal" or not len(score) or score.max() <= 0:
        return np.ones(len(score))
    return np.asarray((score / score.max()).clip(min=0))

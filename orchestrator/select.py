"""Scores to a selection: pure, the same whatever the order of the rows."""

import pyarrow as pa
import pyarrow.compute as pc

from onelabel.configs.schema import TopKConfig


def select(scores: pa.Table, config: TopKConfig, /) -> pa.Table:
    """The k rows with the best scores; ties go to the smaller key.

    A scan that failed, has no score or an empty mask is never selected, so fewer than k may come back.

    Parameters
    ----------
    scores : with columns key, score, volume_mm3, error
    """
    usable = pc.and_(pc.is_null(scores["error"]), pc.greater(pc.fill_null(scores["volume_mm3"], 0), 0))
    scored = pc.is_finite(pc.fill_null(scores["score"], float("nan")))
    kept = scores.filter(pc.and_(usable, scored))
    return kept.sort_by([("score", "descending"), ("key", "ascending")]).slice(0, config.k)

"""From scores to the Dice that they speak for, learned from masks whose Dice is known."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_SHARE = 0.9  # of the masks whose Dice lies between low and high
_NEIGHBOURS = 0.1  # share of the masks around a score that tell its interval, and at least so many:
_FEWEST = 20
_KNOTS = 64


@dataclass(frozen=True)
class Map:
    """Monotone maps from score to Dice, linear between knots, flat beyond them.

    score : ascending; expected, low, high : never falling, of the same length
    """

    score: tuple[float, ...]
    expected: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __call__(self, score: NDArray[np.float64], /) -> NDArray[np.float64]:
        """Scores (n,) to expected, low and high Dice (3, n); NaN stays NaN."""
        found = np.stack([np.interp(score, self.score, part) for part in (self.expected, self.low, self.high)])
        return np.where(np.isnan(score), np.nan, found)  # with a single knot NumPy would give its value


@dataclass(frozen=True)
class Expectation:
    """A map for each single ranker; of several, one more for the weighted mean of what they expect."""

    parts: tuple[Map, ...]
    weights: tuple[float, ...]
    whole: Map | None = None

    def __call__(self, scores: NDArray[np.float64], /) -> NDArray[np.float64]:
        """Scores (rankers, n) to expected, low and high Dice (3, n)."""
        return self.whole(self.score(scores)) if self.whole else self.parts[0](scores[0])

    def score(self, scores: NDArray[np.float64], /) -> NDArray[np.float64]:
        """Scores (rankers, n) to one (n,): a single ranker's own, of several the weighted mean of what they expect."""
        return _mean(scores, self.parts, self.weights) if self.whole else scores[0]

    def save(self, path: Path, /) -> None:
        """Write JSON, as a whole or not at all."""
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(asdict(self)))
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path, /) -> "Expectation":
        """Read what `save` wrote."""
        read = json.loads(path.read_text())
        whole = _map(read["whole"]) if read["whole"] else None
        return cls(tuple(map(_map, read["parts"])), tuple(read["weights"]), whole)


def fit(
    scores: NDArray[np.float64], dice: NDArray[np.float64], weights: Sequence[float] | None = None, /
) -> Expectation:
    """Learn what scores speak for.

    Parameters
    ----------
    scores : (rankers, n) of masks whose Dice (n,) is known
    weights : one a ranker; None: equal
    """
    parts = tuple(fit_map(each, dice) for each in scores)
    known = tuple(map(float, weights)) if weights else (1.0,) * len(parts)
    whole = fit_map(_mean(scores, parts, known), dice) if len(parts) > 1 else None
    return Expectation(parts, known, whole)


def fit_map(score: NDArray[np.float64], dice: NDArray[np.float64], /) -> Map:
    """Isotonic regression of Dice on score, and of the 5th and 95th percentile of the Dice of masks of like score.

    Below the lowest score the expected Dice falls in proportion to the score.
    """
    from sklearn.isotonic import IsotonicRegression  # slow to import

    order = np.argsort(score, kind="stable")
    x, y = score[order], dice[order]
    wide = min(len(x), max(_FEWEST, round(_NEIGHBOURS * len(x))))
    first = np.clip(np.arange(len(x)) - wide // 2, 0, len(x) - wide)
    tails = np.quantile(np.lib.stride_tricks.sliding_window_view(y, wide), [(1 - _SHARE) / 2, (1 + _SHARE) / 2], axis=1)
    knots = np.unique(np.quantile(x, np.linspace(0, 1, _KNOTS)))
    maps = [IsotonicRegression(out_of_bounds="clip").fit(x, part).predict(knots) for part in (y, *tails[:, first])]
    expected, low, high = maps[0], np.minimum(maps[1], maps[0]), np.maximum(maps[2], maps[0])
    if knots[0] > 0:  # a score lower than all that is known is worth less, down to nothing
        knots, expected, low, high = np.stack(
            [np.r_[0, knots], np.r_[0, expected], np.r_[0, low], np.r_[high[0], high]]
        )
    return Map(*(tuple(part.tolist()) for part in (knots, expected, low, high)))


def _mean(scores: NDArray[np.float64], parts: Sequence[Map], weights: Sequence[float]) -> NDArray[np.float64]:
    expected = np.stack([part(each)[0] for part, each in zip(parts, scores, strict=True)])
    return np.asarray(np.average(expected, axis=0, weights=weights))


def _map(read: dict[str, list[float]]) -> Map:
    return Map(**{name: tuple(values) for name, values in read.items()})

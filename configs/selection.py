"""Settings of what the next round learns from. A tuple gives one value a round of the stage; the last one is kept."""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from onelabel.configs.augmentation import Base, Probability


def _as_top_k(value: object) -> object:
    return {"type": "top_k", **value} if isinstance(value, dict) and "type" not in value else value


def _as_rounds(value: object) -> object:
    return (value,) if isinstance(value, int | float) else value


Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), BeforeValidator(_as_rounds)]
Share = Annotated[float, Field(gt=0, le=1)]
Shares = Annotated[tuple[Share, ...], Field(min_length=1), BeforeValidator(_as_rounds)]


class SelectBase(Base):
    """What all rules share."""

    alike: float = Field(
        1.0,
        gt=0,
        le=1,
        description="correlation with a better scan, as small images, from which one is left out; 1: none",
    )
    weight: Literal["equal", "score"] = Field("equal", description="what a scan weighs: all the same, or by its score")


class TopKConfig(SelectBase):
    """The k best scores; ties go to the smaller key."""

    type: Literal["top_k"] = "top_k"
    k: Counts = Field(
        (10,), description="pseudo-labelled scans the next round learns from; a number, or one each round"
    )

    def most(self, scans: int, number: int, /) -> int:
        """How many of a cohort may be selected in a round of the stage, counted from 0."""
        return self.k[min(number, len(self.k) - 1)]


class TopShareConfig(SelectBase):
    """The best share of the cohort, at least one scan."""

    type: Literal["top_share"] = "top_share"
    share: Shares = Field((0.2,), description="share of the cohort; a number, or one each round")

    def most(self, scans: int, number: int, /) -> int:
        """How many of a cohort may be selected in a round of the stage, counted from 0."""
        return max(1, math.floor(self.share[min(number, len(self.share) - 1)] * scans))


class ThresholdConfig(SelectBase):
    """All masks whose expected Dice reaches a threshold; the best one if none does."""

    type: Literal["threshold"] = "threshold"
    expected_dice: Probability = Field(0.95, description="the least expected Dice; needs a ranker that is calibrated")

    def most(self, scans: int, number: int, /) -> int:
        """How many of a cohort may be selected in a round of the stage, counted from 0."""
        return scans


SelectConfig = Annotated[
    TopKConfig | TopShareConfig | ThresholdConfig, Field(discriminator="type"), BeforeValidator(_as_top_k)
]

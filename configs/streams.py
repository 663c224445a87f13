"""Settings of what a learner reads, and of what the masks of a round become before they are read."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from onelabel.configs.augmentation import Base, DeformConfig, Shares
from onelabel.configs.selection import Share


class ViewsConfig(Base):
    """Changed copies of an image whose masks should agree: other contrast, mirrored, turned in the axial plane."""

    contrast: float = Field(0.1, ge=0, lt=0.5, description="how far both ends of the range move, as shares of it")
    flip_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = Field(
        (0,), description="axes that are mirrored in half of the views; 0: left-right"
    )
    rotate_deg: float = Field(20, ge=0, le=180, description="largest rotation, in degrees")
    passes: int = Field(8, ge=1, description="views, the image itself not counted")


class PseudoLabelConfig(Base):
    """The probability that stands for a mask when the next round learns from it: the mean of all that is named here."""

    views: ViewsConfig | None = Field(None, description="views over which the mean goes too; null: the image alone")
    rounds: int = Field(
        1, ge=1, description="last rounds whose networks the mean is over, the present one included; fewer at first"
    )
    project: bool = Field(
        False, description="what the ranker's autoencoder makes of the mean's mask, instead of the mean"
    )


class StreamConfig(Base):
    """One ingredient of what a learner reads."""

    type: Literal["synthetic", "real", "mask"] = Field(
        description="synthetic: images painted from bins; real: the scans themselves, augmented; mask: masks alone"
    )
    of: Literal["labelled", "selected"] = Field("labelled", description="the labelled scans, or the last selection")
    share: Share = Field(1.0, description="how often it is drawn, relative to the other ingredients")
    deform: DeformConfig | None = Field(None, description="deformation of this stream; null: `synthesis.deform`")
    soft: bool = Field(
        False,
        description="selected: each sample's label is where the probability of `pseudo` exceeds a threshold, drawn"
        " uniformly from 0 to 1, so that the mean label is the probability",
    )
    ignore: Shares | None = Field(
        None, description="selected: voxels whose probability of `pseudo` lies strictly between these count in no loss"
    )

    @model_validator(mode="after")
    def _either(self) -> Self:
        if self.soft and self.ignore:
            raise ValueError("soft and ignore are two readings of one probability: set one of them")
        return self


Ingredients = Annotated[tuple[StreamConfig, ...], Field(min_length=1)]

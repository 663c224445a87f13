"""Settings of a search: which keys vary, how they are drawn, and what is best."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from onelabel.configs.augmentation import Base


class RangeBase(Base):
    """From low to high."""

    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must lie below high {self.high}")
        return self


class ChoicesConfig(Base):
    """One of some values; a plain list is short for `values`."""

    type: Literal["choices"] = "choices"
    values: tuple[Any, ...] = Field(min_length=1, description="what the key may be set to")


class UniformConfig(RangeBase):
    """A number of a range, all equally likely."""

    type: Literal["uniform"] = "uniform"


class LogUniformConfig(RangeBase):
    """A number of a range, all orders of magnitude equally likely."""

    type: Literal["log_uniform"] = "log_uniform"
    low: float = Field(gt=0, description="smallest value")
    high: float = Field(gt=0, description="largest value")


class IntegersConfig(RangeBase):
    """A whole number of a range, both ends included."""

    type: Literal["integers"] = "integers"
    low: int = Field(description="smallest value")
    high: int = Field(description="largest value")


def _as_choices(value: object) -> object:
    return {"type": "choices", "values": value} if isinstance(value, list | tuple) else value


Dimension = Annotated[
    Annotated[ChoicesConfig | UniformConfig | LogUniformConfig | IntegersConfig, Field(discriminator="type")],
    BeforeValidator(_as_choices),
]


def _dotted(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Keys that were given as mappings in mappings, as dotted ones."""
    if isinstance(value, dict) and (not key or "type" not in value):
        for name, part in value.items():
            yield from _dotted(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _as_space(value: object) -> object:
    return dict(_dotted(value)) if isinstance(value, dict) else value


Space = Annotated[dict[str, Dimension], Field(min_length=1), BeforeValidator(_as_space)]


class HalvingConfig(Base):
    """Stop the worse trials after some rounds (ASHA, arXiv 1810.05934)."""

    grace: int = Field(1, ge=1, description="rounds that every trial may do")
    keep: int = Field(
        3, ge=2, description="one of so many trials goes on, and is looked at again after `keep` times the rounds"
    )


class SearchConfig(Base):
    """What `onelabel search` tries; no other command reads it."""

    space: Space = Field(description="by dotted config key, the values to try")
    sampler: Literal["grid", "random", "optuna"] = Field("grid", description="how values are combined")
    trials: int = Field(30, ge=1, description="budget: the most settings to try; a grid must fit into it")
    objective: Literal["expected_dice", "test_dice"] | None = Field(
        None,
        description="mean expected Dice of data.unlabelled, or mean Dice of data.test, after the last round; null:"
        " test_dice where there is data.test",
    )
    halving: HalvingConfig | None = Field(None, description="early stopping; null: none")
    concurrent: int | None = Field(
        None,
        ge=1,
        description="most trials at a time, as many as the cluster holds; with compute.wait_s more wait for new nodes",
    )

    @model_validator(mode="after")
    def _finite(self) -> Self:
        if self.sampler != "grid":
            return self
        points = 1
        for key, dimension in self.space.items():
            if not isinstance(dimension, ChoicesConfig):
                raise ValueError(f"sampler 'grid' needs a list of values for '{key}'; give one, or choose 'random'")
            points *= len(dimension.values)
        if points > self.trials:
            raise ValueError(
                f"the grid has {points} points, more than trials {self.trials}: raise it, or take the sampler 'random'"
            )
        return self

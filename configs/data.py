"""Settings of the scans, and of what their labels mean."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from onelabel.configs.augmentation import Base

BACKGROUND, FOREGROUND = "background", "foreground"
MOST_CLASSES = 127  # classes are stored in a byte, their complements too


def _as_source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _as_mapping(value: object) -> object:
    return dict(enumerate(value)) if isinstance(value, list | tuple) else value


class SourceConfig(Base):
    """Where scans come from; a plain string is short for `path`."""

    path: str = Field(description="a manifest (CSV, TSV, Parquet), a folder, a glob, one file or a BIDS dataset")
    where: dict[str, str] = Field({}, description="keep the manifest's rows whose columns equal these values")
    label_column: str | None = Field(None, description="the manifest's column with label files, if not `label`")


Source = Annotated[SourceConfig, BeforeValidator(_as_source)]
Names = Annotated[
    dict[Annotated[int, Field(ge=0, le=2**24)], Annotated[str, Field(pattern=r"\w")]], BeforeValidator(_as_mapping)
]


class DataConfig(Base):
    """The scans."""

    labelled: Source = Field(description="the scan (or scans) with a mask; all that is learned starts here")
    unlabelled: Source | None = Field(None, description="the cohort to label; masks in it only judge, never train")
    test: Source | None = Field(None, description="scans with masks on which every round is judged")
    classes: Names | None = Field(
        None,
        description="names of the values in label files: a list from 0, the background, or a mapping from values;"
        " those of one name are one class; null: whatever is above 0 is one structure",
    )
    ignore: int | None = Field(None, description="value in label files of voxels that nobody annotated")
    largest: Literal["class", "all"] = Field(
        "class", description="what is one piece, of which predicted masks keep the largest: each class, or all together"
    )

    @property
    def values(self) -> Mapping[str, tuple[int, ...]]:
        """The label values of each class, background first; none where whatever is above 0 is one structure."""
        named = {0: BACKGROUND, **self.classes} if self.classes is not None else {}
        return {name: tuple(v for v, other in named.items() if other == name) for name in named.values()}

    @property
    def names(self) -> tuple[str, ...]:
        """Classes by index, background first."""
        return tuple(self.values) or (BACKGROUND, FOREGROUND)

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.ignore in (0, *(self.classes or (1,))):  # one structure is written as 1
            raise ValueError(f"ignore {self.ignore} cannot be the value of a class, too")
        if self.classes is None:
            return self
        if self.classes.get(0, BACKGROUND) != BACKGROUND:
            raise ValueError(f"classes call the value 0 '{self.classes[0]}': it is the background")
        if not 1 < len(self.values) <= MOST_CLASSES:
            raise ValueError(f"classes name {len(self.values) - 1} structures: name 1 to {MOST_CLASSES - 1}")
        return self

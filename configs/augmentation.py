"""Settings of the image generator. A pair is a range from which every sample draws uniformly."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Base(BaseModel):
    """Frozen; an unknown key, or a number that is not finite, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"a range must go from low to high, not {value}")
    return value


def _pair(value: object) -> object:
    return (value, value) if isinstance(value, int | float) else value


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
Count = Annotated[int, Field(ge=1, le=100)]
Counts = Annotated[tuple[Count, Count], BeforeValidator(_pair), AfterValidator(_ordered)]
Probability = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[tuple[Probability, Probability], AfterValidator(_ordered)]
Positive = Annotated[float, Field(ge=0)]
Positives = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]
Length = Annotated[float, Field(gt=0)]
Lengths = Annotated[tuple[Length, Length], AfterValidator(_ordered)]


class BinsConfig(Base):
    """How voxel intensities become labels; the structure and the rest are binned apart, air is its own label."""

    method: Literal["kmeans", "quantile", "uniform", "gmm"] = Field("kmeans", description="rule for the bins")
    foreground: Counts = Field((2, 6), description="bins in each structure: a number, or a range to draw from")
    background: Counts = Field((3, 8), description="bins outside: a number, or a range to draw from")


class DeformConfig(Base):
    """Affine and smooth displacement."""

    translate_mm: Positive = Field(16, description="largest shift along each axis, in mm")
    rotate_deg: Positive = Field(20, description="largest rotation about each axis, in degrees")
    scale: Lengths = Field((0.85, 1.15), description="scaling of each axis")
    shear: Positive = Field(0.08, description="largest shear")
    warp_mm: Positives = Field((0, 8), description="largest displacement of the smooth warp, in mm")
    warp_spacing_mm: tuple[Length, ...] = Field((80, 40, 20), description="control-point spacings of the warp, in mm")
    flip: Probability = Field(0.5, description="chance of a left-right flip")


class IntensityConfig(Base):
    """What a label looks like."""

    mean: Shares = Field((0, 1), description="mean intensity of a label")
    spread: Positives = Field((0, 0.08), description="standard deviation within a label")
    air: Shares = Field((0, 0.12), description="mean intensity of air")
    real: Probability = Field(0.0, description="chance of the scan's own intensities instead of painted bins")


class StripConfig(Base):
    """Heads partly stripped: everything further than a border from the structure becomes air."""

    probability: Probability = Field(0.2, description="how often")
    border_mm: Range = Field((-4, 24), description="where the cut is, in mm outside the structure's edge")


class BiasConfig(Base):
    """A smooth multiplicative field."""

    probability: Probability = Field(0.9, description="how often")
    strength: Shares = Field((0, 0.6), description="how much the field darkens at most, as a share")
    points: Counts = Field((2, 4), description="control points along each axis")


class BlurConfig(Base):
    """Gaussian smoothing, each axis by itself."""

    probability: Probability = Field(0.5, description="how often")
    fwhm_mm: Positives = Field((0, 4), description="full width at half maximum, in mm")


class LowResolutionConfig(Base):
    """Thick slices or large voxels, sampled back to the grid."""

    probability: Probability = Field(0.4, description="how often")
    spacing_mm: Positives = Field((2, 8), description="simulated voxel size, in mm")
    one_axis: Probability = Field(0.7, description="chance that a single axis is coarse, as in thick slices")


class NoiseConfig(Base):
    """Gaussian noise."""

    probability: Probability = Field(0.8, description="how often")
    sd: Positives = Field((0, 0.08), description="standard deviation; intensities lie in [0, 1]")


class GammaConfig(Base):
    """A power law."""

    probability: Probability = Field(0.8, description="how often")
    log_exponent: Range = Field((-0.6, 0.6), description="natural logarithm of the exponent")


class CropConfig(Base):
    """A field of view that ends early along one axis."""

    probability: Probability = Field(0.3, description="how often")
    share: Shares = Field((0, 0.3), description="share of the axis that is lost")


class MotionConfig(Base):
    """A head that moves while lines of k-space are read one after another."""

    probability: Probability = Field(0.0, description="how often")
    blocks: Counts = Field((3, 10), description="blocks of lines between which it may move")
    moves: Counts = Field((1, 3), description="blocks with the head elsewhere; never the central one")
    shift_mm: Positive = Field(5, description="largest shift along each axis, in mm")
    rotate_deg: Positive = Field(5, description="largest rotation about each axis, in degrees")


class LinesConfig(Base):
    """Slices of a random axis that are lost: each has one random intensity."""

    probability: Probability = Field(0.0, description="how often")
    count: Counts = Field((1, 3), description="slices")


class AugmentConfig(Base):
    """What happens to an image after it is painted; real scans go through the same."""

    bias: BiasConfig = Field(BiasConfig(), description="bias field")
    gamma: GammaConfig = Field(GammaConfig(), description="contrast")
    blur: BlurConfig = Field(BlurConfig(), description="smoothing")
    low_resolution: LowResolutionConfig = Field(LowResolutionConfig(), description="resolution")
    motion: MotionConfig = Field(MotionConfig(), description="motion in k-space")
    lines: LinesConfig = Field(LinesConfig(), description="lost slices")
    noise: NoiseConfig = Field(NoiseConfig(), description="noise")
    crop: CropConfig = Field(CropConfig(), description="field of view")


class SynthesisConfig(Base):
    """From one label map to endless images (SingleStrip, arXiv 2508.10464)."""

    bins: BinsConfig = Field(BinsConfig(), description="intensities to labels")
    deform: DeformConfig = Field(DeformConfig(), description="shape")
    intensity: IntensityConfig = Field(IntensityConfig(), description="labels to intensities")
    strip: StripConfig = Field(StripConfig(), description="partly stripped heads")
    augment: AugmentConfig = Field(AugmentConfig(), description="what scanners do to images")

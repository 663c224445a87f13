import json
from pathlib import Path

import pytest

from onelabel.configs.load import load
from onelabel.configs.schema import RunConfig
from onelabel.errors import ConfigError, DataError
from onelabel.orchestrator import trials
from onelabel.orchestrator.rounds import plan
from onelabel.orchestrator.trials import Point, Trial

DATA = "data={labelled: one.nii.gz, unlabelled: many}"
K, BINS, RATE = "stages.*.select.k", "synthesis.bins.foreground", "stages.1.learner.learning_rate"
SPACE = [f"search.space.{K}=[2, 3, 4]", f"search.space.{BINS}=[[2, 4], 3]"]
RANGES = [
    f"search.space.{RATE}={{type: log_uniform, low: 1.0e-4, high: 1.0e-2}}",
    "search.space.network.dropout={type: uniform, low: 0, high: 0.5}",
    "search.space.stages.1.rounds={type: integers, low: 1, high: 3}",
    f"search.space.{BINS}=[[2, 4], 3]",
]


def searched(*items: str) -> RunConfig:
    return load(["singlestrip", DATA, *items])


@pytest.fixture
def common(tmp_path: Path) -> RunConfig:
    """The settings of all trials of a search in a temporary folder."""
    return searched(f"storage={tmp_path}")


def bases(common: RunConfig, point: Point) -> list[str]:
    return [base.name for base in trials.bases(trials.trial(common, point).config)]


def test_a_grid_holds_every_combination_once() -> None:
    points = trials.points(searched(*SPACE))
    assert len(points) == 6
    assert len({json.dumps(point) for point in points}) == 6
    assert all(point.keys() == {K, BINS} for point in points)


def test_random_points_lie_in_the_space_are_different_and_the_same_again() -> None:
    config = searched("search.sampler=random", "search.trials=20", *RANGES)
    points = trials.points(config)
    assert points == trials.points(config)
    assert len({json.dumps(point) for point in points}) == len(points) == 20
    assert all(trials.within(config, point) for point in points)
    assert {point["stages.1.rounds"] for point in points} == {1, 2, 3}
    assert sum(point[RATE] < 1e-3 for point in points) == pytest.approx(10, abs=6)
    assert points != trials.points(config.model_copy(update={"seed": 1}))


def test_few_choices_give_few_random_points() -> None:
    assert len(trials.points(searched("search.sampler=random", "search.trials=9", *SPACE))) == 6


def test_a_point_survives_the_way_through_a_sampler() -> None:
    config = searched("search.sampler=optuna", *RANGES)
    for point in trials.points(config):
        assert trials.decoded(trials.encoded(config, point)) == point


def test_a_trial_is_the_run_of_its_values(common: RunConfig) -> None:
    one = trials.trial(common, {K: 3, BINS: [2, 4]})
    assert [stage.select.most(99, 0) for stage in one.config.stages] == [3, 3]
    assert one.config.synthesis.bins.foreground == (2, 4)
    assert one.folder.parent == Path(common.storage) / "trials"
    assert one.folder.name.startswith("k-3_foreground-2-4-")
    assert RunConfig.model_validate(one.config.model_dump()) == one.config  # its name is one that a run may have


def test_trials_have_a_folder_each(common: RunConfig) -> None:
    points = trials.points(searched("search.sampler=random", *RANGES))
    assert len({trials.trial(common, point).folder for point in points}) == len(points)


def test_an_impossible_value_is_refused(common: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"nearest known key is 'stages\.0\.select\.k'"):
        trials.trial(common, {"stages.*.select.kk": 2})
    with pytest.raises(ConfigError, match="must be multiples of 16"):
        trials.trial(common, {"grid.size": 97})


@pytest.mark.parametrize("key", [K, RATE, "stages.1.rounds", "stages.0.select.weight", "stages.1.ranker"])
def test_what_the_first_stage_does_not_depend_on_shares_it(common: RunConfig, key: str) -> None:
    values = {K: 3, RATE: 0.5, "stages.1.rounds": 1, "stages.0.select.weight": "score"}
    assert bases(common, {key: values.get(key, {"type": "posterior"})}) == bases(common, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (BINS, 3),
        ("seed", 1),
        ("grid.spacing_mm", 3.0),
        ("network.dropout", 0.2),
        ("stages.0.steps", 4000),
        ("stages.0.learner.learning_rate", 0.5),
        ("data.labelled.path", "other.nii.gz"),
        ("data.unlabelled.where", {"split": "a"}),
    ],
)
def test_what_the_first_stage_depends_on_does_not(common: RunConfig, key: str, value: object) -> None:
    assert not set(bases(common, {key: value})) & set(bases(common, {}))


@pytest.mark.parametrize(("key", "value"), [("stages.0.ranker", {"type": "posterior"}), ("stages.0.expect.images", 12)])
def test_another_ranker_shares_the_network_alone(common: RunConfig, key: str, value: object) -> None:
    ours, theirs = bases(common, {key: value}), bases(common, {})
    assert ours[0] == theirs[0]
    assert ours[1] != theirs[1]


def test_a_first_stage_without_a_ranker_has_one_base(common: RunConfig) -> None:
    supervised = load(["supervised", DATA, f"storage={common.storage}"])
    (base,) = trials.bases(trials.trial(supervised, {}).config)
    assert base.stages[0].steps == supervised.stages[0].steps


def test_bases_are_runs_that_may_be(common: RunConfig) -> None:
    for base in trials.bases(trials.trial(common, {K: 3}).config):
        assert RunConfig.model_validate(base.model_dump()) == base
        assert len(base.stages) == 1


def test_trials_of_different_bases_alternate(common: RunConfig) -> None:
    tried = [trials.trial(common, point) for point in trials.points(searched(*SPACE))]
    ordered = trials.bases_first(tried)
    assert {one.folder for one in ordered} == {one.folder for one in tried}
    assert len({trials.bases(one.config)[0].name for one in ordered[:2]}) == 2


def finish(one: Trial, value: float) -> None:
    """What a run leaves of its rounds' figures."""
    for now in plan(one.config, one.folder):
        now.folder.mkdir(parents=True)
        now.commit({"unlabelled": {"expected_dice_mean": value}, "test": {}})
    (one.folder / "report.html").touch()


@pytest.fixture
def one(common: RunConfig) -> Trial:
    return trials.trial(common, {K: 3, BINS: [2, 4]})


def test_a_finished_trial_is_not_run_again_but_told_again(one: Trial) -> None:
    finish(one, 0.75)
    told: list[float | None] = []
    one.complete(lambda metrics: told.append(trials.value_of(metrics, "expected_dice")))
    assert told == one.values("expected_dice") == [0.75] * 5
    assert one.values("test_dice") == [None] * 5
    assert one.done and not one.error


def test_trials_are_known_by_their_folders(common: RunConfig, one: Trial) -> None:
    other = trials.trial(common, {K: 2, BINS: 3})
    for each in (one, other, one):
        each.keep()
    assert trials.known(common) == [one, other]


def test_a_trial_that_fails_says_why(one: Trial) -> None:
    with pytest.raises(DataError):
        one.complete(lambda metrics: None)
    assert one.error and "one.nii.gz" in one.error
    assert not one.done


def test_a_run_goes_on_from_another_but_selects_for_itself(common: RunConfig, one: Trial) -> None:
    base = trials.bases(one.config)[0]
    source = trials.folder_of(base)
    kept = [
        "round-00/checkpoint/weights.pt",
        "round-00/scores.parquet",
        "round-00/training.json",
        "rankers/a/meta.json",
    ]
    left = ["round-00/done", "round-00/selection.parquet", "round-00/masks/a.nii.gz", "round-00/metrics.json", "report"]
    for name in [*kept, *left]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("base")
    trials._go_on_from(base, one.config)
    (one.folder / "round-00/scores.parquet").write_text("its own")
    trials._go_on_from(base, one.config)
    found = {path.relative_to(one.folder).as_posix() for path in one.folder.rglob("*") if path.is_file()}
    assert found == set(kept)
    assert (one.folder / "round-00/scores.parquet").read_text() == "its own"


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], "expected_dice"),
        (["data.test=masks"], "test_dice"),
        (["data.test=masks", "search.objective=expected_dice"], "expected_dice"),
    ],
)
def test_the_objective_follows_from_the_data(items: list[str], expected: str) -> None:
    assert trials.objective(searched(*SPACE, *items)) == expected


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        (["search.objective=test_dice"], "set data.test"),
        (["stages.1.ranker={type: random}"], "'selftrain' lacks"),
        (["stages.1.expect.images=0"], "'selftrain' lacks"),
    ],
)
def test_an_objective_that_is_not_measured_is_refused(items: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        trials.objective(searched(*SPACE, *items))

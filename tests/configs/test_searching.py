import pytest

from onelabel.configs.load import change, load
from onelabel.configs.schema import RunConfig
from onelabel.configs.searching import ChoicesConfig, IntegersConfig, LogUniformConfig
from onelabel.configs.selection import TopKConfig
from onelabel.errors import ConfigError

BASE = ["singlestrip", "data={labelled: one.nii.gz, unlabelled: many}"]
K = "search.space.stages.*.select.k=[2, 3]"
RATE = "stages.1.learner.learning_rate"


def space(*items: str) -> dict[str, object]:
    config = load([*BASE, *items])
    assert config.search
    return dict(config.search.space)


def test_a_list_is_short_for_choices_and_mappings_for_dotted_keys() -> None:
    found = space(K, "search.space.synthesis.bins.foreground=[[2, 4], 3]", 'search={space: {"stages.0.steps": [1, 2]}}')
    assert list(found) == ["stages.*.select.k", "synthesis.bins.foreground", "stages.0.steps"]
    assert found["synthesis.bins.foreground"] == ChoicesConfig(values=([2, 4], 3))


def test_ranges_are_told_by_their_type() -> None:
    found = space(
        "search.sampler=random",
        f"search.space.{RATE}={{type: log_uniform, low: 1.0e-4, high: 1.0e-2}}",
        "search.space.stages.1.rounds={type: integers, low: 1, high: 4}",
    )
    assert found == {RATE: LogUniformConfig(low=1e-4, high=1e-2), "stages.1.rounds": IntegersConfig(low=1, high=4)}


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        ([K, "search.trials=0"], "'search.trials' = 0"),
        ([K, "search.trials=-3"], "'search.trials' = -3"),
        ([K, "search.trials=1"], "the grid has 2 points, more than trials 1"),
        ([K, "search.tirals=9"], "nearest known key is 'search.trials'"),
        ([K, "search.sampler=optima"], "'search.sampler' = 'optima'"),
        (["search.space={}"], "'search.space' = {}"),
        (["search={sampler: random}"], "'search.space' is missing"),
        (["search.space.seed=[]"], "'search.space.seed"),
        (["search.space.seed={type: integers, low: 1, high: 9}"], "sampler 'grid' needs a list of values for 'seed'"),
        (["search.space.seed={type: integers, low: 9, high: 1}"], "low 9.* must lie below high 1"),
        ([f"search.space.{RATE}={{type: log_uniform, low: 0, high: 1}}"], "greater than 0"),
    ],
)
def test_a_search_that_cannot_be_is_one_sentence(items: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load([*BASE, *items])
    assert "\n" not in str(caught.value)


@pytest.fixture
def config() -> RunConfig:
    return load(BASE)


def test_a_change_reaches_all_items(config: RunConfig) -> None:
    changed = change(config, {"stages.*.select.k": 3, "synthesis.bins.foreground": [2, 4], RATE: 0.5})
    assert [stage.select for stage in changed.stages] == [TopKConfig(k=(3,))] * 2
    assert changed.synthesis.bins.foreground == (2, 4)
    assert changed.stages[1].learner.learning_rate == 0.5
    assert changed.stages[0] == config.stages[0].model_copy(update={"select": TopKConfig(k=(3,))})


def test_a_change_of_type_starts_afresh(config: RunConfig) -> None:
    changed = change(config, {"stages.0.ranker": {"type": "posterior"}, "stages.1.select.type": "top_share"})
    assert changed.stages[0].ranker and changed.stages[0].ranker.type == "posterior"
    assert changed.stages[1].select.type == "top_share"


def test_no_change_gives_the_same(config: RunConfig) -> None:
    assert change(config, {}) == config


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("stages.0.slect.k", "unknown config key 'stages.0.slect'; the nearest known key is 'stages.0.select'"),
        ("stages.*.select.kk", "nearest known key is 'stages.0.select.k'"),
        ("lerning_rate", "nearest known key is 'stages.*.learner.learning_rate'"),
        ("stages.7.steps", "'7' is no place in a list of 2"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(config: RunConfig, key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        change(config, {key: 2})
    assert problem in str(caught.value)

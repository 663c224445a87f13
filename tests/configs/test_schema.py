from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from onelabel.configs.load import models_in, parse
from onelabel.configs.schema import RunConfig
from onelabel.configs.selection import TopKConfig
from onelabel.errors import ConfigError


def stage(name: str = "base", **changes: Any) -> dict[str, Any]:
    return {"name": name, "steps": 1, "start": "scratch", "streams": {"train": [{"type": "synthetic"}]}} | changes


def run(*stages: dict[str, Any], **changes: Any) -> RunConfig:
    data = {"labelled": "one.nii.gz", "unlabelled": "many"}
    return parse({"name": "test", "data": data, "stages": list(stages) or [stage()]} | changes)


def all_models() -> Iterator[type[BaseModel]]:
    waiting, seen = [RunConfig], set[type[BaseModel]]()
    while waiting:
        model = waiting.pop()
        if model not in seen:
            seen.add(model)
            yield model
            waiting += [m for field in model.model_fields.values() for m in models_in(field.annotation)]


MODELS = sorted(all_models(), key=lambda model: model.__name__)
SELECTED = {"train": [{"type": "real", "of": "selected"}]}
RANKER = {"type": "autoencoder"}


@pytest.mark.parametrize("model", MODELS)
def test_every_key_is_described(model: type[BaseModel]) -> None:
    bare = [name for name, field in model.model_fields.items() if not field.description and name != "type"]
    assert bare == []
    assert model.__doc__


@pytest.mark.parametrize("model", MODELS)
def test_every_mapping_is_frozen_and_refuses_unknown_keys(model: type[BaseModel]) -> None:
    assert model.model_config["frozen"]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        model.model_validate({"no_such_key": 1})


def test_nothing_is_changed_in_place() -> None:
    config = run()
    with pytest.raises(ValidationError, match="frozen"):
        config.grid.spacing_mm = (1, 1, 1)  # type: ignore[misc]


@pytest.mark.parametrize("k", [0, -1])
def test_k_is_positive(k: int) -> None:
    with pytest.raises(ConfigError, match=f"stages.0.select.k.0' = {k}"):
        run(stage(ranker=RANKER, select={"type": "top_k", "k": k}))


@pytest.mark.parametrize(
    "stages",
    [
        [stage(streams=SELECTED)],
        [stage(streams=SELECTED, ranker=RANKER)],
        [stage("one"), stage("two", streams=SELECTED)],
        [stage("one"), stage("two", streams=SELECTED, ranker=RANKER)],
    ],
)
def test_selected_is_an_error_before_any_ranker(stages: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="reads 'selected' scans, but no stage before it has a ranker"):
        run(*stages)


def test_selected_may_come_from_any_earlier_ranker() -> None:
    run(stage("one", ranker=RANKER), stage("two"), stage("three", streams=SELECTED))


def test_a_ranker_needs_a_cohort() -> None:
    with pytest.raises(ConfigError, match="stage 'base' ranks, so data.unlabelled must name a cohort"):
        run(stage(ranker=RANKER), data={"labelled": "one.nii.gz"})


def test_the_first_stage_starts_from_scratch() -> None:
    with pytest.raises(ConfigError, match="'base' is the first and must start from scratch"):
        run(stage(start="previous"))
    run(stage("one"), stage("two", start="previous"))


def test_stages_have_different_names() -> None:
    with pytest.raises(ConfigError, match="different names"):
        run(stage("one"), stage("one"))


@pytest.mark.parametrize("size", [(32, 32, 40), (31, 32, 32), 24])
def test_the_grid_fits_the_network(size: Any) -> None:
    with pytest.raises(ConfigError, match="multiples of 16"):
        run(grid={"size": size})
    run(grid={"size": size}, network={"channels": [4], "patch": 1})


def test_a_patch_fits_the_network_and_the_grid() -> None:
    with pytest.raises(ConfigError, match=r"grid.patch \(32, 32, 40\) must be multiples of 16"):
        run(grid={"size": 64, "patch": [32, 32, 40]})
    with pytest.raises(ConfigError, match="at most the size"):
        run(grid={"size": 32, "patch": [32, 32, 48]})
    run(grid={"size": [63, 64, 65], "patch": [32, 32, 48]})


def test_only_the_axes_that_are_pooled_must_fit() -> None:
    thick = {"spacing_mm": [1.5, 1.5, 10], "size": [32, 32, 12]}
    assert run(grid=thick).segmenter.divisors == (16, 16, 4)
    assert run(grid=thick | {"size": [32, 32, 11]}, network={"dims": 2}).segmenter.divisors == (16, 16, 1)
    with pytest.raises(ConfigError, match=r"multiples of \(16, 16, 4\)"):
        run(grid=thick | {"size": [32, 32, 11]})


def test_classes_are_named_once() -> None:
    def data(**settings: Any) -> dict[str, Any]:
        return {"data": {"labelled": "one.nii.gz"} | settings}

    assert run(**data()).segmenter.classes == 2
    heart = run(**data(classes={1: "ventricle", 2: "wall", 5: "wall"}, ignore=255))
    assert heart.segmenter.classes == 3 and heart.data.names == ("background", "ventricle", "wall")
    assert run(**data(classes=["background", "ventricle", "wall"])).data.names == heart.data.names
    for settings, part in (
        ({"classes": ["ventricle", "wall"]}, "it is the background"),
        ({"classes": {}}, "name 1 to"),
        ({"classes": {1: "wall"}, "ignore": 1}, "cannot be the value of a class"),
        ({"ignore": 0}, "cannot be the value of a class"),
    ):
        with pytest.raises(ConfigError, match=part):
            run(**data(**settings))
    with pytest.raises(ConfigError, match="network.classes 4 are not the 2 of data.classes"):
        run(**data(), network={"classes": 4})
    with pytest.raises(ConfigError, match="synthesis.bins make up to"):
        run(**data(classes={index: f"part {index}" for index in range(1, 60)}))


def test_a_single_voxel_is_not_normalised() -> None:
    with pytest.raises(ConfigError, match="leaves one voxel to normalise: some axis must exceed 16"):
        run(grid={"size": 16})
    run(grid={"size": [16, 16, 32]})
    run(grid={"size": 16}, network={"norm": "group"})


def test_a_ranker_sees_the_whole_grid() -> None:
    of = {"data": {"labelled": "one.nii.gz", "unlabelled": "more"}, "grid": {"size": [96, 160, 128]}}
    with pytest.raises(ConfigError, match="exceeds the 128 voxels that the ranker's autoencoder sees: double"):
        run(stage(ranker={"type": "autoencoder"}), **of)
    run(stage(ranker={"type": "autoencoder", "network": {"size": 128}}), **of)
    run(stage(ranker={"type": "autoencoder", "network": {"pool": 4}}), **of)


def test_there_are_at_most_255_labels() -> None:
    many = {"bins": {"foreground": 80, "background": [3, 60]}}
    run(synthesis=many)
    with pytest.raises(ConfigError, match="up to 301 labels, more than 255; ask for fewer bins"):
        run(synthesis=many, data={"labelled": "one.nii.gz", "classes": ["background", "a", "b", "c"]})


def test_one_number_stands_for_all_axes() -> None:
    config = run(grid={"size": 32, "spacing_mm": 1.5}, synthesis={"bins": {"foreground": 4}})
    assert config.grid.size == (32, 32, 32)
    assert config.grid.spacing_mm == (1.5, 1.5, 1.5)
    assert config.synthesis.bins.foreground == (4, 4)


def test_a_string_stands_for_a_path() -> None:
    assert run().data.labelled == run(data={"labelled": {"path": "one.nii.gz"}, "unlabelled": "many"}).data.labelled


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": {"spacing_mm": 0}},
        {"grid": {"spacing_mm": [1, 1, -1]}},
        {"grid": {"spacing_mm": float("nan")}},
        {"grid": {"spacing_mm": float("inf")}},
        {"grid": {"size": 4}},
        {"network": {"channels": []}},
        {"network": {"channels": [8, 0]}},
        {"network": {"patch": 0}},
        {"network": {"classes": 1}},
        {"synthesis": {"bins": {"foreground": 0}}},
        {"synthesis": {"bins": {"background": [-1, 3]}}},
        {"synthesis": {"bins": {"foreground": [3, 2]}}},
        {"synthesis": {"bins": {"background": 300}}},
        {"synthesis": {"intensity": {"mean": [1, 0]}}},
        {"synthesis": {"deform": {"warp_spacing_mm": [40, 0]}}},
        {"synthesis": {"deform": {"flip": 1.1}}},
        {"synthesis": {"augment": {"bias": {"strength": [0, 2]}}}},
        {"synthesis": {"augment": {"bias": {"points": 0}}}},
        {"synthesis": {"augment": {"crop": {"share": [0.5, 1.5]}}}},
        {"stages": []},
        {"stages": [stage(rounds=0)]},
        {"stages": [stage(steps=0)]},
        {"stages": [stage(name="a b")]},
        {"stages": [stage(streams={"train": []})]},
        {"stages": [stage(streams={"train": [{"type": "real", "share": 0}]})]},
        {"stages": [stage(learner={"type": "supervised", "learning_rate": float("inf")})]},
        {"stages": [stage(ranker=RANKER | {"network": {"size": 96}})]},
        {"stages": [stage(ranker=RANKER | {"network": {"size": 32}})]},
        {"compute": {"train_workers": 0}},
        {"compute": {"train_workers": 2, "min_train_workers": 3}},
        {"compute": {"train_workers": 2, "min_train_workers": 1, "synth_gpus": 0.5}},
        {"compute": {"max_failures": -1}},
        {"compute": {"precision": "float16"}},
        {"name": ""},
        {"name": "."},
        {"name": "a/b"},
        {"seed": -1},
    ],
    ids=str,
)
def test_values_out_of_their_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        run(**changes)
    run()


@pytest.mark.parametrize("change", [{"expect": {"images": 0}}, {"ranker": {"type": "random"}}], ids=str)
def test_a_threshold_needs_an_expected_dice(change: dict[str, Any]) -> None:
    chosen = {"ranker": RANKER, "select": {"type": "threshold", "expected_dice": 0.9}, "expect": {"images": 64}}
    run(stage(**chosen))
    with pytest.raises(ConfigError, match="selects by expected Dice"):
        run(stage(**(chosen | change)))


def test_a_selection_of_no_type_is_one_of_the_best_k() -> None:
    assert run(stage(ranker=RANKER, select={"k": 3})).stages[0].select == TopKConfig(k=(3,))
    assert run(stage(ranker=RANKER, select={"k": [3, 5]})).stages[0].select == TopKConfig(k=(3, 5))


def stage_of(**changes: Any) -> Any:
    return run(stage(**changes)).stages[0]


SOFT = {"train": [{"type": "real", "of": "selected", "soft": True}]}
RIM = {"train": [{"type": "synthetic", "of": "selected", "ignore": [0.2, 0.8]}]}


def test_pseudo_labels_are_made_of_what_is_ranked() -> None:
    assert stage_of(pseudo={}, ranker=RANKER).pseudo is not None
    with pytest.raises(ConfigError, match="stage 'base' sets pseudo, but has no ranker"):
        stage_of(pseudo={})
    for ranker in (RANKER, {"type": "fused", "rankers": [{"type": "posterior"}, RANKER]}):
        stage_of(pseudo={"project": True}, ranker=ranker)
    for ranker in ({"type": "posterior"}, {"type": "oracle"}):
        stage_of(pseudo={}, ranker=ranker)
        with pytest.raises(
            ConfigError, match="stage 'base' sets pseudo.project: it needs a ranker of type autoencoder"
        ):
            stage_of(pseudo={"project": True}, ranker=ranker)
    for bad in ({"rounds": 0}, {"views": {"passes": 0}}):
        with pytest.raises(ConfigError):
            stage_of(pseudo=bad, ranker=RANKER)


@pytest.mark.parametrize("streams", [SOFT, RIM])
def test_only_pseudo_labels_have_probabilities(streams: dict[str, Any]) -> None:
    made, hard = {"ranker": RANKER, "pseudo": {}}, {"ranker": RANKER}
    last = stage("last", streams=streams)
    run(stage("base", **made), last)
    run(stage("base", **made), stage("between"), last)
    run(stage("base", **made), last | made | {"rounds": 3})
    run(stage("base", **made), last | hard)  # of which no round reads what it selects itself
    for stages, named in (
        ([stage("base", **hard), last | made], "base"),
        ([stage("first", **made), stage("base", **hard), last], "base"),
        ([stage("base", **made), last | hard | {"rounds": 2}], "last"),
    ):
        with pytest.raises(ConfigError, match=f"stage 'last' sets soft or ignore: stage '{named}' must set pseudo"):
            run(*stages)
    of_labelled = {"train": [part | {"of": "labelled"} for part in streams["train"]]}
    with pytest.raises(ConfigError, match="stage 'last' sets soft or ignore: only streams of selected scans may"):
        run(stage("base", **made), stage("last", streams=of_labelled))


@pytest.mark.parametrize(
    "change", [{"soft": True, "ignore": [0.2, 0.8]}, {"ignore": [0.8, 0.2]}, {"ignore": [0.5, 1.1]}]
)
def test_a_probability_is_read_in_one_way(change: dict[str, Any]) -> None:
    base = stage("base", ranker=RANKER, pseudo={})
    with pytest.raises(ConfigError):
        run(base, stage("last", streams={"train": [{"type": "real", "of": "selected"} | change]}))

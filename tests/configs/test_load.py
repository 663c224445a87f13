import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from onelabel.configs.load import PRESETS, dump, load, parse
from onelabel.configs.schema import RunConfig
from onelabel.errors import ConfigError

DATA = "data={labelled: one.nii.gz, unlabelled: many}"
BASE = ("singlestrip", DATA)
# Presets that are no strategy of their own and stack on one.
OVERLAYS = {"smoke"}
ON_SINGLESTRIP = {"default_brain"}
STRATEGIES = sorted({path.stem for path in PRESETS.glob("*.yaml")} - OVERLAYS - ON_SINGLESTRIP)


def sentence(*items: str) -> str:
    """The message of the error, which must be one sentence on one line."""
    with pytest.raises(ConfigError) as caught:
        load([*BASE, *items])
    message = str(caught.value)
    assert message and "\n" not in message
    assert len(message) < 400
    assert "pydantic" not in message
    return message


def written(folder: Path, name: str, settings: Any) -> str:
    path = folder / name
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize("preset", STRATEGIES)
def test_strategies_load_with_data(preset: str) -> None:
    config = load([preset, DATA])
    assert config.stages
    assert config.data.labelled.path == "one.nii.gz"
    assert config == load([str(PRESETS / f"{preset}.yaml"), DATA])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("overlay", sorted({path.stem for path in PRESETS.glob("*.yaml")} & OVERLAYS))
def test_overlays_load_on_every_strategy(strategy: str, overlay: str) -> None:
    plain, stacked = load([strategy, DATA]), load([strategy, overlay, DATA])
    assert stacked != plain
    assert [stage.name for stage in stacked.stages] == [stage.name for stage in plain.stages]
    assert [stage.ranker is None for stage in stacked.stages] == [stage.ranker is None for stage in plain.stages]


def test_the_default_network_is_trained_like_any_other() -> None:
    paths = [f"data.{part}.path=heads.csv" for part in ("labelled", "unlabelled", "test")]
    plain, stacked = load(["singlestrip", *paths]), load(["singlestrip", "default_brain", *paths])
    assert stacked.data.labelled.where == {"split": "labelled"}
    assert stacked.model_copy(update={"name": plain.name, "data": plain.data}) == plain
    with pytest.raises(ConfigError, match="'data.labelled.path' is missing"):
        load(["singlestrip", "default_brain"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dump_and_load_give_an_equal_config(strategy: str, tmp_path: Path) -> None:
    config = load(
        [strategy, DATA, "data.test={path: t.csv, where: {split: test}}", "synthesis.intensity.spread=[0, 1e-7]"]
    )
    dump(config, tmp_path / "config.yaml")
    assert load([str(tmp_path / "config.yaml")]) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_dump_writes_every_setting(tmp_path: Path) -> None:
    dump(load(BASE), tmp_path / "config.yaml")
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert set(content) == set(RunConfig.model_fields)


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    first = written(tmp_path, "first.yaml", {"seed": 1, "grid": {"spacing_mm": 3}})
    second = written(tmp_path, "second.yaml", {"seed": 2})
    assert load([*BASE, first, second]).seed == 2
    assert load([*BASE, second, first]).seed == 1
    assert load([*BASE, "seed=3", first]).seed == 1
    assert load([*BASE, first, "seed=3"]).seed == 3
    # What a later file does not name stays.
    assert load([*BASE, first, second]).grid.spacing_mm == (3, 3, 3)
    assert load([*BASE, first, second]).grid.size == load(BASE).grid.size


def test_an_override_may_be_longer_than_the_name_of_a_file() -> None:
    long = "synthesis.deform={" + " " * 300 + "warp_mm: [0, 3]}"
    assert load(["singlestrip", "data.labelled=a", "data.unlabelled=b", long]).synthesis.deform.warp_mm == (0, 3)
    with pytest.raises(ConfigError):
        load(["x" * 300])


def test_an_override_of_one_item_leaves_the_others() -> None:
    before, after = load(BASE), load([*BASE, "stages.0.steps=3"])
    assert after.stages[0].steps == 3
    assert after.stages[0].model_copy(update={"steps": before.stages[0].steps}) == before.stages[0]
    assert after.stages[1:] == before.stages[1:]


def test_a_star_changes_all_items() -> None:
    before, after = load(BASE), load([*BASE, "stages.*.steps=3"])
    assert {stage.steps for stage in after.stages} == {3}
    assert [s.learner for s in after.stages] == [s.learner for s in before.stages]
    assert {s.share for s in load([*BASE, "stages.1.streams.train.*.share=0.125"]).stages[1].streams["train"]} == {
        0.125
    }


def test_a_star_skips_what_an_item_lacks() -> None:
    base = [*BASE, "stages.*.ranker={type: autoencoder}", "stages.1.ranker=null"]
    config = load([*base, "stages.*.ranker.steps=7", "stages.*.ranker.network.latent=8"])
    assert config.stages[1].ranker is None
    assert config.stages[0].ranker is not None
    assert (config.stages[0].ranker.steps, config.stages[0].ranker.network.latent) == (7, 8)


def test_a_star_skips_keys_of_other_types() -> None:
    kinds = [*BASE, "stages.0.ranker={type: fused, rankers: [{type: autoencoder}, {type: confidence}]}"]
    kinds.append("stages.1.ranker={type: confidence}")
    assert load([*kinds, "stages.*.ranker={steps: 7, passes: 3}"]) == load(kinds)
    within = load([*kinds, "stages.*.ranker.rankers.*.steps=7", "stages.*.ranker.dilate=4"])
    assert within == load([*kinds, "stages.0.ranker.rankers.0.steps=7", "stages.1.ranker.dilate=4"])
    with pytest.raises(ConfigError, match=r"unknown config key 'stages\.0\.ranker\.stepz'"):
        load([*kinds, "stages.*.ranker.stepz=7"])


def test_a_star_reaches_what_an_item_has_by_default() -> None:
    minimal = (
        "stages=[{name: one, steps: 2, start: scratch, streams: {train: [{type: mask}]}, ranker: {type: autoencoder}}]"
    )
    (stage,) = load(
        [*BASE, minimal, "stages.*={select: {k: 3}, ranker: {network: {width: 4}, deform: {flip: 0}}}"]
    ).stages
    assert stage.ranker is not None
    assert (stage.select.k, stage.ranker.network.width, stage.ranker.deform.flip) == ((3,), 4, 0)
    (stage,) = load([*BASE, minimal, "stages.*.streams.train.*.deform.flip=0"]).stages
    assert stage.streams["train"][0].deform is None


def test_a_list_replaces_a_list() -> None:
    config = load([*BASE, "stages=[{name: only, steps: 2, start: scratch, streams: {train: [{type: synthetic}]}}]"])
    assert [stage.name for stage in config.stages] == ["only"]


def test_a_union_that_changes_its_type_starts_afresh() -> None:
    before = load([*BASE, "stages.0.learner.dice_weight=3"])
    assert before.stages[0].learner.type == "supervised"
    same = load([*BASE, "stages.0.learner.dice_weight=3", "stages.0.learner={type: supervised, clip: 2}"])
    assert same.stages[0].learner.model_dump()["dice_weight"] == 3
    other = load([*BASE, "stages.0.learner.dice_weight=3", "stages.0.learner={type: autoencoder, clip: 2}"])
    assert other.stages[0].learner.model_dump()["clip"] == 2
    assert other.stages[0].learner.type == "autoencoder"
    assert other.stages[0].learner.learning_rate == type(other.stages[0].learner)().learning_rate


def test_a_stream_that_changes_its_type_keeps_the_rest() -> None:
    before = load(BASE).stages[1].streams["train"][1]
    after = load([*BASE, "stages.1.streams.train.1.type=mask"]).stages[1].streams["train"][1]
    assert (before.type, after.type) == ("synthetic", "mask")
    assert (after.of, after.share) == (before.of, before.share) == ("selected", 0.25)


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("stages.0.stepz=3", "stages.0.steps"),
        ("stages.*.stepz=3", "stages.0.steps"),
        ("stages.0.learner.learning_rat=1", "stages.0.learner.learning_rate"),
        ("stages.0.ranker={type: autoencoder, network: {laten: 9}}", "stages.0.ranker.network.latent"),
        ("stages.0.ranker={type: autoencoder, learner: {slicez: 9}}", "stages.0.ranker.learner.slices"),
        ("stages.0.streams.train.0.shares=1", "stages.0.streams.train.0.share"),
        ("stages.0.streams={supervised: [{typ: real}]}", "stages.0.streams.supervised.0.type"),
        ("grid.sise=64", "grid.size"),
        ("synthesis.deform.rotate=4", "synthesis.deform.rotate_deg"),
        ("synthesis.augment.noize.sd=[0, 1]", "synthesis.augment.noise"),
        ("data.labelled={pth: a.nii}", "data.labelled.path"),
        ("data={labeled: a.nii}", "data.labelled"),
        ("compute.gpus=1", "compute.synth_gpus"),
        ("sed=1", "seed"),
        # Right, but at another level.
        ("labelled=x", "data.labelled"),
        ("learning_rate=1", "stages.*.learner.learning_rate"),
        ("grid.warp_mm=[1, 2]", "synthesis.deform.warp_mm"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(typed: str, nearest: str) -> None:
    message = sentence(typed)
    assert message.startswith("unknown config key '")
    assert message.endswith(f"the nearest known key is '{nearest}'")


@pytest.mark.parametrize("key", ["zzz", "grid.q", "stages.0.learner.ß", "data.0"])
def test_an_unknown_key_like_no_other_is_an_error_all_the_same(key: str) -> None:
    assert f"unknown config key '{key}'; the nearest known key is '" in sentence(f"{key}=1")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stages.0.steps=many", ["'stages.0.steps'", "'many'"]),
        ("stages.0.select.k=0", ["'stages.0.select.k.0'", "= 0"]),
        ("stages.0.streams.train.0.type=sound", ["'stages.0.streams.train.0.type'", "'sound'", "'synthetic'"]),
        ("stages.0.learner.type=magic", ["'stages.0.learner'", "'magic'", "'supervised'"]),
        ("stages.0.learner.learning_rate=0", ["'stages.0.learner.learning_rate'", "= 0"]),
        ("grid.spacing_mm=[1, 2]", ["'grid.spacing_mm.2'", "missing"]),
        ("stages=[{name: a, steps: 1, streams: {}, learner: {clip: 2}}]", ["'stages.0.learner.type'", "kind"]),
        ("stages=3", ["'stages'", "= 3"]),
        ("stages.2.steps=1", ["'2'", "0 to 1"]),
        ("stages.-1.steps=1", ["'-1'", "0 to 1"]),
        ("stages.x.steps=1", ["'x'", "0 to 1"]),
        ("stages.\u00b2.steps=1", ["'\u00b2'", "0 to 1"]),
        ("=3", ["'=3'", "dotted.key=value"]),
        ("grid..size=3", ["'grid..size=3'", "dotted.key=value"]),
        ("name=../elsewhere", ["'name'", "'../elsewhere'"]),
        ("name=..", ["'name'", "'..'"]),
        ("name=[a", ["'name'", "'[a'"]),
    ],
)
def test_errors_name_key_and_value(override: str, parts: list[str]) -> None:
    message = sentence(override)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "synthesis.augment.blur.fwhm_mm=[3, 1]",
            ["'synthesis.augment.blur.fwhm_mm'", "from low to high", "(3.0, 1.0)"],
        ),
        ("synthesis.augment.blur.fwhm_mm=[-1, 1]", ["'synthesis.augment.blur.fwhm_mm.0'", "-1"]),
        ("synthesis.deform.warp_mm=[-2, 4]", ["'synthesis.deform.warp_mm.0'", "-2"]),
        ("synthesis.deform.scale=[0, 1]", ["'synthesis.deform.scale.0'", "= 0"]),
        ("synthesis.deform.rotate_deg=-3", ["'synthesis.deform.rotate_deg'", "-3"]),
        ("synthesis.deform.flip=1.5", ["'synthesis.deform.flip'", "1.5"]),
        ("synthesis.intensity.mean=[0, 2]", ["'synthesis.intensity.mean.1'", "= 2"]),
        ("synthesis.augment.bias.strength=[0, 1.2]", ["'synthesis.augment.bias.strength.1'", "1.2"]),
        ("synthesis.augment.noise.sd=[-0.1, 0.1]", ["'synthesis.augment.noise.sd.0'", "-0.1"]),
        ("synthesis.augment.low_resolution.spacing_mm=[.inf, 2]", ["'synthesis.augment.low_resolution.spacing_mm.0'"]),
        ("synthesis.bins.foreground=[6, 2]", ["'synthesis.bins.foreground'", "from low to high"]),
        ("synthesis.bins.foreground=0", ["'synthesis.bins.foreground.0'", "= 0"]),
        ("synthesis.augment.crop.share=[0.2, 0.1]", ["'synthesis.augment.crop.share'", "from low to high"]),
    ],
)
def test_ranges_that_cannot_be_are_named(override: str, parts: list[str]) -> None:
    message = sentence(override)
    assert [part for part in parts if part not in message] == []


def test_what_is_required_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="'data' is missing; set it in a file or as data=VALUE"):
        load(["singlestrip"])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a: [1, 2", "not YAML"),
        ("a: b: c", "not YAML"),
        ("\tname: x", "not YAML"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_a_file_that_is_no_mapping(content: str, part: str, tmp_path: Path) -> None:
    path = written(tmp_path, "odd.yaml", content)
    message = sentence(path)
    assert part in message
    assert path in message


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    assert str(path) in sentence(str(path))


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    message = sentence(str(tmp_path / "absent.yaml"))
    assert "absent.yaml" in message
    assert "singlestrip" in message, "the presets are listed"
    assert str(tmp_path) in sentence(str(tmp_path)), "a folder is no config"


def test_a_missing_file_with_a_presets_name_is_not_that_preset(tmp_path: Path) -> None:
    assert str(tmp_path / "demo.yaml") in sentence(str(tmp_path / "demo.yaml"))


def test_a_file_goes_before_a_preset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "singlestrip").mkdir()  # a run's folder, say
    assert load(BASE).name == "singlestrip"
    written(tmp_path, "smoke.yaml", {"seed": 77})
    assert load([*BASE, "smoke.yaml"]).seed == 77


def test_a_file_may_have_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    assert load([*BASE, written(tmp_path, "seed=5.yaml", {"seed": 6})]).seed == 6


@pytest.mark.parametrize("settings", [None, 3, "text", [], {1: 2}])
def test_settings_that_are_no_mapping(settings: Any) -> None:
    with pytest.raises(ConfigError):
        parse(settings)


def test_neither_torch_nor_ray_is_imported() -> None:
    code = "; ".join(
        [
            "import sys",
            "from onelabel.configs.load import load",
            "load(['demo', 'data.labelled=a', 'data.unlabelled=b'])",
            "print(*sorted({'torch', 'ray', 'numpy', 'mlflow'} & set(sys.modules)))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_settings_of_a_source_may_follow_its_short_form() -> None:
    config = load(["singlestrip", "data.labelled=a.csv", "data.labelled.where.split=train", "data.unlabelled=b"])
    assert (config.data.labelled.path, config.data.labelled.where) == ("a.csv", {"split": "train"})

"""Benchmarks are run by hand: what they ask of the product must still be there."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from onelabel.configs.load import load

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_finds_what_it_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script(name, monkeypatch).__doc__


def test_the_ways_of_strategies_are_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = script("strategies", monkeypatch)
    sources = {name: tmp_path / f"{name}.csv" for name in ("labelled", "unlabelled", "all", "test", "scribbled")}
    ways = strategies._ways(sources, list(strategies.STRATEGIES), 60, 40)
    for settings in ways.values():
        config = load([*settings, "stages.*.expect.images=0"])
        first, *rest = config.stages
        assert (first.steps, sum(stage.steps * stage.rounds for stage in rest)) == (60, 40)
    structures = ["data.classes=[background, a, b]", "data.ignore=255"]
    scribbled = strategies._scribbled(sources, 100)
    assert [load([*settings, *structures]).stages[0].steps for settings in scribbled.values()] == [100] * 3


def test_the_recipes_of_the_study_are_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = script("study", monkeypatch)
    data = study.split(tmp_path, labelled="labelled", unlabelled="unlabelled", test="test")
    for recipe in ([], *study.RECIPES.values()):
        assert len(load(["singlestrip", *data, *study.GRID, *recipe]).stages) == 2
    for ranker in study.RANKERS.values():
        assert load(["singlestrip", *data, *study.GRID, f"stages.*.ranker={ranker}"])

from typing import Any

import pytest

from onelabel.configs.changes import changes
from onelabel.configs.load import load, parse

SMALLEST: dict[str, Any] = {
    "name": "trial",
    "data": {"labelled": "scan.nii.gz"},
    "stages": [{"name": "base", "steps": 7, "start": "scratch", "streams": {"train": [{"type": "synthetic"}]}}],
}
REQUIRED = {
    "name": ("trial", None),
    "data.labelled.path": ("scan.nii.gz", None),
    "stages.0.name": ("base", None),
    "stages.0.steps": ("7", None),
    "stages.0.start": ("scratch", "previous"),
    "stages.0.streams.train.0.type": ("synthetic", None),
}


def found(settings: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    return {one.key: (one.value, one.default) for one in changes(parse(settings))}


def stage(**more: Any) -> dict[str, Any]:
    return {"stages": [SMALLEST["stages"][0] | more]}


UNLABELLED = {"data": {"labelled": "scan.nii.gz", "unlabelled": "scans"}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        # As they are.
        ({"seed": 0, "grid": {"spacing_mm": 2}, "synthesis": {"deform": {"rotate_deg": 20}}}, {}),
        ({"seed": 3}, {"seed": ("3", "0")}),
        ({"grid": {"size": 64}}, {"grid.size": ("[64,64,64]", "[96,128,128]")}),
        (
            {"synthesis": {"augment": {"noise": {"sd": [0, 0.5]}}}},
            {"synthesis.augment.noise.sd": ("[0.0,0.5]", "[0.0,0.08]")},
        ),
        ({"tracking": {"uri": "sqlite:///x.db"}}, {"tracking.uri": ("sqlite:///x.db", "null")}),
        (
            {"compute": {"threads": 2, "compile": True}},
            {"compute.threads": ("2", "null"), "compute.compile": ("true", "false")},
        ),
        (stage(learner={"type": "supervised", "learning_rate": 1e-3}), {}),
        (stage(learner={"type": "supervised", "clip": 2}), {"stages.0.learner.clip": ("2.0", "1.0")}),
        # Another kind is compared with that kind's own defaults.
        (
            stage(learner={"type": "autoencoder", "slices": 4}),
            {
                "stages.0.learner.type": ("autoencoder", "supervised"),
                "stages.0.learner.slices": ("4", "16"),
            },
        ),
        # Defaults of the ranker's own, which are not those of the part by itself.
        (
            UNLABELLED
            | stage(
                ranker={
                    "type": "autoencoder",
                    "deform": {
                        "rotate_deg": 30,
                        "scale": [0.7, 1.4],
                        "shear": 0,
                        "translate_mm": 8,
                        "warp_mm": [0, 0],
                        "flip": 0.25,
                    },
                }
            ),
            {
                "data.unlabelled.path": ("scans", None),
                "stages.0.ranker.type": ("autoencoder", "null"),
                "stages.0.ranker.deform.flip": ("0.25", "0.5"),
            },
        ),
        (
            UNLABELLED
            | stage(
                ranker={"type": "fused", "rankers": [{"type": "confidence"}, {"type": "consistency", "passes": 2}]}
            ),
            {
                "data.unlabelled.path": ("scans", None),
                "stages.0.ranker.type": ("fused", "null"),
                "stages.0.ranker.rankers.0.type": ("confidence", None),
                "stages.0.ranker.rankers.1.type": ("consistency", None),
                "stages.0.ranker.rankers.1.passes": ("2", "8"),
            },
        ),
        (
            {"data": {"labelled": {"path": "scan.nii.gz", "where": {"site": "oslo"}}}},
            {"data.labelled.where.site": ("oslo", None)},
        ),
    ],
)
def test_exactly_what_differs_is_listed(settings: dict[str, Any], expected: dict[str, tuple[str, str | None]]) -> None:
    assert found(SMALLEST | settings) == REQUIRED | expected


def test_presets_differ_from_the_defaults_where_their_files_say_so() -> None:
    keys = [
        one.key for one in changes(load(["singlestrip", "data.labelled=a", "data.unlabelled=b", "stages.0.steps=5"]))
    ]
    assert len(set(keys)) == len(keys)
    assert {"synthesis.intensity.real", "stages.1.select.k", "stages.1.streams.train.2.share"} <= set(keys)
    assert not {key for key in keys if key.startswith(("grid", "network", "compute", "stages.0.ranker.network"))}

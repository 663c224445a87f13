"""What the benchmarks share: heads, and runs that go on from others."""

import shutil
from pathlib import Path

from onelabel.configs.schema import RunConfig
from onelabel.orchestrator.rounds import plan


def split(data: Path, **parts: str) -> list[str]:
    """Settings that take a run's labelled, unlabelled and test scans from splits of DATA/participants.csv."""
    manifest = data / "participants.csv"
    return [
        setting
        for part, name in parts.items()
        for setting in (
            f"data.{part}.path={manifest}",
            f"data.{part}.where.split={name}",
            f"data.{part}.label_column=mask",
        )
    ]


def go_on_from(base: RunConfig, config: RunConfig) -> None:
    """Let a run find the first network that another one trained, and the rankers' networks that it fitted."""
    folder, known = (Path(one.storage) / one.name for one in (config, base))
    first, trained = plan(config, folder)[0], plan(base, known)[0]
    if not first.checkpoint.is_dir():
        first.folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(trained.checkpoint, first.checkpoint)
        first.training(trained.training())
    for network in known.glob("rankers/[!.]*"):
        if not (folder / "rankers" / network.name).is_dir():
            shutil.copytree(network, folder / "rankers" / network.name)

"""The heads that the benchmarks share."""

from pathlib import Path


def split(data: Path, **parts: str) -> list[str]:
    """Settings that take a run's labelled, unlabelled and test scans from splits of DATA/ixi/participants.csv."""
    manifest = data / "ixi" / "participants.csv"
    return [
        setting
        for part, name in parts.items()
        for setting in (
            f"data.{part}.path={manifest}",
            f"data.{part}.where.split={name}",
            f"data.{part}.label_column=mask",
        )
    ]

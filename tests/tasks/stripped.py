"""What the tests of stripping share: a look at results, and another network."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from onelabel.tasks.strip_record import TABLE


def table(out: Path) -> list[dict[str, Any]]:
    """The rows of the table, by key."""
    return sorted(pq.read_table(out / TABLE).to_pylist(), key=lambda row: str(row["key"]))


def files(folder: Path) -> dict[str, int]:
    """All files with the time of their last change."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def other_network(folder: Path, trained: Path) -> Path:
    """The same weights under another seed: not the network that it was copied from."""
    folder.mkdir()
    for file in trained.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    facts = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(facts | {"seed": 1}))
    return folder

"""What can be typed is documented: commands, configuration keys, presets; and links lead somewhere."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from onelabel.configs.schema import RunConfig
from onelabel.orchestrator.cli import app

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", REPO / "cluster" / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
PRESETS = sorted(path.stem for path in (REPO / "configs").glob("*.yaml"))
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that an annotation mentions, however deep in unions and containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    # `type X = ...` hides what it stands for in __value__.
    for part in (*get_args(annotation), *filter(None, [getattr(annotation, "__value__", None)])):
        yield from models_in(part)


def keys(model: type[BaseModel], prefix: str = "", above: frozenset[type] = frozenset()) -> Iterator[str]:
    for key, field in model.model_fields.items():
        yield prefix + (field.alias or key)
        for below in models_in(field.annotation):
            if below not in above:
                yield from keys(below, f"{prefix}{field.alias or key}.", above | {model})


def quoted_words(text: str) -> set[str]:
    """All words that stand in backticks or in code blocks."""
    code = re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)
    return {word for span in code for word in re.findall(r"\w+", span)}


@pytest.fixture(scope="module")
def prose() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str, prose: str) -> None:
    assert re.search(rf"onelabel {re.escape(command)}\b", prose), f"no page shows `onelabel {command}`"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_documented(preset: str, prose: str) -> None:
    assert preset in quoted_words(prose), f"no page mentions the preset `{preset}`"


def test_every_key_is_documented() -> None:
    words = quoted_words((REPO / "docs" / "configuration.md").read_text(encoding="utf-8"))
    missing = [key for key in dict.fromkeys(keys(RunConfig)) if key.rpartition(".")[2] not in words]
    assert missing == [], "docs/configuration.md must name these keys in backticks"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    relative = [
        target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("mailto:")
    ]
    assert [target for target in relative if target and not (page.parent / target).exists()] == []

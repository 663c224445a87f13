"""What a configuration says that the schema does not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_json

from onelabel.configs.schema import RunConfig


@dataclass(frozen=True)
class Change:
    """A setting that is not its default; `default` is None where there is none, so that the key must be set.

    key : dotted; value, default : text as it would stand in YAML
    """

    key: str
    value: str
    default: str | None


def changes(config: RunConfig, /) -> list[Change]:
    """All settings that are not their defaults, in the schema's order."""
    return list(_changes(config, PydanticUndefined, ""))


def _changes(value: Any, default: Any, key: str) -> Iterator[Change]:
    parts = _parts(value, default)
    for name, part, below in parts:
        yield from _changes(part, below, f"{key}.{name}" if key else str(name))
    if not parts and value != default:
        yield Change(key, _text(value), None if default is PydanticUndefined else _text(default))


def _parts(value: Any, default: Any) -> list[tuple[Any, Any, Any]]:
    """Name, value and default of each part of a value; none if it is a value by itself."""
    if isinstance(value, dict):
        return [(name, part, PydanticUndefined) for name, part in value.items()]
    if isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
        return [(place, item, PydanticUndefined) for place, item in enumerate(value)]
    if not isinstance(value, BaseModel):
        return []
    fields = type(value).model_fields
    if type(default) is type(value):
        return [(name, getattr(value, name), getattr(default, name)) for name in fields]
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    if "type" in fields:
        # A member of a union: which one it is, is a setting too.
        defaults["type"] = getattr(default, "type", default)
    return [(name, getattr(value, name), below) for name, below in defaults.items()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value).decode()

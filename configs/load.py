"""YAML files stacked left to right, then `key=value` overrides; and back to YAML for the record."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from onelabel.configs.schema import RunConfig
from onelabel.errors import ConfigError

PRESETS = Path(__file__).parent


def load(items: Sequence[str]) -> RunConfig:
    """Read a run's config.

    Parameters
    ----------
    items : YAML files or preset names (`singlestrip`), and `dotted.key=value`, in any order. Later ones win. A list is
        replaced as a whole by a list, or changed in place by a mapping from index to changes; the index `*` stands for
        all items, and its mappings change only what an item has.

    Raises
    ------
    ConfigError : a file that is missing or no mapping, an unknown key, a value out of its range.
    """
    merged: Any = {}
    for item in items:
        merged = _merge(merged, _override(item) if "=" in item else _read(item))
    return parse(merged)


def parse(settings: Any) -> RunConfig:
    """Validate a nested mapping."""
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def dump(config: BaseModel, path: Path) -> None:
    """Write all settings, defaults included, as YAML."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _read(item: str) -> Any:
    path = Path(item)
    if not path.is_file() and (PRESETS / f"{path.name.removesuffix('.yaml')}.yaml").is_file():
        path = PRESETS / f"{path.name.removesuffix('.yaml')}.yaml"
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        reason = error.strerror or "not readable"
        raise ConfigError(f"config '{item}': {reason}; give a YAML file or one of the presets {presets}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config '{item}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config '{item}' must be a mapping of settings")
    return content


def _override(item: str) -> Any:
    key, _, text = item.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, list) and isinstance(over, dict):
        result = list(base)
        for key, change in over.items():
            if key == "*":
                result = [_merge(item, _applicable(item, change)) for item in result]
            else:
                result[_index(key, base)] = _merge(base[_index(key, base)], change)
        return result
    if isinstance(base, dict) and isinstance(over, dict):
        # A union that changes its type starts afresh.
        if "type" in over and over["type"] != base.get("type", over["type"]):
            return over
        return base | {key: _merge(base.get(key), value) for key, value in over.items()}
    return over


def _applicable(item: Any, change: Any) -> Any:
    """Of a change to all items of a list what applies to this one: a mapping changes only what is there."""
    if not isinstance(item, dict) or not isinstance(change, dict):
        return change
    kept = {key: value for key, value in change.items() if not isinstance(value, dict) or item.get(key) is not None}
    return {key: _applicable(item.get(key), value) for key, value in kept.items()}


def _index(key: Any, items: list[Any]) -> int:
    if not str(key).isdigit() or int(key) >= len(items):
        raise ConfigError(f"'{key}' is no place in a list of {len(items)}; use 0 to {len(items) - 1}, or * for all")
    return int(key)


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    place = [part for part in first["loc"] if part not in _TAGS]
    dotted = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(place[-1]), sorted(_known_keys()), n=1, cutoff=0.0)
        return f"unknown config key '{dotted}'; the nearest known key is '{near[0]}'"
    if first["type"] == "missing":
        return f"config key '{dotted}' is missing; set it in a file or as {dotted}=VALUE"
    message = first["msg"].removeprefix("Value error, ")
    return f"config key '{dotted}' = {first['input']!r}: {message}" if dotted else f"config: {message}"


def _known_keys() -> set[str]:
    keys: set[str] = set()
    waiting: list[type[BaseModel]] = [RunConfig]
    while waiting:
        model = waiting.pop()
        for name, field in model.model_fields.items():
            keys.add(name)
            waiting += [m for m in models_in(field.annotation) if m is not model]
    return keys


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """All pydantic models that a type annotation holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in getattr(annotation, "__args__", ()) for m in models_in(argument)]


_TAGS = {"supervised", "autoencoder", "unet", "top_k"}

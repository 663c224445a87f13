"""YAML files stacked left to right, then `key=value` overrides; and back to YAML for the record."""

import os
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from onelabel.configs.data import SourceConfig
from onelabel.configs.passwords import refuse_passwords
from onelabel.configs.schema import RunConfig
from onelabel.errors import ConfigError

PRESETS = Path(__file__).parent


def load(items: Sequence[str]) -> RunConfig:
    """Read a run's config.

    Parameters
    ----------
    items : YAML files or preset names (`singlestrip`), and `dotted.key=value`, in any order. Later ones win. A list is
        replaced as a whole by a list, or changed in place by a mapping from index to changes; the index `*` stands for
        all items, and leaves alone what an item lacks: a part that is null there, or a key of other types than its own.

    Raises
    ------
    ConfigError : a file that is missing or no mapping, an unknown key, a value out of its range, a password.
    """
    merged: Any = {}
    for item in items:
        settings = _override(item) if "=" in item and not os.path.isfile(item) else _read(item)
        merged = _merge(merged, settings, [RunConfig])
    refuse_passwords(merged)
    return parse(merged)


def change(config: RunConfig, values: Mapping[str, Any], /) -> RunConfig:
    """A config with other values at dotted keys, which may hold `*`; raises as `load` does."""
    merged: Any = config.model_dump(mode="json")
    for key, value in values.items():
        merged = _merge(merged, _nested(key, value), [RunConfig])
    return parse(merged)


def absolute(config: RunConfig, /) -> RunConfig:
    """The same run from any folder: its paths are absolute; URIs stay as they are."""

    def placed(place: str) -> str:
        return place if "://" in place else os.path.abspath(place)

    sources = {name: source for name, source in config.data if isinstance(source, SourceConfig)}
    update = {name: source.model_copy(update={"path": placed(source.path)}) for name, source in sources.items()}
    return config.model_copy(update={"data": config.data.model_copy(update=update), "storage": placed(config.storage)})


def parse(settings: Any) -> RunConfig:
    """Validate a nested mapping."""
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def text_of(config: BaseModel) -> str:
    """All settings, defaults included, as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def dump(config: BaseModel, path: Path) -> None:
    """Write what `text_of` gives; the file appears under its name only when it is complete."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text_of(config))
    os.replace(unfinished, path)


def _read(item: str) -> Any:
    path = Path(item)
    preset = PRESETS / f"{path.name.removesuffix('.yaml')}.yaml"
    # Only a bare name is a preset: a mistyped folder must not give another config than the one meant.
    if not os.path.isfile(item) and path.name == item and os.path.isfile(preset):
        path = preset
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
    if not all(key.strip().split(".")):
        raise ConfigError(f"override '{item}' must read dotted.key=value")
    return _nested(key.strip(), value)


def _nested(key: str, value: Any) -> Any:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(base: Any, over: Any, models: list[type[BaseModel]]) -> Any:
    """Put settings over others; models are those that may stand there."""
    if isinstance(base, list) and isinstance(over, dict):
        result = list(base)
        for key, change in over.items():
            if key == "*":
                result = [_merge(item, _applicable(item, change, models), models) for item in result]
            else:
                result[_index(key, base)] = _merge(result[_index(key, base)], change, models)
        return result
    if isinstance(base, str) and isinstance(over, dict) and SourceConfig in models:
        base = {"path": base}  # what a plain string is short for
    if isinstance(base, dict) and isinstance(over, dict):
        kind = base.get("type")
        # A union that changes its type starts afresh.
        if kind is not None and kind in [_tag(model) for model in models] and over.get("type", kind) != kind:
            return over
        return base | {key: _merge(base.get(key), value, _under(models, key)) for key, value in over.items()}
    return over


def _applicable(item: Any, change: Any, models: list[type[BaseModel]]) -> Any:
    """Of a change to all items of a list what applies to this one: nothing under a null, no key of another type."""
    if not isinstance(item, dict) or not isinstance(change, dict):
        return change
    own = [model for model in models if _tag(model) == item.get("type")]
    if own and "type" not in change:
        known, mine = ({key for model in group for key in model.model_fields} for group in (models, own))
        change = {key: value for key, value in change.items() if key in mine or key not in known}
    nulls = {key for model in models for key, field in model.model_fields.items() if field.default is None}
    absent = {key for key in nulls if item.get(key) is None and isinstance(change.get(key), dict)}
    kept = {key: value for key, value in change.items() if key not in absent}
    return {key: _applicable(item.get(key), value, _under(models, key)) for key, value in kept.items()}


def _under(models: list[type[BaseModel]], key: Any) -> list[type[BaseModel]]:
    """The models under a key of these; the same ones where the key is an index or a name."""
    fields = [model.model_fields[key] for model in models if key in model.model_fields]
    return [below for field in fields for below in models_in(field.annotation)] or models


def _index(key: Any, items: list[Any]) -> int:
    if not str(key).isdecimal() or int(key) >= len(items):
        raise ConfigError(f"'{key}' is no place in a list of {len(items)}; use 0 to {len(items) - 1}, or * for all")
    return int(key)


def _sentence(error: ValidationError) -> str:
    # A key that is missing may only be misspelt.
    first = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    place, models = _locate(first["loc"])
    dotted = ".".join(place)
    if first["type"] == "extra_forbidden":
        return f"unknown config key '{dotted}'; the nearest known key is '{_nearest(place, models)}'"
    if first["type"] == "missing":
        return f"config key '{dotted}' is missing; set it in a file or as {dotted}=VALUE"
    if first["type"] == "union_tag_not_found":
        return f"config key '{dotted}.type' is missing; say which kind it is"
    message = first["msg"].removeprefix("Value error, ")
    return f"config key '{dotted}' = {first['input']!r}: {message}" if dotted else f"config: {message}"


def _locate(loc: tuple[str | int, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """The key that an error is about, without the names of union members, and the models that may stand there."""
    place: list[str] = []
    models: list[type[BaseModel]] = [RunConfig]
    for part in loc:
        members = [model for model in models if len(models) > 1 and _tag(model) == part]
        if not members:
            place.append(str(part))
        models = members or _under(models, part)
    return place, models


def _nearest(place: list[str], models: list[type[BaseModel]]) -> str:
    """The known key most like an unknown one: at its own level, else anywhere, else at its own level after all."""
    *above, key = place
    beside = {name: ".".join([*above, name]) for model in models for name in model.model_fields}
    anywhere: dict[str, str] = {}
    for name, dotted in sorted(_dotted(RunConfig, ""), key=lambda found: found[1].count(".")):
        anywhere.setdefault(name, dotted)
    for names, cutoff in ((beside, 0.6), (anywhere, 0.8), (beside, 0.0)):
        if near := get_close_matches(key, sorted(names), n=1, cutoff=cutoff):
            return names[near[0]]
    return ".".join([*above, min(beside)])


def _dotted(model: type[BaseModel], place: str) -> Iterator[tuple[str, str]]:
    """All keys under a model, by name and with the way there; `*` stands for any item."""
    for name, field in model.model_fields.items():
        yield name, place + name
        origin = get_origin(field.annotation)
        items = "*." if origin is tuple else "*.*." if origin is dict else ""
        for below in models_in(field.annotation):
            yield from _dotted(below, f"{place}{name}.{items}")


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """All pydantic models that a type annotation holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in getattr(annotation, "__args__", ()) for m in models_in(argument)]


def _tag(model: type[BaseModel]) -> str | None:
    """What `type` must say for this member of a union."""
    field = model.model_fields.get("type")
    return None if field is None else field.default

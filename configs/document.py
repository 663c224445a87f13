"""The schema as a page: `python -m onelabel.configs.document` prints docs/configuration.md."""

import json
import sys
import types
import typing
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from onelabel.configs.data import SourceConfig
from onelabel.configs.load import models_in
from onelabel.configs.schema import RunConfig

_HEAD = """# Configuration

<!-- Written by `make docs` from the classes in configs/; edit those. -->

A run is described by YAML files or presets, stacked from left to right, and `key=value` overrides; later ones win.

```
onelabel run singlestrip mine.yaml name=study data.labelled=head.nii.gz grid.spacing_mm=1.5 stages.0.steps=8000
```

A list is replaced as a whole by a list, or changed in place by index; `stages.*.steps=10` changes all stages, and a `*`
leaves alone what an item lacks: a part that is null there, or a key of another `type`. An unknown key is an error that
names the nearest known one. The run's folder keeps all settings in `config.yaml`.

Every table lists the keys of one mapping and says at which dotted keys it may stand; `*` is the index of a list, or the
name in a mapping. Where several kinds of mapping are possible, the key `type` says which. A *range* is a pair
`[low, high]` from which each sample draws.
"""
_COLUMNS = "| key | type | default | what |\n| --- | --- | --- | --- |"
_SIMPLE = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "value"}
_SIGNS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "at least"}


def page() -> str:
    """The whole page, in Markdown."""
    places: dict[type[BaseModel], list[str]] = {}
    _collect(RunConfig, "", places)
    return "\n".join([_HEAD, *(_section(model, found) for model, found in places.items())])


def _collect(model: type[BaseModel], place: str, places: dict[type[BaseModel], list[str]]) -> None:
    """Note where in a run's settings each model stands, a model before what it holds."""
    places.setdefault(model, []).append(place)
    for name, field in model.model_fields.items():
        for below in dict.fromkeys(models_in(field.annotation)):
            _collect(below, f"{place}{name}.{_items(field.annotation)}", places)


def _items(annotation: Any) -> str:
    """`*.` for each list or mapping on the way to a model."""
    parts = [part for part in get_args(annotation) if models_in(part)]
    own = "*." if get_origin(annotation) in (tuple, dict) else ""
    return own + (_items(parts[0]) if parts else "")


def _section(model: type[BaseModel], places: list[str]) -> str:
    rows = [_row(name, field) for name, field in model.model_fields.items()]
    text = " ".join((model.__doc__ or "").split())
    at = ", ".join(f"`{place.removesuffix('.')}`" for place in places if place)
    return "\n".join([f"## {_title(model)}", "", f"{text} At {at}." if at else text, "", _COLUMNS, *rows, ""])


def _row(name: str, field: FieldInfo) -> str:
    found = [(bound, rule) for rule in field.metadata for bound in _SIGNS if hasattr(rule, bound)]
    rules = [f"{_SIGNS[bound]} {_value(getattr(rule, bound))}" for bound, rule in found]
    text = field.description or ("which kind this is" if name == "type" else "")
    cells = [f"`{name}`", ", ".join([_kind(field.annotation), *rules]), _default(field), text]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _kind(annotation: Any) -> str:
    """A type in plain words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return _kind(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in parts)
    if origin is typing.Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is tuple and parts[-1] is Ellipsis:
        kind = _kind(parts[0])
        return f"list of {kind}{'' if models_in(parts[0]) or ',' in kind else 's'}"
    if origin is tuple:
        kind = _kind(parts[0])
        return f"range of {kind}s" if len(parts) == 2 else f"{kind}, or {len(parts)} of them"
    if origin is dict:
        return f"mapping from {_kind(parts[0])} to {_kind(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        link = f"[{_title(annotation)}](#{_title(annotation).lower().replace(' ', '-')})"
        return f"text or {link}" if annotation is SourceConfig else link
    return _SIMPLE[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        changed = _changed(field.default)
        return f"`{_value(changed)}`" if changed else "its defaults"
    return f"`{_value(field.default)}`"


def _changed(model: BaseModel) -> dict[str, Any]:
    """What differs from the defaults of a mapping's own table."""
    own = type(model)()
    different = {name: value for name, value in model if value != getattr(own, name)}
    return {name: _changed(value) if isinstance(value, BaseModel) else value for name, value in different.items()}


def _value(value: Any) -> str:
    return json.dumps(value).replace('"', "")


def _title(model: type[BaseModel]) -> str:
    """`LowResolutionConfig` -> `Low resolution`."""
    name = model.__name__.removesuffix("Config")
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name)
    return "U-Net" if name == "UNet" else words.strip().capitalize()


if __name__ == "__main__":
    sys.stdout.write(page())

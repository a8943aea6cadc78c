"""Configs: frozen dataclasses whose values are checked however they are made, and written into every manifest.

1. `checked` makes a config class: its constructor refuses what `build` refuses, in the same one line.
2. `build` takes plain values: it names unknown fields, lets text stand for a group's first field, keeps text as text
   where a field takes text, and lets pydantic convert and check the rest.
3. The path of a recipe stands for a group: `distill: recipes/student.yaml`. A field may be `only` for some values of
   another one, as the settings of a method are; set for other values, it is refused.
4. `config_hash` and `to_dict` are what manifests hold.

`yaml_values.py` reads recipes, `flags.py` sets fields by name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import pydantic

from limbeck.errors import ConfigError, nearest
from limbeck.yaml_values import RECIPES, Number, read_recipe

Config = TypeVar("Config")


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
Complete = Callable[[Mapping[str, Any]], Mapping[str, Any]]
_COMPLETE: dict[type, Complete] = {}


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def checked(config_class: type[Config]) -> type[Config]:
    """A frozen, keyword-only dataclass whose constructor checks names, types and values as `build` does."""
    made = dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(config_class)

    @functools.wraps(made.__init__)
    def construct(self: Any, **fields: Any) -> None:
        valid = build(made, fields, made.__name__)
        for field in dataclasses.fields(cast(Any, made)):
            object.__setattr__(self, field.name, getattr(valid, field.name))

    made.__init__ = construct  # type: ignore[method-assign]
    return made


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def completed_by(complete: Complete) -> Callable[[type[Config]], type[Config]]:
    """A `checked` class whose recipes need not say all: `complete` fills in what follows from the rest."""

    def make(config_class: type[Config]) -> type[Config]:
        made = checked(config_class)
        _COMPLETE[made] = complete
        return made

    return make


def build(config_class: type[Config], tree: Mapping[str, Any], where: str = "config") -> Config:
    """Make `config_class` from a tree of plain values, completed where the class says how.

    Raises: ConfigError for an unknown key (with the nearest known one), a missing or ill-typed value, or a value that
    the class's own `__post_init__` refuses.
    """
    plain = _group(config_class, tree, where, "")
    if config_class in _COMPLETE:
        plain = _group(config_class, _COMPLETE[config_class](plain), where, "")
    try:
        made = _adapter(cast(Any, config_class)).validate_python(plain)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"] if not _is_union_branch(part))
        message = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] in ("missing", "value_error") else f"; found {_short(first['input'])}"
        meant = (
            nearest(str(first["input"]), re.findall(r"'([^']+)'", message)) if first["type"] == "literal_error" else ""
        )
        found += f"; {meant}" if meant.startswith("did you") else ""
        text = f"{where}: {path + ': ' if path else ''}{message}{found}"
        raise ConfigError(text.removesuffix(".") + ("" if text.endswith("?") else ".")) from error
    _refuse_foreign(made, where, "")
    return made


def _refuse_foreign(config: Any, where: str, prefix: str) -> None:
    """Settings of something that was not chosen would be passed over; they are refused instead."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        tag, values = field.metadata.get("only", ("", ()))
        if tag and getattr(config, tag) not in values and value != default_of(field):
            found = f"{prefix}{field.name} is a setting of {prefix}{tag} {' | '.join(values)}"
            raise ConfigError(f"{where}: {found}; this is {getattr(config, tag)}. Leave it out, or choose one of them.")
        if dataclasses.is_dataclass(value):
            _refuse_foreign(value, where, f"{prefix}{field.name}.")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON-ready values, every field present."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def config_hash(config: Any) -> str:
    """Twelve hex digits that change when any field changes."""
    tree = config if isinstance(config, Mapping) else to_dict(config)
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:12]


def get_field(config: Any, path: str) -> Any:
    """The value at a full dotted path; None below a group that is not set."""
    for part in path.split("."):
        if config is None:
            return None
        config = config[part] if isinstance(config, Mapping) else getattr(config, part)
    return config


@functools.cache
def hints_of(config_class: type) -> dict[str, Any]:
    """The type of every field."""
    return typing.get_type_hints(config_class)


def options_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union; the type itself where it is none."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def class_of(hint: Any) -> type | None:
    """The config class that a field holds; None for a plain value."""
    return next((option for option in options_of(hint) if isinstance(option, type) and _is_config(option)), None)


def _is_config(option: Any) -> bool:
    return dataclasses.is_dataclass(option)


def only(tag: str, *values: str, default: Any = dataclasses.MISSING, default_factory: Any = dataclasses.MISSING) -> Any:
    """A field that means something only where the field `tag` beside it has one of `values`."""
    given: Any = {"default_factory": default_factory} if default is dataclasses.MISSING else {"default": default}
    return dataclasses.field(metadata={"only": (tag, values)}, **given)


def default_of(field: Any) -> Any:
    """The default of a dataclass field; MISSING where it is required."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def first_field(config_class: type) -> str:
    """The field that text for the whole group sets."""
    return dataclasses.fields(cast(Any, config_class))[0].name


def _first_hint(config_class: type) -> Any:
    return hints_of(config_class)[first_field(config_class)]


def takes_text(hint: Any) -> bool:
    """Whether a field can be text."""
    return any(option in (str, Path) or _is_text_literal(option) for option in options_of(hint))


def takes_only_text(hint: Any) -> bool:
    """Whether a field is text or nothing, whatever it looks like."""
    rest = [option for option in options_of(hint) if option is not type(None)]
    return bool(rest) and all(option in (str, Path) or _is_text_literal(option) for option in rest)


def is_address(text: str) -> bool:
    """Whether text names something on another store, as s3://BUCKET/KEY does."""
    return bool(_ADDRESS.match(text))


def _is_text_literal(option: Any) -> bool:
    return typing.get_origin(option) is typing.Literal and all(isinstance(arg, str) for arg in typing.get_args(option))


@functools.cache
def _adapter(config_class: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(config_class)


def _group(config_class: type, tree: Mapping[str, Any], where: str, prefix: str) -> dict[str, Any]:
    """A group's values, each as its field takes it; unknown fields are refused."""
    hints = hints_of(config_class)
    known = [field.name for field in dataclasses.fields(cast(Any, config_class))]
    for key in tree:
        if key not in known:
            raise ConfigError(f"{where}: unknown field {prefix + str(key)!r}; {nearest(str(key), known)}")
    return {key: _value(hints[key], value, where, prefix + key) for key, value in tree.items()}


def _value(hint: Any, value: Any, where: str, path: str) -> Any:
    """A value as a field of this type takes it; what does not fit is left for pydantic to refuse."""
    nested = class_of(hint)
    if nested is not None:
        return _nested(nested, value, where, path)
    if isinstance(value, bool) and _is_number(hint):
        raise ConfigError(f"{where}: {path}: expected a number; found {str(value).lower()}.")
    if isinstance(value, str) and is_address(value) and {Path, str} & {*options_of(hint)} == {Path}:
        raise ConfigError(f"{where}: {path}: {value} is on another store; copy it here, or mount the store.")
    for kind, parts in ((typing.get_origin(option), typing.get_args(option)) for option in options_of(hint)):
        if kind in (list, tuple):
            return _entries(parts, value, where, path)
        if kind in (dict, Mapping) and isinstance(value, Mapping):
            return {key: _value(parts[1], entry, where, f"{path}.{key}") for key, entry in value.items()}
    return _scalar(hint, value)


def _is_number(hint: Any) -> bool:
    options = options_of(hint)
    return bool not in options and bool({int, float} & {*options})


def _nested(config_class: type, value: Any, where: str, path: str) -> Any:
    if value is None or isinstance(value, config_class):
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and value.endswith(RECIPES):
        value = read_recipe(Path(value))
    if _is_word(value) and hints_of(config_class) and takes_text(_first_hint(config_class)):
        value = {first_field(config_class): value}
    if isinstance(value, Mapping):
        return _group(config_class, value, where, f"{path}.")
    raise ConfigError(
        f"{where}: {path}: expected a group of fields ({', '.join(_some(config_class))}); found {value!r}."
    )


def _some(config_class: type) -> Iterator[str]:
    names = [field.name for field in dataclasses.fields(cast(Any, config_class))]
    yield from (*names[:3], "...") if len(names) > 3 else names


def _entries(parts: tuple[Any, ...], value: Any, where: str, path: str) -> Any:
    """The entries of a list; one text alone is a list of one where the entries are text."""
    if (_is_word(value) or isinstance(value, os.PathLike)) and takes_only_text(parts[0]):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    return [_value(parts[0], entry, where, f"{path}.{index}") for index, entry in enumerate(value)]


def _scalar(hint: Any, value: Any) -> Any:
    if takes_only_text(hint):
        if _is_word(value):
            return value.text if isinstance(value, Number) else str(value)
        return os.fspath(value) if isinstance(value, os.PathLike) and str in options_of(hint) else value
    return value.plain if isinstance(value, Number) and hint is not Any else value


def _is_word(value: Any) -> bool:
    """Whether a value can stand for text: numbers are as they are written, in Python as in recipes."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _is_union_branch(part: int | str) -> bool:
    # pydantic adds the name of the union member that it tried ("float", "constrained-str", "function-...") to the path.
    return isinstance(part, str) and (
        not part.isidentifier() or part in ("float", "int", "str", "bool", "Path", "path") or part[:1].isupper()
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""Fields by name: what flags, Python's keywords and the axes of a sweep set, and what `--help` lists.

A name is a dotted path (`optimizer.name`) or the end of one path only (`lead_fraction`). Text for a group sets its
first field (`student` is `student.model`).
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from limbeck.config import class_of, default_of, first_field, hints_of, takes_only_text
from limbeck.errors import ConfigError, nearest
from limbeck.progress import say
from limbeck.yaml_values import RECIPES, read_recipe, read_value


class FieldInfo(NamedTuple):
    """One leaf of a config class."""

    path: str
    type_name: str
    default: Any
    """`dataclasses.MISSING` when the field is required."""
    doc: str
    only: tuple[str, tuple[str, ...]] | None
    """Path and values of the choice that it is a setting of; None for one that always means something."""


def apply_flags(config_class: type, tree: Mapping[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` with `--path value` pairs set; a bare flag is true, a field of text takes any value as it is."""
    given: list[tuple[str, str, str]] = []
    index = 0
    while index < len(flags):
        if not flags[index].startswith("--"):
            raise ConfigError(f"unexpected argument {flags[index]!r}; a field is set by --name value.")
        name, equals, value = flags[index][2:].partition("=")
        index += 1
        if not equals:
            value = "true"
            if index < len(flags) and not flags[index].startswith("--"):
                value, index = flags[index], index + 1
        given.append((name.replace("-", "_"), value, f"--{name}"))
    return apply_fields(config_class, tree, given, is_text=True)


def apply_fields(
    config_class: type, tree: Mapping[str, Any], given: Sequence[tuple[str, Any, str]], *, is_text: bool = False
) -> dict[str, Any]:
    """A copy of `tree` with fields set in order, choices first, since they decide what a short name stands for.

    Args:
      given: name, value, and how the name is called in messages.
      is_text: values are text that is read by the type of its field.
    """
    result = copy.deepcopy(dict(tree))
    choices = {info.only[0] for info in describe(config_class) if info.only}
    for name, value, shown in sorted(given, key=lambda entry: entry[0] not in choices):
        set_field(config_class, result, name, value, shown, is_text=is_text)
    return result


def set_field(
    config_class: type, tree: dict[str, Any], name: str, value: Any, flag: str, *, is_text: bool = False
) -> None:
    """Set the field `name` in `tree`, in place."""
    *groups, leaf = resolve_path(config_class, name, flag, tree).split(".")
    place, owner = tree, config_class
    for group in groups:
        owner = cast(type, class_of(hints_of(owner)[group]))
        place[group] = _opened(place.get(group), owner)
        place = place[group]
    hint = hints_of(owner)[leaf]
    value = _read(hint, value) if is_text else value
    both = isinstance(value, Mapping) and isinstance(place.get(leaf), Mapping) and class_of(hint)
    place[leaf] = {**place[leaf], **value} if both else value
    _drop_foreign(owner, place, leaf, value)


def _drop_foreign(config_class: type, place: dict[str, Any], tag: str, value: Any) -> None:
    """Another choice than the recipe's leaves the settings of that one without meaning: they go, with a word."""
    for field in dataclasses.fields(cast(Any, config_class)):
        of, values = field.metadata.get("only", ("", ()))
        if of == tag and value not in values and field.name in place:
            dropped, default = place.pop(field.name), default_of(field)
            plain: Any = dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default  # type: ignore[arg-type]
            if dropped != plain:
                kinds = " | ".join(values)
                say(f"note: {field.name} {dropped} is left out: a setting of {tag} {kinds}, not of {value}")


def _opened(entry: Any, config_class: type) -> dict[str, Any]:
    """What a group holds, as a tree that more fields can be set in."""
    if isinstance(entry, dict):
        return entry
    if dataclasses.is_dataclass(entry):
        return {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    if isinstance(entry, str) and entry.endswith(RECIPES):
        return read_recipe(Path(entry))
    return {} if entry is None else {first_field(config_class): entry}


def _read(hint: Any, text: str) -> Any:
    """The value of a flag. Its type is known, so text is never taken for something else."""
    is_group = class_of(hint) is not None
    if takes_only_text(hint) or (is_group and not text.startswith("{")):
        is_null = text == "null" and (is_group or type(None) in typing.get_args(hint))
        return None if is_null else _unquoted(text)
    if typing.get_origin(hint) in (list, tuple) and takes_only_text(typing.get_args(hint)[0]):
        return read_value(text) if text.startswith("[") else text
    return read_value(text)


def _unquoted(text: str) -> str:
    """Text, or what its quotes hold where it is quoted as in YAML."""
    value = read_value(text) if text[:1] in ("'", '"') else text
    return value if isinstance(value, str) else text


def resolve_path(config_class: type, name: str, flag: str, tree: Mapping[str, Any] | None = None) -> str:
    """The full dotted path that `name` stands for.

    Args:
      tree: what is set already; where a short name stands for settings of several methods, that of the chosen one is
        meant, and where it stands for fields of groups that may be left out, that of the one which is there.
    Raises: ConfigError when no field, or more than one, ends in `name`.
    """
    paths = _paths(config_class)
    if name in paths:
        return name
    ends = [path for path in paths if path.endswith("." + name)]
    matches = _there(_meaningful(ends, config_class, tree or {}), config_class, tree or {})
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"{flag}: {name!r} stands for {' and '.join(matches)}; give the full path.")
    leaves = {path.rsplit(".", 1)[-1] for path in paths} | set(paths)
    raise ConfigError(f"{flag}: no such field; {nearest(name, leaves)}")


@functools.cache
def _paths(config_class: type) -> tuple[str, ...]:
    """Of every leaf, then of every group."""
    return (*(info.path for info in describe(config_class)), *(path for path, _ in groups_of(config_class)))


def _meaningful(paths: list[str], config_class: type, tree: Mapping[str, Any]) -> list[str]:
    """Of several fields those that mean something for the choices in `tree`; all where none does."""
    foreign = {info.path for info in describe(config_class) if not applies(info, config_class, tree)}
    return [path for path in paths if path not in foreign] or paths


def _there(paths: list[str], config_class: type, tree: Mapping[str, Any]) -> list[str]:
    """Of fields of groups that may be left out, those of the groups in `tree`; all where there is none, or another."""
    groups = [path.partition(".")[0] for path in paths]
    if not all(type(None) in typing.get_args(hints_of(config_class)[group]) for group in groups):
        return paths
    return [path for path, group in zip(paths, groups, strict=True) if tree.get(group) is not None] or paths


def applies(info: FieldInfo, config_class: type, tree: Mapping[str, Any]) -> bool:
    """Whether a field means something for the choices in `tree`, or for their defaults."""
    if not info.only:
        return True
    path, values = info.only
    place: Any = tree
    for part in path.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    if place is None:
        place = next(other.default for other in describe(config_class) if other.path == path)
    return place in values


@functools.cache
def describe(config_class: type) -> tuple[FieldInfo, ...]:
    """Every leaf of `config_class`, depth first, in the order of its definition."""
    return tuple(_describe(config_class, "", None))


def groups_of(config_class: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every nested config of `config_class`: its dotted path and its class."""
    for name, hint in hints_of(config_class).items():
        nested = class_of(hint)
        if nested is not None:
            yield prefix + name, nested
            yield from groups_of(nested, f"{prefix}{name}.")


def _describe(config_class: type, prefix: str, within: tuple[str, tuple[str, ...]] | None) -> Iterator[FieldInfo]:
    hints, docs = hints_of(config_class), field_docs(config_class)
    for field in dataclasses.fields(cast(Any, config_class)):
        tag, values = field.metadata.get("only", ("", ()))
        only = (prefix + tag, values) if tag else within
        nested = class_of(hints[field.name])
        if nested is not None:
            yield from _describe(nested, f"{prefix}{field.name}.", only)
            continue
        hint, doc = hints[field.name], docs.get(field.name, "")
        yield FieldInfo(prefix + field.name, _type_name(hint), default_of(field), doc, only)


def field_docs(config_class: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and its bases, read from their source."""
    docs: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):
        docs |= _docs_in(textwrap.dedent(inspect.getsource(base)))
    return docs


@functools.cache
def _docs_in(source: str) -> dict[str, str]:
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, note in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant):
            docs[ast.unparse(field.target)] = " ".join(str(note.value.value).split())
    return docs


def _type_name(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(str(option) for option in parts)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(option) for option in parts)
    if hint is type(None):
        return "null"
    if origin is list:
        return f"list of {_type_name(parts[0])}"
    if origin is tuple:
        return f"list of {len(parts)} {_type_name(parts[0])}"
    if origin is not None:
        return "mapping"
    return "any" if hint is Any else hint.__name__

"""Configs: frozen dataclasses, filled from a YAML recipe and from flags, checked once, written into every manifest.

1. `read_recipe` reads YAML into a plain tree.
2. `apply_flags` sets fields by dotted path (`--optimizer.name adamw`); a flag may leave out the groups in front of a
   name that occurs once (`--lead-fraction 0.5`).
3. `build` refuses unknown keys, naming the nearest known one, and lets pydantic convert and check the values.
4. `describe` lists every field with its type, default and docstring, for `--help`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pydantic
import yaml

from limbeck.errors import ConfigError, nearest

Config = TypeVar("Config")


class FieldInfo(NamedTuple):
    """One leaf of a config class."""

    path: str
    type_name: str
    default: Any
    """`dataclasses.MISSING` when the field is required."""
    doc: str


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe into a tree of plain values; an empty file is an empty recipe."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe. Name an existing YAML file.")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
        json.dumps(tree, default=str)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML ({_one_line(error)}).") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of fields to values; found {type(tree).__name__}.")
    return tree


def build(config_class: type[Config], tree: Mapping[str, Any], where: str = "config") -> Config:
    """Make `config_class` from a tree of plain values, completed by the class's own `filled(tree)` where it has one.

    Raises: ConfigError for an unknown key (with the nearest known one), a missing or ill-typed value, or a value that
    the class's own `__post_init__` refuses.
    """
    _check_tree(config_class, tree, where, prefix="")
    fill: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = getattr(config_class, "filled", None)
    tree = tree if fill is None else fill(tree)
    try:
        return pydantic.TypeAdapter(config_class).validate_python(dict(tree))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"] if not _is_union_branch(part))
        message = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] in ("missing", "value_error") else f"; found {_short(first['input'])}"
        text = f"{where}: {path + ': ' if path else ''}{message}{found}"
        raise ConfigError(text.removesuffix(".") + ".") from error


def apply_flags(config_class: type, tree: Mapping[str, Any], flags: list[str]) -> dict[str, Any]:
    """A copy of `tree` with `--path value` pairs set; values are read as YAML scalars or lists, a bare flag is true."""
    result = json.loads(json.dumps(tree, default=str))
    index = 0
    while index < len(flags):
        if not flags[index].startswith("--"):
            raise ConfigError(f"unexpected argument {flags[index]!r}; a field is set by --name value.")
        name, equals, value = flags[index][2:].partition("=")
        index += 1
        if not equals:
            if index < len(flags) and not flags[index].startswith("--"):
                value, index = flags[index], index + 1
            else:
                value = "true"
        set_field(config_class, result, name.replace("-", "_"), _scalar(value), flag=f"--{name}")
    return result


def set_field(config_class: type, tree: dict[str, Any], name: str, value: Any, flag: str) -> None:
    """Set the field `name` (dotted, or the end of one path only) in `tree`, in place."""
    path = resolve_path(config_class, name, flag)
    *groups, leaf = path.split(".")
    for group in groups:
        if not isinstance(tree.get(group), dict):
            tree[group] = {}
        tree = tree[group]
    tree[leaf] = value


def resolve_path(config_class: type, name: str, flag: str) -> str:
    """The full dotted path that `name` stands for.

    Raises: ConfigError when no field, or more than one, ends in `name`.
    """
    paths = [info.path for info in describe(config_class)] + [path for path, _ in groups_of(config_class)]
    if name in paths:
        return name
    matches = [path for path in paths if path.endswith("." + name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"{flag}: {name!r} stands for {' and '.join(matches)}; give the full path.")
    leaves = {path.rsplit(".", 1)[-1] for path in paths} | set(paths)
    raise ConfigError(f"{flag}: no such field; {nearest(name, leaves)}")


def get_field(config: Any, path: str) -> Any:
    """The value at a full dotted path; None below a group that is not set."""
    for part in path.split("."):
        if config is None:
            return None
        config = config[part] if isinstance(config, Mapping) else getattr(config, part)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON-ready values, every field present."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def config_hash(config: Any) -> str:
    """Twelve hex digits that change when any field changes."""
    tree = config if isinstance(config, Mapping) else to_dict(config)
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:12]


@functools.cache
def describe(config_class: type) -> tuple[FieldInfo, ...]:
    """Every leaf of `config_class`, depth first, in the order of its definition."""
    return tuple(_describe(config_class, ""))


def groups_of(config_class: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every nested config of `config_class`: its dotted path and its class."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        nested = nested_class(hints[field.name])
        if nested is not None:
            yield prefix + field.name, nested
            yield from groups_of(nested, f"{prefix}{field.name}.")


def nested_class(hint: Any) -> type | None:
    """The dataclass inside `hint`, which may be optional; None when there is none."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)  # type: ignore[return-value]


def _describe(config_class: type, prefix: str) -> Iterator[FieldInfo]:
    hints, docs = typing.get_type_hints(config_class), field_docs(config_class)
    for field in dataclasses.fields(config_class):
        nested = nested_class(hints[field.name])
        if nested is not None:
            yield from _describe(nested, f"{prefix}{field.name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield FieldInfo(prefix + field.name, _type_name(hints[field.name]), default, docs.get(field.name, ""))


@functools.cache
def field_docs(config_class: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, note in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant):
            docs[ast.unparse(field.target)] = " ".join(str(note.value.value).split())
    return docs


def _check_tree(config_class: type, tree: Mapping[str, Any], where: str, prefix: str) -> None:
    """Refuse what pydantic would let pass: unknown fields, and true or false where a number is asked for."""
    hints = typing.get_type_hints(config_class)
    known = [field.name for field in dataclasses.fields(config_class)]
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown field {prefix + str(key)!r}; {nearest(str(key), known)}")
        options = typing.get_args(hints[key]) or (hints[key],)
        if isinstance(value, bool) and bool not in options and (int in options or float in options):
            raise ConfigError(f"{where}: {prefix}{key}: expected a number; found {str(value).lower()}.")
        nested = nested_class(hints[key])
        if nested is not None and isinstance(value, Mapping):
            _check_tree(nested, value, where, f"{prefix}{key}.")
        entry = nested_class(options[0]) if typing.get_origin(hints[key]) is list else None
        for index, item in enumerate(value if entry is not None and isinstance(value, list) else ()):
            if entry is not None and isinstance(item, Mapping):
                _check_tree(entry, item, where, f"{prefix}{key}.{index}.")


class _StrictLoader(yaml.SafeLoader):
    """YAML whose keys are strings, each once in its mapping; the plain loader lets the last of two win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no field name", node.start_mark)
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is set twice", node.start_mark)
        return mapping


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _is_union_branch(part: int | str) -> bool:
    # pydantic adds the name of the union member that it tried ("float", "constrained-str", "function-...") to the path.
    return isinstance(part, str) and (
        not part.isidentifier() or part in ("float", "int", "str", "bool", "Path", "path")
    )


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

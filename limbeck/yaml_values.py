"""YAML as recipes and flags mean it: keys are text, each once; numbers keep how they were written.

YAML 1.1 reads `2:4` as 124, `no` as false, `1e-3` as text and `2024-01-01` as a date. Here, as in YAML 1.2's core
schema, they are text, text, a number and text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from limbeck.errors import ConfigError

RECIPES = (".yaml", ".yml")
"""How the name of a recipe ends."""


class Number:
    """A number that knows its text, so that a field of text gets what was written: `007`, `0.50`."""

    text: str
    plain: int | float


class _Int(int, Number):
    pass


class _Float(float, Number):
    pass


class Loader(yaml.SafeLoader):
    """Keys are text, each once in its mapping; numbers and true and false as in YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (PyYAML's own way; filled below)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # A merge (`<<`) is written out by the call below; what it brings may be set again beside it.
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        mapping = super().construct_mapping(node, deep)
        for key in keys:
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no field name", node.start_mark)
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is set twice", node.start_mark)
        return mapping


def _number(loader: Loader, node: yaml.ScalarNode) -> Any:
    text = str(loader.construct_scalar(node))
    if "int" in node.tag:
        value: Any = _Int(int(text, 0) if re.match(r"0[xo]", text) else int(text))
    else:
        value = _Float(float(text.lower().replace(".inf", "inf").replace(".nan", "nan")))
    value.text, value.plain = text, (int if "int" in node.tag else float)(value)
    return value


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+0123456789."],
    ),
    ("merge", "<<", ["<"]),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
for _tag in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe into a tree of plain values; an empty file is an empty recipe."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe. Name an existing YAML file.")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
        json.dumps(tree, default=str)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of fields to values; found {type(tree).__name__}.")
    return tree


def read_value(text: str) -> Any:
    """One value of a flag, read as in a recipe; what is no YAML is text."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return text

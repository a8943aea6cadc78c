"""What `--help` prints: all commands, the fields of one that people change, or all of them."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from limbeck.commands import COMMANDS
from limbeck.config import class_of, hints_of
from limbeck.errors import ConfigError
from limbeck.flags import FieldInfo, applies, describe, field_docs
from limbeck.stage import Stage, View

OPTIONS = {
    "--out": "directory to write; default runs/COMMAND",
    "--overwrite": "replace an existing output",
    "--resume": "go on with an interrupted run",
    "--dry-run": "estimate time and memory, start nothing",
    "--on": "where the parts of the job run: local (default), or ray (the cluster of RAY_ADDRESS, else these cores)",
    "--device": "auto (the accelerator where there is one), cpu, cuda or cuda:N; also LIMBECK_DEVICE",
    "--dtype": "of what is not trained, and of training's products: auto (bf16 on an accelerator), float32 or bf16",
    "--json": "print the result as JSON",
    "--debug": "show the stack of an error",
    "--help": "this text; --help all has every field, --help GROUP those of a group",
}
LIMITED = ("--out", "--overwrite", "--resume", "--dry-run", "--on", "--device", "--dtype")
"""Options that not every command takes."""
HELP_COLUMN = 26
"""Where the texts begin."""


def print_overview() -> None:
    """Every command, in a line or two."""
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"limbeck {name}", command.help)
    out = Console()
    out.print("limbeck: distil a large reasoning model into a small, fast one and see what every saving costs.\n")
    out.print(table)
    out.print("\nlimbeck COMMAND --help shows the fields of a command that people change, --help all every one.")


def print_help(command: Stage | View, words: Sequence[str]) -> None:
    """Help for a line that asks for it; choices on the line (`--method alps`) decide which fields there are.

    Raises: ConfigError for a group that has no fields.
    """
    out = Console()
    chosen, groups = _choices(command, words)
    if groups and groups != ["all"]:
        _print_fields(_of_groups(command, groups), out.width)
        return
    subject = f"{command.subject.upper()} | " if command.subject else ""
    head = f"limbeck {command.name} {subject}[RECIPE.yaml] [--FIELD value ...]\n\n{COMMANDS[command.name].help}\n"
    out.print(head, markup=False, highlight=False)
    for flag in options_of(command):
        print(_help_line(flag, OPTIONS[flag], out.width))
    fields = [info for info in fields_of(command) if applies(info, command.config, chosen)]
    first = () if groups else command.first
    shown = _below(fields, first) if first else fields
    _print_fields(shown, out.width)
    more = f"{len(fields) - len(shown)} more fields: limbeck {command.name} --help all.\n" if first else ""
    out.print(
        f"\n{more}Groups in front of a name that occurs once may be left out (--lead-fraction 0.5).\n"
        f"limbeck {command.name} --help GROUP shows the fields of one group.",
        markup=False,
        highlight=False,
    )


def options_of(command: Stage | View) -> list[str]:
    """The options of a command, as flags."""
    return [flag for flag in OPTIONS if flag not in LIMITED or flag[2:].replace("-", "_") in command.options]


def _of_groups(command: Stage | View, groups: Sequence[str]) -> list[FieldInfo]:
    shown = _below(describe(command.config), groups)
    if not shown:
        raise ConfigError(
            f"limbeck {command.name} --help: no fields in {', '.join(groups)}; "
            f"limbeck {command.name} --help all has every one."
        )
    return shown


def fields_of(command: Stage | View) -> list[FieldInfo]:
    """Every field of a command; one that holds the recipe of another command stands for that one's fields."""
    other = {path: _reference(command, path) for path in command.refers}
    found = {}
    for info in describe(command.config):
        within = [other[path] for path in other if _is_of(info.path, path)] or [info]
        found[within[0].path] = within[0]
    return list(found.values())


def _reference(command: Stage | View, path: str) -> FieldInfo:
    *groups, name = path.split(".")
    owner = command.config
    for group in groups:
        owner = class_of(hints_of(owner)[group])
    kind = f"fields of limbeck {command.refers[path]}, or its recipe"
    return FieldInfo(path, kind, owner.__dataclass_fields__[name].default, field_docs(owner)[name], None)


def _choices(command: Stage | View, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The choices that a line makes (`--method alps`), as a tree, and the groups that it asks for."""
    paths = {info.only[0] for info in describe(command.config) if info.only}
    tree: dict[str, Any] = {}
    groups: list[str] = []
    rest = iter(words)
    for word in rest:
        name = word.lstrip("-").replace("-", "_")
        matches = [path for path in paths if f".{path}".endswith(f".{name}")]
        if word.startswith("--") and len(matches) == 1:
            _put(tree, matches[0], next(rest, ""))
        elif name not in ("help", "h"):
            groups.append(name)
    return tree, groups


def _put(tree: dict[str, Any], path: str, value: str) -> None:
    *parents, leaf = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def _below(fields: Iterable[FieldInfo], groups: Sequence[str]) -> list[FieldInfo]:
    return [info for info in fields if any(_is_of(info.path, group) for group in groups)]


def _is_of(path: str, group: str) -> bool:
    return path == group or path.startswith(group + ".")


def _print_fields(fields: Sequence[FieldInfo], width: int) -> None:
    for number, info in enumerate(fields):
        if number and _group_of(info.path) != _group_of(fields[number - 1].path):
            print()
        print(_help_line("--" + info.path.replace("_", "-"), _field_text(info), width))


def _group_of(path: str) -> str:
    return path.partition(".")[0] if "." in path else ""


def _help_line(flag: str, text: str, width: int) -> str:
    """A long flag has a line of its own, so that names of nested fields leave room for their text."""
    indent = " " * HELP_COLUMN
    body = textwrap.fill(text, max(width, 60), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return f"{flag:<{HELP_COLUMN}}{body.lstrip()}" if len(flag) < HELP_COLUMN - 1 else f"{flag}\n{body}"


def _field_text(info: FieldInfo) -> str:
    required = info.default is dataclasses.MISSING
    default = "required" if required else f"default {json.dumps(info.default, default=str)}"
    only = f"with {info.only[0]} {' | '.join(info.only[1])}; " if info.only else ""
    return f"{info.doc} ({only}{info.type_name}; {default})"

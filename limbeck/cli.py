"""The command line: parse, find the command, call it, print. Flags are the fields of the command's config.

    limbeck COMMAND [RECIPE.yaml] [--out DIR] [--overwrite] [--resume] [--field value ...]

A user's mistake is one line on the console and exit code 2; `--debug` shows the stack.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from limbeck.checkpoint import Checkpoint, local_directory
from limbeck.commands import named
from limbeck.config import build
from limbeck.errors import ConfigError, LimbeckError
from limbeck.flags import apply_flags
from limbeck.help import LIMITED, print_help, print_overview
from limbeck.placement import asking
from limbeck.progress import say
from limbeck.runner.launch import launched
from limbeck.stage import How, Place, Stage, View, default_out, is_recipe, recipe_of
from limbeck.version import __version__


class Options(NamedTuple):
    """What is no field of a config."""

    out: Path
    how: How
    asked: tuple[str | None, str | None]
    """Device and number format."""
    dry_run: bool
    json: bool


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `limbeck` command."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    try:
        code = _dispatch(argv)
    except BrokenPipeError:  # whoever read our output has enough; nothing more may be written, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except (LimbeckError, OSError) as error:
        if is_debug:
            traceback.print_exc()
        say(f"limbeck: {' '.join(str(error).split()) or type(error).__name__}")
        code = 2
    except KeyboardInterrupt:
        say(
            "limbeck: interrupted. demo, pipeline, sweep, teacher cache and traces generate go on when called again; "
            "the others that train or compress go on with --resume."
        )
        code = 130
    sys.exit(code)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print_overview()
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, rest = named(argv)
    command = load_command(name)
    if "--help" in rest or "-h" in rest:
        print_help(command, rest)
        return 0
    options, rest = take_options(command, rest)
    config = read_config(command, rest)
    with asking(*options.asked):
        return _run(command, config, options)


def _run(command: Stage | View, config: Any, options: Options) -> int:
    if options.dry_run:
        _dry_run(command, config, options)
    elif isinstance(command, View):
        answer = command.run(config)
        if answer is not None:
            _print_answer(answer, command, options)
        return int(not getattr(answer, "is_sound", True))
    else:
        checkpoint = command.run(config, options.out, how=options.how)
        _print_checkpoint(checkpoint, command, options)
        # What is written, but proved to be wrong elsewhere, must not pass in a script.
        return int(checkpoint.is_finished and checkpoint.metrics.get("is_clean") is False)
    return 0


def load_command(name: str) -> Stage | View:
    """A command by its name, its module loaded now."""
    found: Stage | View = importlib.import_module("limbeck.commands").COMMANDS[name].load()
    return found


def read_config(command: Stage | View, arguments: list[str]) -> Any:
    """The config that a line's subject or recipe and flags describe.

    Raises: ConfigError.
    """
    tree: dict[str, Any] = {}
    where = "flags"
    subjects = []
    while arguments and not arguments[0].startswith("--"):
        subjects.append(arguments[0])
        arguments = arguments[1:]
        if not _takes_many(command):
            break
    if subjects and is_recipe(command, subjects[0]):
        where = subjects[0]
        tree = recipe_of(command, where)
    elif subjects:
        tree = {str(command.subject): subjects if _takes_many(command) else subjects[0]}
    return build(command.config, apply_flags(command.config, tree, arguments), where)


def _takes_many(command: Stage | View) -> bool:
    return isinstance(command, View) and command.takes_many


def take_options(command: Stage | View, arguments: list[str]) -> tuple[Options, list[str]]:
    """What is no field, and the rest of the line.

    Raises: ConfigError for an option that means nothing to the command.
    """
    found: dict[str, Any] = {}
    rest: list[str] = []
    takes = options_of(command)
    index = 0
    while index < len(arguments):
        flag, equals, value = arguments[index].partition("=")
        _refuse_unless_taken(flag, command)
        if flag in takes and flag in _WITH_VALUE:
            if not equals:
                index += 1
                value = arguments[index] if index < len(arguments) else ""
            found[flag[2:]] = _WITH_VALUE[flag](value)
        elif flag in (*takes, "--json") and not equals:
            found[flag[2:].replace("-", "_")] = True
        else:
            rest.append(arguments[index])
        index += 1
    out, dry_run, as_json = (found.pop(name, None) for name in ("out", "dry_run", "json"))
    asked = found.pop("device", None), found.pop("dtype", None)
    return Options(out or default_out(command.name), How(**found), asked, bool(dry_run), bool(as_json)), rest


def _refuse_unless_taken(flag: str, command: Stage | View) -> None:
    if flag in LIMITED and flag not in options_of(command) and flag[2:] not in command.config.__dataclass_fields__:
        raise ConfigError(f"{flag} means nothing to limbeck {command.name}; see limbeck {command.name} --help.")


def options_of(command: Stage | View) -> tuple[str, ...]:
    """The options that a command takes beside its fields."""
    return tuple(f"--{name.replace('_', '-')}" for name in command.options)


def _read_out(value: str) -> Path:
    if not value or value.startswith("--"):
        raise ConfigError("--out needs a directory.")
    return local_directory(value)


def _read_on(value: str) -> str:
    if value not in get_args(Place):
        raise ConfigError(f"--on needs local or ray; found {value!r}.")
    return value


_WITH_VALUE: dict[str, Callable[[str], Any]] = {"--out": _read_out, "--on": _read_on, "--device": str, "--dtype": str}


def _dry_run(command: Stage | View, config: Any, options: Options) -> None:
    """Say what a command would cost or do."""
    if isinstance(command, View):
        assert command.predict is not None
        _print(command.predict(config), options.json)
        return
    if command.tell is not None:
        command.tell(config, options.out, as_json=options.json)
        return
    # Only a dry run needs the planner's libraries.
    importlib.import_module("limbeck.scale.commands").tell(command, config, options.out, as_json=options.json)


def _print_checkpoint(checkpoint: Checkpoint, command: Stage, options: Options) -> None:
    if launched().rank:
        return  # of processes that were started together one tells
    if command.shows and not options.json and checkpoint.is_finished:
        # What shows lies above what is shown.
        module, _, name = command.shows.partition(":")
        getattr(importlib.import_module(module), name)(checkpoint)
    manifest = checkpoint.manifest if checkpoint.is_finished else {"metrics": {}, "ledger": {}}
    seconds = {name: manifest["ledger"][name] for name in ("train_seconds",) if name in manifest["ledger"]}
    _print({"out": str(checkpoint.path), **manifest["metrics"], **seconds}, options.json)


def _print_answer(answer: Any, command: View, options: Options) -> None:
    if options.json or command.show is None:
        _print(command.as_dict(answer), options.json)
    else:
        command.show(answer)


def _print(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, default=str))
        return
    for key, value in result.items():
        if not isinstance(value, dict | list):
            print(f"{key}: {value}")

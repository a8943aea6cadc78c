"""Commands as functions: `limbeck.prune(model, neuron_sparsity=0.5, out="runs/b")`.

A function takes the command's fields by the names that its flags have, `out`, and what `How` says; what it returns goes
into the next one. Where a package has a command's name, the package itself is the function; see `lazy.CommandPackage`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from limbeck.commands import COMMANDS
from limbeck.flags import describe, field_docs
from limbeck.stage import Stage, View, call, function_name

__all__ = ["FUNCTIONS", "call", "command_of", "doc_of", "function_of", "signature_of"]

FUNCTIONS = {function_name(name): name for name in COMMANDS}
"""Function -> command."""


def function_of(name: str) -> Callable[..., Any]:
    """The function of a command."""
    command = COMMANDS[name].load()

    def run(*subject: Any, **fields: Any) -> Any:
        return call(command, subject, fields)

    run.__name__ = run.__qualname__ = function_name(name)
    run.__module__ = "limbeck"
    run.__doc__ = doc_of(name, command)
    run.__signature__ = signature_of(command)  # type: ignore[attr-defined]
    return run


def command_of(function: str) -> Stage | View:
    """The command of a function."""
    return COMMANDS[FUNCTIONS[function]].load()


def signature_of(command: Stage | View) -> inspect.Signature:
    """The command's fields; every nested one can be given by name too."""
    subject = [inspect.Parameter(command.subject or "config", inspect.Parameter.POSITIONAL_ONLY, default=None)]
    names = [name for name in command.config.__dataclass_fields__ if name != command.subject]
    named = ["out", *command.takes] if isinstance(command, Stage) else []
    named = [name for name in (*named, *(["dry_run"] if command.predict else [])) if name not in names]
    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in (*names, *named)]
    return inspect.Signature([*subject, *keywords, inspect.Parameter("fields", inspect.Parameter.VAR_KEYWORD)])


def doc_of(name: str, command: Stage | View) -> str:
    """What the command does, and its fields."""
    docs = field_docs(command.config)
    lines = [f"  {field}: {docs.get(field, '')}" for field in command.config.__dataclass_fields__]
    total = len(describe(command.config))
    head = f"{COMMANDS[name].help[:1].upper()}{COMMANDS[name].help[1:]}."
    returns = "a Checkpoint" if isinstance(command, Stage) else "the answer"
    text = [head, "", f"As `limbeck {name}`, whose {total} fields can all be given by name.", "", "Args:", *lines, ""]
    text += [f"Returns: {returns}.", "Raises: ConfigError and other LimbeckErrors, for what the caller can mend."]
    return "\n".join(text)

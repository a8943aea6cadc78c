"""What the `__init__` of a package says: its public names, each imported when it is first asked for (PEP 562), and
whether the package is itself the function of a command (`limbeck.distill(...)`).

Importing a package so costs nothing until it is used.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A package's `__getattr__`, `__dir__` and `__all__`.

    Args:
      package: its `__name__`.
      places: public name -> module below the package that has it, as MODULE:NAME where it has another name there. No
        public name may be that of a module of the package: importing the module would overwrite it.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, inner = places[name].partition(":")
        found = getattr(importlib.import_module(f"{package}.{module}"), inner or name)
        setattr(sys.modules[package], name, found)
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return get, names, sorted(places)


class CommandPackage(types.ModuleType):
    """A package that is also the function of the command of its name, in whatever order it is called and imported."""

    def __call__(self, *subject: Any, **fields: Any) -> Any:
        """Carry out the command; `inspect.signature` and the docs list its fields."""
        library = importlib.import_module("limbeck.library")
        return library.call(library.command_of(_last(self.__name__)), subject, fields)

    @property
    def __signature__(self) -> Any:
        library = importlib.import_module("limbeck.library")
        return library.signature_of(library.command_of(_last(self.__name__)))


def make_callable(package: str) -> None:
    """Let a package be called as the command of its name."""
    sys.modules[package].__class__ = CommandPackage


class FunctionModule(types.ModuleType):
    """A module that is also its function of the same name, for whoever imports the one and means the other."""

    def __call__(self, *arguments: Any, **fields: Any) -> Any:
        """Call the function."""
        return vars(self)[_last(self.__name__)](*arguments, **fields)


def make_function(module: str) -> None:
    """Let a module be called as its function of the same name."""
    sys.modules[module].__class__ = FunctionModule


def _last(dotted: str) -> str:
    return dotted.rpartition(".")[2]

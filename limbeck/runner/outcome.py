"""What a call in another process came to: its value, the user's mistake, or the stack of a defect."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from limbeck.errors import LimbeckError
from limbeck.progress import console


class Outcome(NamedTuple):
    """Made there, unwrapped here."""

    value: Any
    error: Exception | None = None
    stack: str | None = None
    """Where a defect happened; a user's mistake needs none."""

    @classmethod
    def of(cls, function: Callable[..., Any], *arguments: Any) -> Outcome:
        """What calling `function` comes to."""
        try:
            return cls(function(*arguments))
        except (LimbeckError, OSError) as error:
            return cls(None, error)
        except Exception as error:
            return cls(None, LimbeckError(f"{name_of(function)} failed: {error!r}"), traceback.format_exc())

    def unwrap(self) -> Any:
        """The value, or the error raised; the stack of a defect is shown before."""
        if self.stack is not None:
            console.print(self.stack, markup=False, highlight=False)
        if self.error is not None:
            raise self.error
        return self.value


def name_of(function: Callable[..., Any]) -> str:
    """What a message calls `function`."""
    while isinstance(function, functools.partial):
        function = function.func
    return function.__name__.strip("_")

"""Progress bars with time left; on a console that is not a terminal, a line now and then instead."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")
console = Console(stderr=True)
"""Where progress and notes go; results go to standard output."""

_LINE_EVERY_SECONDS = 30.0


def say(text: str) -> None:
    """A line for people, beside the progress."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def hushed(is_hushed: bool) -> Iterator[None]:
    """Print no notes and no progress within the block, as of several processes that do the same but one."""
    before, console.quiet = console.quiet, console.quiet or is_hushed
    try:
        yield
    finally:
        console.quiet = before


class Bar:
    """A running bar; `advance` moves it and may change the note behind it."""

    def __init__(self, description: str, total: float | None, progress: Progress | None) -> None:
        self._description, self._total, self._progress = description, total, progress
        self._done, self._start, self._last_line = 0.0, time.monotonic(), time.monotonic()
        self._task = progress.add_task(description, total=total, note="") if progress else None

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Move on by `amount` units; `note` is shown behind the time left."""
        self._done += amount
        if self._progress is not None and self._task is not None:
            fields: dict[str, Any] = {} if note is None else {"note": note}
            self._progress.update(self._task, advance=amount, **fields)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            console.print(self._line(note or ""), highlight=False)

    def _line(self, note: str) -> str:
        elapsed = time.monotonic() - self._start
        if not self._total or not self._done:
            return f"{self._description}: {self._done:g} {note}"
        left = elapsed * (self._total - self._done) / self._done
        return f"{self._description}: {self._done:g} of {self._total:g}, {left:.0f} s left {note}"


@contextmanager
def bar(description: str, total: float | None = None) -> Iterator[Bar]:
    """A progress bar for the length of the block."""
    if not console.is_terminal:
        yield Bar(description, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(description, total, progress)


def track(iterable: Iterable[Item], description: str, total: float | None = None) -> Iterator[Item]:
    """Iterate with a bar."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    with bar(description, total) as progress:
        for item in iterable:
            yield item
            progress.advance()

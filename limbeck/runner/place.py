"""Where the parts of a job run: here (`local`), or as tasks on a Ray cluster (`ray`); the results are the same.

    map_in_processes   every part in a process of its own: the runs of a sweep
    Prepared.map       parts over something heavy that is made once a process: the shards of a loaded teacher

A part must be repeatable: it looks for what is there already and gives the rest its final name when that is whole. On
this rest both promises: a command that is started again goes on, and a part whose worker died is done by another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

from limbeck.runner.cluster import ray_map
from limbeck.runner.outcome import name_of
from limbeck.runner.process import in_process
from limbeck.stage import Place

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Prepared(Generic[State]):
    """Parts of a job that share something heavy, say a model."""

    prepare: Callable[[], State]
    """Makes what is shared; called once in every process that works on the parts."""
    on: Place = "local"
    cores: int | None = None
    """Cores that a task takes on Ray; None takes what torch computes with, see `cluster`."""

    @cached_property
    def _here(self) -> State:
        return self.prepare()

    def map(self, function: Callable[[State, Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """(item, function(shared, item)) for every item: in this process in order, on Ray as they are done.

        Raises: what a part raises.
        """
        if self.on == "ray":
            yield from ray_map(function, items, prepare=self.prepare, cores=self.cores)
            return
        for item in items:
            yield item, function(self._here, item)


def map_in_processes(
    function: Callable[..., Result], calls: Iterable[Sequence[Any]], on: Place = "local"
) -> Iterator[tuple[Sequence[Any], Result]]:
    """(arguments, function(*arguments)) for every call, each in a fresh process: in order, on Ray as they are done.

    Raises: what a call raises.
    """
    if on == "ray":
        yield from ray_map(partial(_spread, function), calls, own_process=True, name=name_of(function))
        return
    for arguments in calls:
        yield arguments, in_process(function, *arguments)


def _spread(function: Callable[..., Result], _: None, arguments: Sequence[Any]) -> Result:
    return function(*arguments)

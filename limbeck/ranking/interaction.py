"""What is ranked: a request of one member at one moment, its candidates, and what the member did before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from limbeck.errors import DataError

Features = Mapping[str, str]
"""Names and values as they are shown; the order is kept."""
NO_FEATURES: Features = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Interaction:
    """A member met an item: a candidate of a request, or an event of its history."""

    item_id: str
    item: Features
    label: bool
    """Whether the member took the item (clicked, liked)."""
    time: float
    """When, in any unit that grows."""
    probability: float | None = None
    """P(label = yes) where it is known, as in generated data."""
    grade: float | None = None
    """How relevant the item is, at least 0; None: 1 for a yes, 0 for a no."""
    weight: float = 1.0
    """What the row counts in training on labels, above 0."""
    teacher: float | None = None
    """Log-odds that another scorer gave it; None where none did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The candidates that a member is shown at one moment.

    Raises: DataError when the history reaches into the request or a candidate was met before it.
    """

    request_id: str
    member_id: str
    member: Features
    time: float
    history: tuple[Interaction, ...]
    """Oldest first, all of it before `time`."""
    candidates: tuple[Interaction, ...]
    """At least one, none before `time`."""
    query: str = ""
    """What was asked; empty where nothing is."""
    context: Features = field(default_factory=dict)
    """What else is known of the moment: page, device, hour."""

    def __post_init__(self) -> None:
        if not self.candidates:
            raise DataError(f"request {self.request_id}: no candidates; a request ranks at least one item.")
        if any(event.time >= self.time for event in self.history):
            raise DataError(
                f"request {self.request_id}: its history holds an event at or after its time {self.time:g}; a history "
                "may hold only what was known when the request came."
            )
        if any(candidate.time < self.time for candidate in self.candidates):
            raise DataError(f"request {self.request_id}: a candidate is older than its time {self.time:g}.")

    @property
    def end(self) -> float:
        """When the last of its labels became known."""
        return max(candidate.time for candidate in self.candidates)


class LogRow(NamedTuple):
    """One line of an interaction log."""

    member_id: str
    interaction: Interaction
    request_id: str | None = None

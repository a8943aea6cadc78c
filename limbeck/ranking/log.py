"""An interaction log in columns, so that millions of rows have room; a text that many rows share is held once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, overload

import numpy as np
import pyarrow

from limbeck.ranking.interaction import Features, Interaction, LogRow


class Coded(NamedTuple):
    """A column of texts, each held once."""

    codes: np.ndarray
    """int32 [N]; -1 where there is none."""
    values: pyarrow.Array
    """Different texts, by code."""

    @classmethod
    def of(cls, column: pyarrow.DictionaryArray) -> Coded:
        """An Arrow column, null where there is no text."""
        codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return cls(codes.astype(np.int32, copy=False), column.dictionary)

    @classmethod
    def of_texts(cls, texts: Sequence[str | None]) -> Coded:
        """A list, None where there is no text."""
        return cls.of(pyarrow.array(texts, pyarrow.string()).dictionary_encode())

    def text(self, row: int) -> str | None:
        """The text of a row."""
        code = self.codes[row]
        return None if code < 0 else self.values[int(code)].as_py()


Columns = Mapping[str, Coded]
"""Features by the name they are shown by."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Log(Sequence[LogRow]):
    """N interactions."""

    member: Coded
    item: Coded
    label: np.ndarray
    """bool [N]."""
    time: np.ndarray
    """float64 [N]."""
    tie: np.ndarray
    """int [N]: the order of a member's rows of one moment."""
    request: Coded | None = None
    query: Coded | None = None
    grade: np.ndarray | None = None
    """float [N], at least 0."""
    weight: np.ndarray | None = None
    """float [N], above 0."""
    teacher: np.ndarray | None = None
    """float [N], log-odds; NaN where there is none."""
    probability: np.ndarray | None = None
    """float [N]."""
    part: np.ndarray | None = None
    """int [N]: 0 to train, 1 to validate, 2 to test, where the data says so itself."""
    of_member: Columns = field(default_factory=dict)
    of_item: Columns = field(default_factory=dict)
    of_context: Columns = field(default_factory=dict)
    of_candidate: Columns = field(default_factory=dict)
    """What is known of an item at the moment of the request and shown with candidates only (`signals`)."""

    @classmethod
    def of(cls, rows: Sequence[LogRow]) -> Log:
        """A log that stands in a list; rows of one moment keep its order."""
        items = [row.interaction for row in rows]
        names = dict.fromkeys(name for item in items for name in item.item)
        has_ids = any(row.request_id is not None for row in rows)
        return cls(
            member=Coded.of_texts([row.member_id for row in rows]),
            item=Coded.of_texts([item.item_id for item in items]),
            label=np.array([item.label for item in items], dtype=bool),
            time=np.array([item.time for item in items], dtype=np.float64),
            tie=np.arange(len(rows)),
            request=Coded.of_texts([row.request_id for row in rows]) if has_ids else None,
            grade=_known([item.grade for item in items]),
            weight=np.array([item.weight for item in items]),
            probability=_known([item.probability for item in items]),
            of_item={name: Coded.of_texts([item.item.get(name) for item in items]) for name in names},
        )

    def joined(self, members: Mapping[str, Features]) -> Log:
        """With the features that a table of members has, beside those of the rows."""
        names = dict.fromkeys(name for features in members.values() for name in features)
        ids = self.member.values.to_pylist() if names else []
        added = {}
        for name in names:
            by_member = Coded.of_texts([members.get(member, {}).get(name) for member in ids])
            added[name] = Coded(by_member.codes[self.member.codes], by_member.values)
        return replace(self, of_member={**self.of_member, **added}) if names else self

    @overload
    def __getitem__(self, index: int) -> LogRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[LogRow]: ...
    def __getitem__(self, index: int | slice) -> LogRow | list[LogRow]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        request = None if self.request is None else self.request.text(row)
        return LogRow(self.member.text(row) or "", self.interaction(row), request)

    def __len__(self) -> int:
        return len(self.time)

    def candidate(self, row: int) -> Interaction:
        """A row as a candidate."""
        found = self.interaction(row)
        return (
            replace(found, item={**found.item, **features_at(self.of_candidate, row)}) if self.of_candidate else found
        )

    def interaction(self, row: int) -> Interaction:
        """A row as an event, or as a candidate without signals."""
        teacher = None if self.teacher is None or np.isnan(self.teacher[row]) else float(self.teacher[row])
        return Interaction(
            item_id=self.item.text(row) or "",
            item=features_at(self.of_item, row),
            label=bool(self.label[row]),
            time=float(self.time[row]),
            probability=None if self.probability is None else float(self.probability[row]),
            grade=None if self.grade is None else float(self.grade[row]),
            weight=1.0 if self.weight is None else float(self.weight[row]),
            teacher=teacher,
        )


def features_at(columns: Columns, row: int) -> Features:
    """The features of a row that has them."""
    found = {name: column.text(row) for name, column in columns.items()}
    return {name: value for name, value in found.items() if value is not None}


def _known(values: Sequence[float | None]) -> np.ndarray | None:
    """The values, or None where one is not known."""
    return None if not values or None in values else np.array(values, dtype=np.float64)

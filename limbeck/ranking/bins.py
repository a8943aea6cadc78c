"""Numbers as words: each value the number of its bin, which a small model reads where digits would be lost on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow

from limbeck.errors import ConfigError, DataError
from limbeck.ranking.log import Coded, Columns
from limbeck.ranking.split import Split

ALL_NUMBERS = "*"
"""Name that stands for every feature whose values are all numbers."""


def with_bins(split: Split, bins: Mapping[str, int]) -> Split:
    """The same requests with the values of some features replaced by b0, b1, ...

    Bins have equal shares of the training rows.

    Args:
      split: of a log.
      bins: number of bins by feature; `*` for all features that are numbers.
    Raises: ConfigError for a feature that is not there; DataError for a value that is no number.
    """
    train = split.of_log()[0]
    log, rows = train.log, train.rows
    kinds = {"of_member": log.of_member, "of_context": log.of_context, "of_item": log.of_item}
    names = [name for columns in kinds.values() for name in columns]
    for name in bins:
        if name != ALL_NUMBERS and name not in names:
            raise ConfigError(f"data.bins: no feature {name!r}; there are {', '.join(names)}")
    member, context, item = (_binned(columns, bins, rows) for columns in kinds.values())
    return split.over(replace(log, of_member=member, of_context=context, of_item=item))


def _binned(columns: Columns, bins: Mapping[str, int], rows: np.ndarray) -> Columns:
    found = dict(columns)
    for name, column in columns.items():
        values = _numbers(column)
        if name in bins and np.isnan(values).any():
            bad = column.values[int(np.flatnonzero(np.isnan(values))[0])].as_py()
            raise DataError(f"data.bins: {name} is {bad!r} in a row, no number; leave it out of the bins.")
        if name in bins or (ALL_NUMBERS in bins and not np.isnan(values).any()):
            found[name] = _column(column, values, rows, bins.get(name, bins.get(ALL_NUMBERS, 1)))
    return found


def _column(column: Coded, values: np.ndarray, rows: np.ndarray, bins: int) -> Coded:
    known = column.codes[rows]
    edges = np.unique(np.quantile(values[known[known >= 0]], np.linspace(0, 1, bins + 1)[1:-1], method="inverted_cdf"))
    by_value = np.searchsorted(edges, values, side="right").astype(np.int32)
    codes = np.where(column.codes < 0, -1, by_value[np.maximum(column.codes, 0)]).astype(np.int32)
    return Coded(codes, pyarrow.array([f"b{number}" for number in range(len(edges) + 1)]))


def _numbers(column: Coded) -> np.ndarray:
    """float [U]: the different values; NaN for one that is no number."""

    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return np.nan

    return np.array([number(text) for text in column.values.to_pylist()])

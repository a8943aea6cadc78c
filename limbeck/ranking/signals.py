"""Counts and collaborative scores as words that a small model can read, from what was known at the moment.

    rate       share of yes among the item's labels so far, as one of ten words; `seen`, how many there were
    member     the same of the member's own labels, in `liked` and `events`
    factors    log-odds of factor models that saw earlier requests only, in `fit`

A word is a number of a bin: a language model learns what r7 means, and never has to compare 0.0731 with 0.0729. Each
value comes with its evidence, because 1 of 1 is not 900 of 900. Labels of a held-out part are never counted; a training
request reads models of earlier blocks of the training part, so that what it sees is as good as what a new one will see.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow

from limbeck.ranking.arrays import Arrays, arrays_of
from limbeck.ranking.factors import EPOCHS, FACTORS, fit_factors
from limbeck.ranking.kept import keep
from limbeck.ranking.log import Coded, Log
from limbeck.ranking.request import LogRequests
from limbeck.ranking.split import Split
from limbeck.stores import cache_directory

SignalName = Literal["rate", "member", "factors"]
PRIOR = 5.0
"""Labels of the mean kind that every rate begins with."""
_RATE_BINS, _FACTOR_BINS = 10, 24
_BLOCKS, _MODELS = 5, 3
"""Parts of the training requests in time, and factor models whose mean counts."""


def with_signals(split: Split, names: tuple[SignalName, ...], seed: int = 0) -> Split:
    """The same requests with the words of these signals among the features of candidates and members.

    Args:
      split: of a log, in the order of time within its parts.
      names: which signals.
      seed: of the factor models.
    """
    parts = split.of_log()
    log = parts[0].log
    items: dict[str, Coded] = {}
    members: dict[str, Coded] = {}
    if "rate" in names:
        items |= _rates(log, parts)
    if "factors" in names:
        items |= {"fit": _factors(log, parts, seed)}
    if "member" in names:
        members |= _members(log, parts)
    candidate, member = {**log.of_candidate, **items}, {**log.of_member, **members}
    return split.over(replace(log, of_candidate=candidate, of_member=member))


def counts_before(
    items: np.ndarray, times: np.ndarray, labels: np.ndarray, asked_items: np.ndarray, asked_times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many of an item's labels were known before a moment, and how many of them were a yes.

    Args:
      items, times, labels: int, float and bool [N], what is known and when.
      asked_items, asked_times: int and float [M].
    Returns: int [M] each; a label of the moment itself does not count.
    """
    moments = np.unique(times)
    width = len(moments) + 1
    keys = items.astype(np.int64) * width + np.searchsorted(moments, times)
    order = np.argsort(keys, kind="stable")
    known, yes = keys[order], np.concatenate([[0], np.cumsum(labels[order])])
    start = np.searchsorted(known, asked_items.astype(np.int64) * width)
    end = np.searchsorted(known, asked_items.astype(np.int64) * width + np.searchsorted(moments, asked_times))
    return end - start, yes[end] - yes[start]


def smoothed(yes: np.ndarray, shown: np.ndarray, mean: float) -> np.ndarray:
    """(yes + PRIOR mean) / (shown + PRIOR): a rate that starts at the mean and leaves it with evidence."""
    return (yes + PRIOR * mean) / (shown + PRIOR)


def _rates(log: Log, parts: list[LogRequests]) -> dict[str, Coded]:
    train = parts[0].rows
    asked = np.concatenate([part.rows for part in parts])
    moments = np.concatenate([part.times[part.owners] for part in parts])
    shown, yes = counts_before(log.item.codes[train], log.time[train], log.label[train], log.item.codes[asked], moments)
    rates = smoothed(yes, shown, float(log.label[train].mean()))
    return {
        "rate": _words(log, asked, "r", _binned(rates, rates[: len(train)], _RATE_BINS)),
        "seen": _words(log, asked, "n", _evidence(shown)),
    }


def _members(log: Log, parts: list[LogRequests]) -> dict[str, Coded]:
    counts = [part.own_counts for part in parts]
    shown, yes = (np.concatenate([pair[side] for pair in counts]) for side in (0, 1))
    mean = float(log.label[parts[0].rows].mean())
    rates, asked = smoothed(yes, shown, mean), np.concatenate([part.rows for part in parts])
    sizes = np.concatenate([part.sizes for part in parts])
    binned = _binned(rates, rates[: len(parts[0])], _RATE_BINS)
    return {
        "liked": _words(log, asked, "m", np.repeat(binned, sizes)),
        "events": _words(log, asked, "k", np.repeat(_evidence(shown), sizes)),
    }


def _factors(log: Log, parts: list[LogRequests], seed: int) -> Coded:
    """The first block of the training part has no earlier one to be scored by, and no word."""
    arrays, num_items = arrays_of(parts)
    values = _kept_scores(arrays, num_items, seed)
    known = values[: len(arrays[0].items)]
    binned = _binned(values, known[~np.isnan(known)], _FACTOR_BINS)
    return _words(log, np.concatenate([part.rows for part in parts]), "f", np.where(np.isnan(values), -1, binned))


def _kept_scores(arrays: list[Arrays], num_items: int, seed: int) -> np.ndarray:
    """Computed once for the same arrays: every stage that reads the data asks for them."""
    digest = hashlib.sha256(repr((num_items, seed, _BLOCKS, _MODELS, FACTORS, EPOCHS)).encode())
    for values in (values for part in arrays for values in part):
        digest.update(np.ascontiguousarray(values).tobytes())
    kept = cache_directory("signals") / f"{digest.hexdigest()[:16]}.npy"
    if kept.is_file():
        return np.load(kept, allow_pickle=False)
    found = _factor_scores(arrays, num_items, seed)
    keep(kept, lambda path: np.save(path, found))
    return found


def _factor_scores(arrays: list[Arrays], num_items: int, seed: int) -> np.ndarray:
    """float [M]: mean log-odds of all candidates of the three parts; NaN in the first block."""
    train, validation, test = arrays
    cuts = np.linspace(0, train.num_requests, _BLOCKS + 1).astype(int)
    scores = [np.full(int((train.owners < cuts[1]).sum()), np.nan)]
    asked = [(int(end), [train.part(int(end), int(after))]) for end, after in itertools.pairwise(cuts[1:])]
    for end, read in [*asked, (train.num_requests, [validation, test])]:
        inner = end - end // 10
        fitted = [
            fit_factors(train.part(0, inner), train.part(inner, end), num_items, seed + number)
            for number in range(_MODELS)
        ]
        scores += [np.mean([model.scores(part) for model in fitted], axis=0) for part in read]
    return np.concatenate(scores)


def _binned(values: np.ndarray, known: np.ndarray, bins: int) -> np.ndarray:
    """int: number of the bin of each value; bins have equal shares of the known values."""
    if not len(known):
        return np.zeros(len(values), dtype=np.int64)
    edges = np.unique(np.quantile(known, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.searchsorted(edges, values, side="right")


def _evidence(counts: np.ndarray) -> np.ndarray:
    """int: 0 for none, then one more for every doubling."""
    return np.where(counts > 0, np.floor(np.log2(np.maximum(counts, 1))).astype(np.int64) + 1, 0)


def _words(log: Log, rows: np.ndarray, letter: str, bins: np.ndarray) -> Coded:
    """A column with the word of a bin in these rows, and nothing in the others and where the bin is -1."""
    codes = np.full(len(log), -1, dtype=np.int32)
    codes[rows] = bins
    return Coded(codes, pyarrow.array([f"{letter}{number}" for number in range(int(bins.max(initial=0)) + 1)]))

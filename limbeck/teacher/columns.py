"""Stored top-k targets as columns that other trainers read, and back: pure functions, one sequence at a time.

    parquet     input_ids, target_positions, target_ids, target_log_probs, target_log_tail: what a cache holds, ragged
    distillkit  input_ids, labels, token_ids, top_values: DistillKit's raw top-k rows (a61c2e7)
    axolotl     input_ids, attention_mask, labels, target_token_ids, target_logprobs, target_mask: a tokenised dataset
                for axolotl's KD plugin (067b021)

The last two have a row for every token: row t is the teacher's distribution of token t + 1, as the logits at t are.
Both leave out what is not stored, by `labels` and by `target_mask`. DistillKit counts row t where `labels[t]` is not
-100, so its labels mark the rows, one place before the tokens that they predict; a cross-entropy term there reads them
one place late. Axolotl's loader normalises the kept entries, so that is what its column has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from limbeck.teacher.codec import ENTRY_LEVELS, MOST_ENTRIES, TAIL_LEVELS, Entries, levels_of

Format = Literal["parquet", "distillkit", "axolotl"]
ABSENT = -1e9
"""The log-probability of an entry that is not there: its probability is 0, and 0 times it is no NaN."""
IGNORED = -100


class Sequence(NamedTuple):
    """Token ids with what is stored of them."""

    ids: np.ndarray
    """int [T]."""
    positions: np.ndarray
    """int [n], increasing: the tokens that the rows predict, from 1 on."""
    counts: np.ndarray
    """int [n]: entries of each row."""
    entry_ids: np.ndarray
    """int [E], row behind row."""
    log_probs: np.ndarray
    """float [E]."""
    log_tail: np.ndarray
    """float [n]: log of what the entries leave over."""

    def kept(self, top_k: int) -> Sequence:
        """The likeliest `top_k` entries of every row; what they leave over is in the tail."""
        if self.counts.max(initial=0) <= top_k:
            return self
        rows = np.repeat(np.arange(len(self.counts)), self.counts)
        order = np.lexsort((-self.log_probs, rows))
        rank = np.arange(len(rows)) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        chosen = np.sort(order[rank < top_k])
        mass = np.bincount(rows[chosen], np.exp(self.log_probs[chosen]), len(self.counts))
        with np.errstate(divide="ignore"):
            tail = np.log(np.clip(1 - mass, 0, 1))
        counts = np.minimum(self.counts, top_k)
        return Sequence(self.ids, self.positions, counts, self.entry_ids[chosen], self.log_probs[chosen], tail)


def entries_of(sequence: Sequence) -> Entries:
    """In the cache's own form: ids sorted in a row, probabilities rounded to its levels, at most `MOST_ENTRIES`."""
    sequence = sequence.kept(MOST_ENTRIES)
    rows = np.repeat(np.arange(len(sequence.counts)), sequence.counts)
    order = np.lexsort((sequence.entry_ids, rows))
    levels = np.maximum(1, levels_of(np.exp(sequence.log_probs[order]), ENTRY_LEVELS))
    tails = levels_of(np.exp(sequence.log_tail), TAIL_LEVELS)
    return Entries(sequence.counts, sequence.entry_ids[order].astype(np.int64), levels, tails)


def _to_parquet(sequence: Sequence, width: int) -> dict[str, Any]:
    bounds = np.cumsum(sequence.counts)[:-1]
    return {
        "input_ids": sequence.ids,
        "target_positions": sequence.positions,
        "target_ids": np.split(sequence.entry_ids, bounds),
        "target_log_probs": np.split(sequence.log_probs, bounds),
        "target_log_tail": sequence.log_tail,
    }


def _table(sequence: Sequence, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities [T width] of the rows in their places, `ABSENT` elsewhere."""
    rows = np.repeat(sequence.positions - 1, sequence.counts)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(sequence.counts) - sequence.counts, sequence.counts)
    ids = np.zeros((len(sequence.ids), width), np.int32)
    log_probs = np.full(ids.shape, ABSENT, np.float32)
    ids[rows, columns], log_probs[rows, columns] = sequence.entry_ids, sequence.log_probs
    return ids, log_probs


def _labels(sequence: Sequence, places: np.ndarray) -> np.ndarray:
    labels = np.full(len(sequence.ids), IGNORED, np.int32)
    labels[places] = sequence.ids[places]
    return labels


def _to_distillkit(sequence: Sequence, width: int) -> dict[str, Any]:
    ids, log_probs = _table(sequence, width)
    labels = _labels(sequence, sequence.positions - 1)
    return {"input_ids": sequence.ids, "labels": labels, "token_ids": list(ids), "top_values": list(log_probs)}


def _to_axolotl(sequence: Sequence, width: int) -> dict[str, Any]:
    rows = np.repeat(np.arange(len(sequence.counts)), sequence.counts)
    mass = np.bincount(rows, np.exp(sequence.log_probs), len(sequence.counts))
    ids, log_probs = _table(sequence._replace(log_probs=sequence.log_probs - np.log(mass)[rows]), width)
    return {
        "input_ids": sequence.ids,
        "attention_mask": np.ones(len(sequence.ids), np.int8),
        "labels": _labels(sequence, sequence.positions),
        "target_token_ids": list(ids),
        "target_logprobs": list(log_probs),
        "target_mask": list((log_probs > ABSENT / 2).astype(np.int8)),
    }


WRITERS: dict[str, Callable[[Sequence, int], dict[str, Any]]] = {
    "parquet": _to_parquet,
    "distillkit": _to_distillkit,
    "axolotl": _to_axolotl,
}
"""writer(sequence, entries of the widest row) -> columns of one row of the file."""


def _from_parquet(row: Mapping[str, Any]) -> Sequence:
    counts = np.array([len(ids) for ids in row["target_ids"]], np.int64)
    empty: list[np.ndarray] = [np.empty(0)]
    return Sequence(
        np.asarray(row["input_ids"]),
        np.asarray(row["target_positions"], np.int64),
        counts,
        np.concatenate([*row["target_ids"], *empty]).astype(np.int64),
        np.concatenate([*row["target_log_probs"], *empty]),
        np.asarray(row["target_log_tail"], np.float64),
    )


def _from_table(ids: Any, entry_ids: np.ndarray, log_probs: np.ndarray, is_entry: np.ndarray) -> Sequence:
    rows = np.flatnonzero(is_entry.any(1))
    rows = rows[rows + 1 < len(ids)]
    kept = is_entry[rows]
    mass = np.where(kept, np.exp(log_probs[rows]), 0.0).sum(1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.clip(1 - mass, 0, 1))
    return Sequence(
        np.asarray(ids), rows + 1, kept.sum(1), entry_ids[rows][kept].astype(np.int64), log_probs[rows][kept], tail
    )


def _from_distillkit(row: Mapping[str, Any]) -> Sequence:
    log_probs = np.stack(list(row["top_values"])).astype(np.float64)
    is_entry = log_probs > ABSENT / 2
    if row.get("labels") is not None:
        is_entry &= (np.asarray(row["labels"]) != IGNORED)[:, None]
    return _from_table(row["input_ids"], np.stack(list(row["token_ids"])), log_probs, is_entry)


def _from_axolotl(row: Mapping[str, Any]) -> Sequence:
    log_probs = np.stack(list(row["target_logprobs"])).astype(np.float64)
    is_entry = np.stack(list(row["target_mask"])).astype(bool)
    return _from_table(row["input_ids"], np.stack(list(row["target_token_ids"])), log_probs, is_entry)


READERS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Sequence]]] = {
    "parquet": (("input_ids", "target_positions", "target_ids", "target_log_probs", "target_log_tail"), _from_parquet),
    "distillkit": (("input_ids", "token_ids", "top_values"), _from_distillkit),
    "axolotl": (("input_ids", "target_token_ids", "target_logprobs", "target_mask"), _from_axolotl),
}
"""Which columns a format needs, and what reads a row of them."""

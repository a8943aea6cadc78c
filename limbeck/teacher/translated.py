"""Score a shard for a student with another tokenizer: the teacher reads its own tokens, the student's are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.cost.memory import HEAD_ROWS
from limbeck.ledger import Ledger
from limbeck.models.anatomy import head_of
from limbeck.models.parts import Head
from limbeck.teacher.cache import CacheConfig, Spec
from limbeck.teacher.codec import ENTRY_LEVELS, TAIL_LEVELS, Entries, encode, levels_of
from limbeck.teacher.reading import Reading
from limbeck.teacher.score import forward_groups, hidden_before
from limbeck.teacher.shard import Stored, write_shard
from limbeck.teacher.vocabulary_map import KINDS, VocabularyMap

_FLOOR = 1 / 16
"""Of `min_probability`: a teacher's token below it stays open; several above it may add up to an entry."""


def score_translated(
    model: Any,
    spec: Spec,
    vocabularies: VocabularyMap,
    members: Sequence[Stored],
    readings: Sequence[Reading],
    path: Path,
    ledger: Ledger,
) -> None:
    """Run the teacher over the `readings` of `members`, whose order is that of the shard, and write it at `path`."""
    records: list[bytes] = []
    flops_before = ledger.flops["teacher"]
    tally = dict.fromkeys(COUNTS, 0.0)
    asked = [
        Stored(reading.ids, reading.positions(member.positions))
        for member, reading in zip(members, readings, strict=True)
    ]
    for group in forward_groups(asked):
        with ledger.phase("teacher"):
            hidden = hidden_before(model, spec, group, ledger)
            for one, states in zip(group, hidden.split([int(one.positions.sum()) for one in group]), strict=True):
                place = len(records)
                rows = _Rows(head_of(model).rows(slice(spec.teacher_vocab)), states, one.positions)
                entries = _entries(vocabularies, members[place], readings[place], rows, spec.config, tally)
                records.append(encode(entries, spec.vocab_size))
    sample = {"rows": tally["with_target"], "entries": tally.pop("entries"), "mass": tally.pop("mass"), "kl": None}
    facts = {
        "sample": sample,
        "translation": {**tally, "vocabulary_matched": vocabularies.matched},
        "spec": spec.identity,
        "flops": ledger.flops["teacher"] - flops_before,
    }
    write_shard(path, members, records, spec.vocab_size, facts)


COUNTS = ("with_target", "same_start", "over_several", *KINDS, "entries", "mass")
"""Sums over the stored positions: how many have a target, begin where a token of the teacher's does, and lie in more
than one of them; mass by kind."""


class _Rows:
    """The teacher's log-probabilities [V] at places of its sequence, asked for from left to right, made in chunks."""

    def __init__(self, head: Head, states: Tensor, positions: np.ndarray) -> None:
        self._head, self._states, self._row = head, states, np.cumsum(positions) - 1
        self._chunks: dict[int, np.ndarray] = {}

    @torch.inference_mode()
    def at(self, place: int) -> np.ndarray:
        chunk, row = divmod(int(self._row[place]), HEAD_ROWS)
        if chunk not in self._chunks:
            # A token of the student's may begin in the chunk before.
            self._chunks = {number: rows for number, rows in self._chunks.items() if number == chunk - 1}
            states = self._states[chunk * HEAD_ROWS : (chunk + 1) * HEAD_ROWS]
            self._chunks[chunk] = self._head.logits(states).float().log_softmax(-1).cpu().numpy()
        return self._chunks[chunk][row]


def _entries(
    vocabularies: VocabularyMap,
    member: Stored,
    reading: Reading,
    rows: _Rows,
    config: CacheConfig,
    tally: dict[str, float],
) -> Entries:
    """What is stored of a sequence; adds to the sums."""
    parts = []
    for place in np.flatnonzero(member.positions).tolist():
        target = int(member.ids[place])
        passage = reading.passage(place, target)
        if passage is None:
            parts.append(unknown(target))
            continue
        first = int(reading.spans.first[place])
        passed = [rows.at(first + depth) for depth in range(len(passage.tokens))]
        found, kinds = vocabularies.project(passed, passage, config.min_probability * _FLOOR)
        entries = keep_found(found, config)
        parts.append(entries)
        for kind, mass in kinds.items():
            tally[kind] += mass
        tally["with_target"] += 1
        tally["same_start"] += passage.skipped == 0
        tally["over_several"] += len(passage.tokens) > 1
        tally["entries"] += len(entries.ids)
        tally["mass"] += 1 - float(np.square(entries.tails[0] / TAIL_LEVELS))
    return Entries.join(parts)


def keep_found(found: Mapping[int, float], config: CacheConfig) -> Entries:
    """One row of the entries that have at least `min_probability`, as `score.keep` chooses them; the rest is tail."""
    ids, probs = np.array(list(found), np.int64), np.array(list(found.values()))
    order = np.argsort(-probs, kind="stable")[: config.top_k]
    kept = order[: max(1, int((probs[order] >= config.min_probability).sum()))]
    kept = kept[np.argsort(ids[kept])]
    tail = max(0.0, 1.0 - float(probs[kept].sum()))
    return Entries(
        np.array([len(kept)]),
        ids[kept],
        np.maximum(1, levels_of(probs[kept], ENTRY_LEVELS)),
        levels_of(np.array([tail]), TAIL_LEVELS),
    )


def unknown(token: int) -> Entries:
    """One row of which the teacher says nothing: all is tail, so that every student agrees with it."""
    return Entries(np.array([1]), np.array([token]), np.array([0]), np.array([TAIL_LEVELS]))

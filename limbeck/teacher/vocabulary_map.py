"""From a teacher's distributions over its next token to distributions over the student's next token.

Both read the same bytes. Let the student be at a byte b that lies in the teacher's token u_0, behind r bytes of it that
both have read, and let u_0 u_1 ... u_d be the teacher's tokens that hold the student's next token s*.

1. The teacher's words at u_0 are those which begin with the r bytes: p(u) / sum of p over them. With r = 0, all.
2. A token u != u_0 says what bytes follow b, and so which token the student writes first (`shares`).
3. u_0 itself says more: if s* ends inside it, its mass is s*'s. If not, the mass goes on to u_1, whose distribution the
   teacher gives behind u_0, and is shared out in the same way: the chain rule along the text that is there.

So s* has the probability that the teacher gives to the text, tokens that the teacher splits (numbers, say) have that of
their parts, and none is 0 because it has no partner. Tokens with a partner of the same bytes go there whole; between
equal tokenizers everything does, and the result is the teacher's distribution.

`shares` of some bytes, what the teacher has said behind b: the token that spells them; or, of one that is longer than
any of the student's, the one that the student's tokenizer begins them with. Where the traces have them at the same
place (`observe`), the tokens that the student begins there count, each as often as it does, beside one of the above:
the teacher's "7" is then "7", "71", "712", as the numbers of the traces are. Bytes that the student cannot write and
tokens that stand for no text stay open: their mass is no entry's, and joins the tail.

Own method. GOLD (TRL) compares sorted probabilities of tokens without a partner; X-Token (arXiv 2605.21699) projects
by a table that is learnt or made by rule, and pays for the alignment in every step.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from limbeck.teacher.spelling import Spelling

Shares = tuple[tuple[int, float], ...]
"""Tokens of the student and what share of a mass each gets; together 1, or 0 where there is none."""
KINDS = ("exact", "shorter", "longer")
"""Of mass: the student's token spells all that the teacher has said, begins it, or goes on behind it."""


class Passage(NamedTuple):
    """Where a token of the student's stands in the teacher's text."""

    tokens: Sequence[int]
    """The teacher's tokens u_0 ... u_d that hold it."""
    skipped: int
    """Bytes of u_0 before it."""
    target: int
    """s*, the student's token."""


class VocabularyMap:
    """Between the vocabularies of a teacher and a student."""

    def __init__(self, teacher: Spelling, student: Spelling) -> None:
        self.teacher, self.student = teacher, student
        self._partners = [self._partner(token) for token in _by_id(teacher)]
        spelled = sorted((text, token) for token, text in enumerate(teacher.table) if text)
        self._texts, self._order = [text for text, _ in spelled], np.array([token for _, token in spelled])
        self._seen: dict[bytes, Counter[int]] = defaultdict(Counter)
        self._shares: dict[tuple[bytes, int | None], Shares] = {}

    @property
    def matched(self) -> float:
        """Share of the teacher's tokens with a partner in the student's vocabulary."""
        return sum(partner is not None for partner in self._partners) / len(self._order)

    def _partner(self, name: str | None) -> int | None:
        """The student's token that spells the same, one of the same name if there are several."""
        if name is None:
            return None
        token, named = self.teacher.names[name], self.student.names.get(name)
        if named is not None and self.student.table[named] == self.teacher.table[token]:
            return named
        return None if token in self.teacher.controls else self.student.by_bytes.get(self.teacher.table[token])

    def observe(self, passages: Iterable[Passage]) -> None:
        """Count which token the student begins where the teacher has said some bytes."""
        for passage in passages:
            text = b""
            for depth, token in enumerate(passage.tokens):
                text += self.teacher.table[token][0 if depth else passage.skipped :]
                self._seen[text][passage.target] += 1
        self._shares.clear()

    def shares(self, text: bytes, partner: int | None = None) -> Shares:
        """Which tokens the student begins where the teacher has said `text`; `partner`: the token that spells it."""
        known = self._shares.get((text, partner))
        if known is None:
            expected = self.student.begin(text) if partner is None else partner
            counts = Counter(self._seen.get(text, ()))
            if expected is not None:
                counts[expected] += 1
            total = counts.total()
            known = self._shares[text, partner] = tuple((token, count / total) for token, count in counts.items())
        return known

    def project(
        self, rows: Sequence[np.ndarray], passage: Passage, floor: float = 0.0
    ) -> tuple[dict[int, float], dict[str, float]]:
        """The distribution of the student's next token.

        Args:
          rows: float [V] each, the teacher's log-probabilities at every token of the passage.
          floor: mass of a teacher's token below which it stays open, but for the text's own.
        Returns: probabilities by token, their sum at most 1; and that sum by `KINDS`.
        """
        found: dict[int, float] = defaultdict(float)
        kinds = dict.fromkeys(KINDS, 0.0)
        log_weight, text = 0.0, b""
        for depth, (row, own) in enumerate(zip(rows, passage.tokens, strict=True)):
            skipped = 0 if depth else passage.skipped
            chosen, log_total = self._continuing(row, own, skipped)
            log_weight -= log_total
            for token, log_prob in _above(row, chosen, floor, log_weight):
                if token != own:
                    self._give(found, kinds, text, token, skipped, math.exp(log_prob + log_weight))
            log_weight += float(row[own])
            text += self.teacher.table[own][skipped:]
        self._add(found, kinds, passage.target, math.exp(log_weight), len(text))
        return found, kinds

    def _continuing(self, row: np.ndarray, own: int, skipped: int) -> tuple[np.ndarray | None, float]:
        """The tokens that begin with the first `skipped` bytes of `own` and go on, None for all; the log of their
        mass."""
        if not skipped:
            return None, 0.0
        prefix = self.teacher.table[own][:skipped]
        low = bisect_right(self._texts, prefix)
        high = bisect_left(self._texts, prefix + b"\xff", lo=low)  # no text goes on with this byte
        chosen = self._order[low:high]
        logs = row[chosen].astype(np.float64)
        return chosen, float(np.logaddexp.reduce(logs))

    def _give(
        self, found: dict[int, float], kinds: dict[str, float], text: bytes, token: int, skipped: int, mass: float
    ) -> None:
        """Share out the mass of a teacher's token that is not the text's own."""
        is_whole = not text and not skipped
        if token in self.teacher.controls and not (is_whole and self._partners[token] is not None):
            return
        text += self.teacher.table[token][skipped:]
        for target, share in self.shares(text, self._partners[token] if is_whole else None):
            self._add(found, kinds, target, mass * share, len(text))

    def _add(self, found: dict[int, float], kinds: dict[str, float], token: int, mass: float, num_bytes: int) -> None:
        found[token] += mass
        length = len(self.student.table[token])
        kinds["exact" if length == num_bytes else "shorter" if length < num_bytes else "longer"] += mass


def _by_id(spelling: Spelling) -> list[str | None]:
    names: list[str | None] = [None] * len(spelling.table)
    for name, token in spelling.names.items():
        names[token] = name
    return names


def _above(row: np.ndarray, chosen: np.ndarray | None, floor: float, log_weight: float) -> Iterable[tuple[int, float]]:
    """Tokens with their log-probabilities, of those that weigh at least `floor`."""
    bound = math.log(floor) - log_weight if floor > 0 else -math.inf
    values = row if chosen is None else row[chosen]
    places = np.flatnonzero((values >= bound) & (values > -math.inf))
    tokens = places if chosen is None else chosen[places]
    return zip(tokens.tolist(), values[places].tolist(), strict=True)

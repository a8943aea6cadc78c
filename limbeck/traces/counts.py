"""What became of the records of a source: counted while they are read, and told on the console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from limbeck.progress import console
from limbeck.traces.record import Parsed


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCounts:
    """What became of the records of a source; a record may hold several replies, and each counts."""

    read: int
    """Replies seen."""
    kept: int
    """Traces handed on, those with a problem among them."""
    skipped: int
    """Replies left out."""
    kept_bad: int
    """Traces kept in spite of a problem."""
    reasons: Mapping[str, int]
    """How many replies had each problem, skipped or kept."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """How many replies something was done to: joined, taken off, passed over."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Columns that are no part of the traces, and in how many replies they are set."""
    files: list[str] = field(default_factory=list)
    """What is said about whole files."""

    def lines(self) -> list[str]:
        """What a user should know of it, one line each."""
        found = list(self.files)
        if self.reasons:
            causes = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
            done = " and ".join(
                f"{count} {word}" for count, word in ((self.skipped, "left out"), (self.kept_bad, "kept")) if count
            )
            found.append(f"{sum(self.reasons.values())} of {self.read} replies are bad, {done}: {causes}")
        found += [f"{count} of {self.read} replies: {note}" for note, count in self.notes.items()]
        if self.unread:
            columns = ", ".join(f"{name} ({count})" for name, count in list(self.unread.items())[:12])
            found.append(f"columns that are no part of the text, with the replies that have them: {columns}")
        return found


class Tally:
    """Counts replies as they are read."""

    def __init__(self) -> None:
        self.read, self.skipped, self.kept_bad = 0, 0, 0
        self.first_problem = ""
        self.about_files: list[str] = []
        self._reasons: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()

    def count(self, where: str, parsed: Parsed, *, keep_bad: bool) -> bool:
        """Count one reply; whether its trace is used."""
        self.read += 1
        self._notes.update(parsed.notes)
        self._unread.update(dict.fromkeys(parsed.unread, 1))
        told = parsed.problem or (parsed.notes[-1] if parsed.trace is None and parsed.notes else None)
        if told is not None:
            self.first_problem = self.first_problem or f"{where}: {told}"
        if parsed.problem is not None:
            self._reasons[parsed.problem.partition(":")[0]] += 1
        is_used = parsed.trace is not None and (parsed.problem is None or keep_bad)
        self.skipped += not is_used
        self.kept_bad += is_used and parsed.problem is not None
        return is_used

    def counts(self, kept: int) -> ReadCounts:
        """What was counted."""
        return ReadCounts(
            read=self.read,
            kept=kept,
            skipped=self.skipped,
            kept_bad=self.kept_bad,
            reasons=dict(self._reasons),
            notes=dict(self._notes),
            unread=dict(self._unread),
            files=self.about_files,
        )


def tell(lines: Iterable[str]) -> None:
    """Print lines as notes to the console."""
    for line in lines:
        console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)

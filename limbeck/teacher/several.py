"""What is asked for targets, and how several teachers answer as one: the KD term is sum_i w_i D(p_i, q)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from limbeck.ledger import Ledger
from limbeck.models.anatomy import NOTHING_GIVEN, Given
from limbeck.teacher.targets import OneTeacherTargets, SeveralTargets, TeacherTargets
from limbeck.traces.batch import Batch, Example


class Teacher(Protocol):
    """Gives targets at the supervised positions of a batch."""

    @property
    def in_step(self) -> bool:
        """Whether all processes must ask together, because each holds a part of it."""
        ...

    def targets(
        self, batch: Batch, examples: Sequence[Example], rows: Tensor, ledger: Ledger, given: Given = NOTHING_GIVEN
    ) -> TeacherTargets:
        """Targets for the tokens at flat indices `rows` of the batch, in that order; charges its cost to the ledger.

        `given` is what is known of the batch and of these rows, for a model on an accelerator.
        """
        ...


class OneTeacher(Teacher, Protocol):
    """A teacher that is not several."""

    def targets(
        self, batch: Batch, examples: Sequence[Example], rows: Tensor, ledger: Ledger, given: Given = NOTHING_GIVEN
    ) -> OneTeacherTargets: ...


@dataclass(frozen=True, slots=True)
class SeveralTeachers:
    """Asks every teacher in turn."""

    teachers: tuple[OneTeacher, ...]
    weights: tuple[float, ...]

    @property
    def in_step(self) -> bool:
        """Whether all processes must ask together."""
        return any(teacher.in_step for teacher in self.teachers)

    def targets(
        self, batch: Batch, examples: Sequence[Example], rows: Tensor, ledger: Ledger, given: Given = NOTHING_GIVEN
    ) -> SeveralTargets:
        """The targets of all teachers for the tokens at flat indices `rows` of the batch."""
        parts = tuple(teacher.targets(batch, examples, rows, ledger, given) for teacher in self.teachers)
        return SeveralTargets(parts, self.weights)

"""One teacher a source: which one a micro-batch is for. Micro-batches hold examples of one teacher alone (`plan`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from limbeck.distill.config import DistillConfig
from limbeck.distill.pair import load_teacher
from limbeck.distill.parallel import Ranks
from limbeck.teacher.several import Teacher
from limbeck.traces.batch import Example


@dataclass(frozen=True, slots=True)
class TeachersBySource:
    """The teachers of a run whose sources have their own."""

    teachers: tuple[Teacher, ...]
    numbers: tuple[int, ...]
    """Which of them each source has (`DistillConfig.teacher_numbers`)."""
    in_step = False
    """Every process asks when it likes: teachers of sources are not split over processes."""

    def of(self, examples: Sequence[Example]) -> Teacher:
        """The teacher of some examples, which all have the same one."""
        (number,) = {self.numbers[example.sample.origin] for example in examples}
        return self.teachers[number]


def load_teachers(config: DistillConfig, ranks: Ranks) -> Teacher | TeachersBySource | None:
    """The teacher of a run, or those of its sources; None when neither loss nor validation has a KD term.

    Raises: as `load_teacher`.
    """
    first = load_teacher(config, ranks)
    if first is None or not any(config.teacher_numbers):
        return first
    alone = [replace(config, teacher=source.teacher, sources=[]) for source in config.sources if source.teacher]
    others = [teacher for one in alone if (teacher := load_teacher(one, ranks)) is not None]
    return TeachersBySource((first, *others), config.teacher_numbers)

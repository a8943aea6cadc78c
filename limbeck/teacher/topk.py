"""Top-k targets: the teacher's likeliest entries, and the mass of all others as one event.

D compares distributions over K + 1 events, the kept entries and the rest. The log-mass of the student's rest is the
log-sum-exp of its row without the kept entries: exact, however small. Padding (a teacher's log-probability of -inf) is
an event that neither of the two can have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from limbeck.errors import ConfigError, ShapeError
from limbeck.models.anatomy import Head
from limbeck.models.sharded_softmax import WHOLE
from limbeck.teacher.labels import LabelTargets
from limbeck.teacher.targets import (
    LOG_FLOOR,
    Distance,
    OneTeacherTargets,
    TargetReader,
    by_logits_,
    check_ids,
    cooled,
    entropy_of,
)


@dataclass(frozen=True, slots=True)
class TopKTargets(OneTeacherTargets):
    """The teacher's K largest log-probabilities a position, and the log of the mass that all other entries share."""

    ids: Tensor
    """int64 [N K], distinct within a row where they are entries; any value in padding."""
    log_probs: Tensor
    """float [N K], at temperature 1, natural logarithm, normalised over the whole vocabulary. Where rows have different
    numbers of entries, -inf marks the padding behind the last of them; the first is always an entry."""
    log_tail: Tensor
    """float [N]: log(1 - sum exp(log_probs)); -inf when nothing is left."""

    def __post_init__(self) -> None:
        if self.ids.shape != self.log_probs.shape or self.log_tail.shape != self.ids.shape[:1]:
            raise ShapeError(
                f"top-k targets: ids {tuple(self.ids.shape)}, log_probs {tuple(self.log_probs.shape)} and log_tail "
                f"{tuple(self.log_tail.shape)} do not fit; expected [N K], [N K], [N]."
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    def widened(self, width: int) -> TopKTargets:
        more = (0, width - self.width)
        log_probs = nn.functional.pad(self.log_probs, more, value=-torch.inf)
        return TopKTargets(nn.functional.pad(self.ids, more), log_probs, self.log_tail)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> TopKTargets:
        return TopKTargets(change(self.ids), change(self.log_probs), change(self.log_tail))

    def map_heads(self, change: Callable[[Head], Head]) -> TopKTargets:
        return self

    def over(self, entries: Tensor) -> LabelTargets:
        """Their log-probabilities, where all of them are among those that were kept.

        Raises: ConfigError.
        """
        is_entry = (self.ids[:, :, None] == entries) & (self.log_probs > -torch.inf)[:, :, None]
        found, place = is_entry.any(1), is_entry.int().argmax(1)
        if not bool(found.all()):
            missing = int((~found.all(1)).sum())
            raise ConfigError(
                f"at {missing} of {len(self)} positions the teacher's {self.width} likeliest entries have not all of "
                f"the labels {entries.tolist()}; keep more (teacher.top_n, or the cache's k), or use a live teacher."
            )
        return LabelTargets.of(self.log_probs.gather(1, place))

    def logits(self) -> NoReturn:
        raise ConfigError("a teacher that keeps its likeliest entries has no logits of others; use a live teacher.")

    def events(self) -> Tensor:
        """Log-probabilities [N K+1] of the entries and of the rest."""
        return torch.cat([self.log_probs, self.log_tail[:, None]], 1)

    @torch.no_grad()
    def entropy(self, vocab: int) -> Tensor:
        """Over the K + 1 events."""
        return entropy_of(self.events())

    def probability_of(self, entries: Tensor, vocab: int) -> Tensor:
        is_named = torch.isin(self.ids, entries) & (self.log_probs > -torch.inf)
        return torch.where(is_named, self.log_probs.exp(), 0.0).sum(-1)

    def head_flops(self, vocab: int) -> int:
        return 0

    def reader(self, kd_coef: Tensor, vocab: int, distance: Distance) -> TargetReader:
        return _Reader(_readable(self, kd_coef != 0, kd_coef.dtype, vocab, distance.is_checked), distance)


class _Reader(TargetReader):
    is_plain = True

    def __init__(self, targets: TopKTargets, distance: Distance) -> None:
        self._targets, self._distance = targets, distance

    def read(self, index: Tensor, states: Tensor) -> None:
        self.kept = self._targets.take(index)

    def row_loss(self, block: slice, logits: Tensor, log_probs: Tensor | None, coef: Tensor) -> Tensor:
        divergence, temperature, softmax, _ = self._distance
        targets: TopKTargets = self.kept.take(block)
        kept = softmax.gather(logits, targets.ids).masked_fill_(targets.log_probs == -torch.inf, -torch.inf)
        softmax.exclude_(logits, targets.ids)
        log_rest = softmax.log_sum_exp(logits)
        log_student = torch.log_softmax(cooled(torch.cat([kept, log_rest], 1), temperature), -1)
        log_teacher = torch.log_softmax(cooled(targets.events(), temperature), -1)
        value, gradient = divergence(log_student, log_teacher)
        gradient = by_logits_(gradient, log_student, WHOLE).mul_(coef / temperature)
        # An entry has its share exp(z - log_rest) of the rest's gradient. With K = V there is none, and no NaN.
        logits.sub_(log_rest.clamp(min=LOG_FLOOR)).exp_().mul_(gradient[:, -1:])
        # The kept places hold 0 now; padding adds its 0 to a place that another entry of the row fills.
        softmax.scatter_add_(logits, targets.ids, gradient[:, :-1])
        return value


def _readable(targets: TopKTargets, is_read: Tensor, compute: torch.dtype, vocab: int, is_checked: bool) -> TopKTargets:
    """In the type of the loss, blank where nothing is read; padding repeats the row's first entry.

    So padding takes nothing out of the rest.
    Raises: ShapeError for an id outside the vocabulary.
    """
    some_ids = torch.arange(targets.width, device=targets.ids.device)
    ids = torch.where(is_read[:, None], targets.ids, some_ids)
    log_probs = targets.log_probs.to(compute).masked_fill(~is_read[:, None], 0.0)
    ids = torch.where(log_probs == -torch.inf, ids[:, :1], ids)
    if not is_checked:
        check_ids("top-k id", ids, vocab)
    return TopKTargets(ids, log_probs, targets.log_tail.to(compute).masked_fill(~is_read, 0.0))

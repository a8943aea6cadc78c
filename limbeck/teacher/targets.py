"""What a teacher says at N supervised positions, whatever its form, and what several teachers say there.

A form is a subclass of `OneTeacherTargets` in a file of its own (`dense`, `topk`): the tensors that it holds, what it
knows of them, and how a row's divergence and its gradient are found. Nothing else asks which form it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from limbeck.errors import ShapeError
from limbeck.models.anatomy import Head
from limbeck.models.sharded_softmax import Softmax

LOG_FLOOR = -1000.0
"""A log-probability below it counts as this one: its probability is 0 in every float type."""

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log_student [N V], log_teacher [N V]) -> (value [N], its gradient [N V] by log_student)."""


class Distance(NamedTuple):
    """How far rows of logits are from a teacher: D of softmax(z / T) over a vocabulary that is here, or in parts."""

    divergence: Divergence
    temperature: float
    """T > 0."""
    softmax: Softmax
    is_checked: bool = False
    """Whether the ids of targets are known to be in the vocabulary."""


class TeacherTargets(ABC):
    """What one teacher or several say at N positions."""

    __slots__ = ()

    @abstractmethod
    def by_teacher(self) -> list[tuple[OneTeacherTargets, float]]:
        """Each teacher's targets and its weight w_i: the KD term is sum_i w_i D(p_i, q)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Targets of other positions: `change` takes every tensor that has a row for each position."""

    @abstractmethod
    def map_heads(self, change: Callable[[Head], Head]) -> Self:
        """The same targets with other heads of the teachers, where they have any."""

    @abstractmethod
    def over(self, entries: Tensor) -> TeacherTargets:
        """What the teachers say of those entries of the vocabulary alone, renormalised over them.

        Raises: ConfigError for a form that keeps some entries only where these are not among them.
        """

    @abstractmethod
    def entropy(self, vocab: int) -> Tensor:
        """Entropy in nats [N] at temperature 1; of several teachers sum_i w_i H(p_i)."""

    @abstractmethod
    def probability_of(self, entries: Tensor, vocab: int) -> Tensor:
        """Probability [N] of some entries together, int64 [K], at temperature 1; of several teachers the weighted mean.

        Entries that a form does not keep count as 0.
        """

    @abstractmethod
    def head_flops(self, vocab: int) -> int:
        """What multiplying all N positions by the teachers' heads costs, over at most `vocab` entries."""

    def take(self, rows: Tensor | slice) -> Self:
        """The targets of some positions, by index, mask or slice."""
        return self.map_rows(lambda tensor: tensor[rows])


class OneTeacherTargets(TeacherTargets):
    """What one teacher says."""

    __slots__ = ()

    def by_teacher(self) -> list[tuple[OneTeacherTargets, float]]:
        return [(self, 1.0)]

    @abstractmethod
    def over(self, entries: Tensor) -> OneTeacherTargets: ...

    @property
    def width(self) -> int:
        """Numbers of a row that differ between targets of this form; 0 where all have the same."""
        return 0

    def widened(self, width: int) -> Self:
        """The same targets with rows of that width."""
        return self

    @abstractmethod
    def logits(self) -> Tensor:
        """All logits [N V] at once, for few entries (`over`)."""

    @abstractmethod
    def reader(self, kd_coef: Tensor, vocab: int, distance: Distance) -> TargetReader:
        """What the loss asks of these targets.

        Args:
          kd_coef: [N], of the type that the loss is computed in; where it is 0 nothing is read.
          vocab: the student's vocabulary.
          distance: what is measured; where the vocabulary is in parts, the heads are that of this process.
        """


class TargetReader:
    """Targets a chunk of positions at a time, and the divergence of the chunk's rows a block at a time.

    This one reads nothing: there is no teacher, or none that counts, and D is 0.
    """

    row_bytes: int = 0
    """Bytes of the buffers for a position of a chunk."""
    has_frozen_head: bool = False
    """Whether the targets hold for one head of the student alone, which must not be trained."""
    by_states: Tensor | None = None
    """[C D]: what coef * D has as a gradient by the chunk's hidden states beside that through their logits."""
    is_plain: bool = False
    """Whether `dense` or `kept` is all that there is to know."""
    width: int = 0
    """Entries of `dense`, from the first of the vocabulary on."""
    dense: Tensor | None = None
    """The chunk's logits [C W] where they are whole, before bias and cap."""
    kept: Any = None
    """The chunk's `TopKTargets`, checked."""

    def allocate(self, rows: int) -> None:
        """Make room for chunks of at most so many positions."""

    def read(self, index: Tensor, states: Tensor) -> None:
        """Make the positions `index` the chunk; `states` [C D] are the student's hidden states there."""

    def row_loss(self, block: slice, logits: Tensor, log_probs: Tensor | None, coef: Tensor) -> Tensor:
        """D [n] of the block's rows; `logits` [n V] becomes coef * dD / dlogits.

        Args:
          block: which rows of the chunk.
          logits: of the student at temperature 1, of the type that the loss is computed in; overwritten.
          log_probs: their log_softmax, where it is known.
          coef: [n 1].
        """
        logits.zero_()
        return logits.new_zeros(len(logits))


@dataclass(frozen=True, slots=True)
class SeveralTargets(TeacherTargets):
    """What several teachers say at the same N positions."""

    parts: tuple[OneTeacherTargets, ...]
    weights: tuple[float, ...]

    def by_teacher(self) -> list[tuple[OneTeacherTargets, float]]:
        return list(zip(self.parts, self.weights, strict=True))

    def __len__(self) -> int:
        return len(self.parts[0])

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> SeveralTargets:
        return SeveralTargets(tuple(part.map_rows(change) for part in self.parts), self.weights)

    def map_heads(self, change: Callable[[Head], Head]) -> SeveralTargets:
        return SeveralTargets(tuple(part.map_heads(change) for part in self.parts), self.weights)

    def over(self, entries: Tensor) -> SeveralTargets:
        return SeveralTargets(tuple(part.over(entries) for part in self.parts), self.weights)

    def entropy(self, vocab: int) -> Tensor:
        return weighted_sum((weight, part.entropy(vocab)) for part, weight in self.by_teacher())

    def probability_of(self, entries: Tensor, vocab: int) -> Tensor:
        total = sum(self.weights)
        return weighted_sum((weight / total, part.probability_of(entries, vocab)) for part, weight in self.by_teacher())

    def head_flops(self, vocab: int) -> int:
        return sum(part.head_flops(vocab) for part in self.parts)


def weighted_sum(terms: Iterable[tuple[float, Tensor]]) -> Tensor:
    """sum_i w_i x_i."""
    return torch.stack([weight * value for weight, value in terms]).sum(0)


def entropy_of(log_probs: Tensor) -> Tensor:
    """Entropy in nats [N] of log-probabilities [N V]."""
    return -(log_probs.exp() * log_probs.clamp_min(LOG_FLOOR)).sum(-1)


def cooled(logits: Tensor, temperature: float) -> Tensor:
    """Logits over T."""
    return logits if temperature == 1.0 else logits / temperature


def by_logits_(gradient: Tensor, log_probs: Tensor, softmax: Softmax) -> Tensor:
    """From the derivative by log-probabilities to the one by the logits behind them, in place."""
    total = softmax.sum(gradient.sum(-1, keepdim=True))
    return gradient.addcmul_(log_probs.exp(), total, value=-1.0)


def check_ids(name: str, ids: Tensor, vocab: int) -> None:
    """Refuse ids [N ...] outside the vocabulary.

    Raises: ShapeError that names the first.
    """
    bad = (ids < 0) | (ids >= vocab)
    if bool(bad.any()):
        where = torch.nonzero(bad)[0].tolist()
        raise ShapeError(
            f"fused_loss: {name} {int(ids[tuple(where)])} at row {where[0]} is outside the vocabulary of "
            f"{vocab}; give rows without a target a coefficient of 0."
        )

"""What an objective is given and what it gives: a micro-batch with its student, teacher and the loss of its step.

A step's loss is a weighted mean over its supervised targets (or over its sequences). The denominators are taken over
the whole step, all ranks and micro-batches, before the first forward; every micro-batch then adds its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from limbeck.distill.config import LossConfig
from limbeck.distill.fused import FusedLoss
from limbeck.distill.rows import SupervisedRows, Terms
from limbeck.distill.sending import Sent
from limbeck.ledger import Ledger, backbone_backward_flops, backbone_forward_flops
from limbeck.models.anatomy import Computed, Given, Sizes, hidden_rows, sizes_of
from limbeck.models.load import vocabulary_size
from limbeck.models.sharded import assemble
from limbeck.teacher.several import Teacher
from limbeck.teacher.targets import TeacherTargets
from limbeck.traces.batch import Batch, Example
from limbeck.traces.supervise import AtBorders, TokenSelection


class Student(NamedTuple):
    """The model that is trained."""

    model: Any
    tokenizer: Any
    sizes: Sizes
    vocab_size: int
    """The tokenizer's real vocabulary; head rows beyond it are padding."""
    empty: Any = None
    """A student in parts without its storage, which `whole` fills."""

    @classmethod
    def of(cls, model: Any, tokenizer: Any, empty: Any = None) -> Student:
        """A loaded model, with its trainable parameters marked."""
        vocab_size = vocabulary_size(tokenizer)
        return cls(model, tokenizer, sizes_of(model, vocab_size), vocab_size, empty)

    def whole(self) -> Student:
        """The student with its whole model on the first process; all must call it."""
        return self if self.empty is None else self._replace(model=assemble(self.model, self.empty))


class Totals(NamedTuple):
    """Denominators of a step."""

    ce: float
    """Sum of CE weights (token_mean), or number of sequences with any (sequence_mean), each times its sample's."""
    kd: float
    """The same of KD weights."""


def step_totals(examples: Sequence[Example], normalization: str) -> Totals:
    """Denominators over all examples of a step, whichever rank or micro-batch they fall to."""
    sums = np.array([example.weight_sums for example in examples]).reshape(-1, 2)
    if normalization == "sequence_mean":
        sums = (sums > 0).astype(np.float64)
    weights = np.array([example.sample.weight for example in examples]).reshape(-1, 1)
    ce, kd = (sums * weights).sum(axis=0)
    return Totals(float(ce), float(kd))


class Borders(NamedTuple):
    """Where CE gives way, because the teacher may stop (`borders`)."""

    end_ids: Tensor
    """int64 [K]: the first token of the end marker, and those that end a turn."""
    probability: float
    ce: AtBorders


class StepLoss(NamedTuple):
    """What a step is trained on: (1 - kd_ratio) CE / totals.ce + kd_ratio T^2 D / totals.kd."""

    config: LossConfig
    kd_ratio: float
    totals: Totals
    select: TokenSelection | None = None
    """Which of the KD positions are kept; None keeps all."""
    borders: Borders | None = None

    @property
    def is_any(self) -> bool:
        """Whether the step supervises anything; one that does not must leave weights and moments alone on all ranks."""
        return (self.kd_ratio < 1 and self.totals.ce > 0) or (self.kd_ratio > 0 and self.totals.kd > 0)


class MicroBatch(NamedTuple):
    """What an objective is given."""

    student: Student
    teacher: Teacher | None
    batch: Batch
    """On the student's device, laid out as the student reads it."""
    examples: Sequence[Example]
    """Those of the batch, in order; none where a process without any keeps step with the others."""
    loss: StepLoss
    ledger: Ledger
    sent: Sent | None = None
    """What is known of a batch that was laid out for an accelerator."""

    def used(self) -> SupervisedRows:
        """The supervised positions that have a term."""
        return self.supervised().used()[0] if self.sent is None else self.sent.supervised

    @property
    def terms(self) -> Terms | None:
        """Which terms those have, where it is known without asking a device."""
        return None if self.sent is None else self.sent.terms

    def supervised(self) -> SupervisedRows:
        """The supervised positions and what every one adds to the step's loss."""
        return supervised_rows(self.batch, self.loss)

    def ask(self, rows: Tensor) -> TeacherTargets:
        """The teacher's targets for the tokens at flat indices `rows`."""
        if self.sent is not None and self.sent.targets is not None and rows is self.sent.supervised.rows:
            return self.sent.targets
        assert self.teacher is not None
        known = () if self.sent is None else (self.given(rows),)
        return self.teacher.targets(self.batch, self.examples, rows, self.ledger, *known)

    def hidden_states(self, rows: Tensor) -> tuple[Tensor, Computed]:
        """The student's hidden states [N D] that predict the tokens at `rows`, and what was computed for them."""
        batch = self.batch
        with self.ledger.phase("student"):
            packed = batch.sequence_lengths if batch.layout == "packed" else None
            return hidden_rows(self.student.model, batch.input_ids, batch.positions, rows - 1, packed, self.given(rows))

    def given(self, rows: Tensor) -> Given:
        """What is known of the batch, and of these rows."""
        if self.sent is None:
            return Given()
        return self.sent.given if rows is self.sent.supervised.rows else self.sent.given._replace(plan=None)

    def labels(self, rows: Tensor) -> Tensor:
        """The tokens at `rows`."""
        return self.batch.input_ids.flatten()[rows]

    def owner(self) -> Tensor:
        """int64 [B T]: the sequence of every place in the flattened batch."""
        return _owner(self.batch)

    def charge(self, computed: Computed, *, head: int, **counts: int) -> None:
        """Charge a training pass: what was `computed` forward and backward, the head's FLOPs, and tokens counted."""
        if not (torch.is_grad_enabled() and self.examples):
            return
        sizes = self.student.sizes
        flops = backbone_forward_flops(sizes, computed) + backbone_backward_flops(sizes, computed)
        self.ledger.add_flops(student=flops, head=head)
        self.ledger.count(**counts)

    def count_tokens(self) -> None:
        """Count what a training pass reads."""
        if torch.is_grad_enabled() and self.examples:
            self.ledger.count(tokens=self.batch.num_tokens, sequences=len(self.batch.sequence_lengths))


class Objective(Protocol):
    """A loss that the loop can train: the share of a micro-batch in its step's, exact under any split of the step."""

    def __call__(self, given: MicroBatch, /) -> FusedLoss | None:
        """The share, differentiable by the student; None when nothing in the micro-batch is supervised."""
        ...


def supervised_rows(batch: Batch, loss: StepLoss) -> SupervisedRows:
    """The supervised positions and what every one adds to the step's loss: float32 [N] for CE and for KD.

    A term without any weight in the step has a coefficient of 0, so empty supervision gives 0, never NaN.
    """
    config, kd_ratio, totals = loss.config, loss.kd_ratio, loss.totals
    rows, weights = batch.target_rows(), [batch.ce_weight.flatten(), batch.kd_weight.flatten()]
    if config.normalization == "sequence_mean":
        weights = [_per_sequence(batch, weight) for weight in weights]
    if batch.sequence_weights:
        scale = weights[0].new_tensor(batch.sequence_weights)[_owner(batch)]
        weights = [weight * scale for weight in weights]
    ce_scale = (1 - kd_ratio) / totals.ce if totals.ce else 0.0
    kd_scale = kd_ratio / totals.kd if totals.kd else 0.0
    return SupervisedRows(rows, weights[0][rows] * ce_scale, weights[1][rows] * kd_scale, None)


def laid_out_tokens(batch: Batch) -> list[int]:
    """Tokens of each sequence in the batch's tensors: padding included when padded."""
    if batch.layout == "packed":
        return list(batch.sequence_lengths)
    rows, width = batch.input_ids.shape
    return [width] * rows


def _owner(batch: Batch) -> Tensor:
    lengths = torch.tensor(laid_out_tokens(batch), device=batch.input_ids.device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def _per_sequence(batch: Batch, weight: Tensor) -> Tensor:
    """Weights divided by their sum within each sequence."""
    owner = _owner(batch)
    sums = weight.new_zeros(len(batch.sequence_lengths)).index_add_(0, owner, weight)
    return weight / sums.clamp_min(torch.finfo(weight.dtype).tiny)[owner]

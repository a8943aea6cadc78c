"""The loss of a micro-batch of pairs: CE and KD at the answer position, over labels or vocabulary, and listwise KD.

    (1 - kd_ratio) CE + kd_ratio T^2 [ (1 - listwise_ratio) D(pair) + listwise_ratio D(request) ]

averaged over the pairs of a step; a request's listwise term counts as many times as it has candidates, so that it
weighs what its pairs weigh, whatever micro-batch it falls to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.config import checked
from limbeck.distill.config import LossConfig
from limbeck.distill.ensemble import weighted_fused_loss
from limbeck.distill.fused import FusedLoss
from limbeck.distill.objective import Teacher, Totals, coefficients
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger, backbone_backward_flops, backbone_forward_flops, head_flops
from limbeck.models.anatomy import Head, Sizes, head_of, hidden_rows
from limbeck.ranking.featurize import Labels
from limbeck.ranking.loss import NO, YES, label_head, label_targets, listwise_divergence, log_odds
from limbeck.teacher.targets import DenseTargets, SeveralTargets, TeacherTargets
from limbeck.traces.batch import Batch, Example
from limbeck.traces.supervise import TokenSelection


@checked
class RankingLossConfig:
    """What the answer position is trained on, beside the loss that all distillation has."""

    support: Literal["labels", "vocabulary"] = "labels"
    """labels: CE and KD over yes and no alone, both sides renormalised; vocabulary: over all tokens."""
    listwise_ratio: float = 0.0
    """Share of the KD term that compares the candidates of a request with one another, 0 <= x <= 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.listwise_ratio <= 1:
            raise ConfigError(f"listwise_ratio must be in [0, 1]; found {self.listwise_ratio}")


@dataclass(frozen=True, slots=True)
class RankingObjective:
    """Takes the place of `distill.objective.microbatch_loss`; its arguments and result are those."""

    labels: Labels
    config: RankingLossConfig

    def __call__(
        self,
        student: Any,
        student_sizes: Sizes,
        teacher: Teacher | None,
        batch: Batch,
        examples: Sequence[Example],
        totals: Totals,
        config: LossConfig,
        kd_ratio: float,
        ledger: Ledger,
        vocab_size: int | None = None,
        select: TokenSelection | None = None,
    ) -> FusedLoss | None:
        """Forward pass of a micro-batch of whole requests and its share of the step's loss."""
        rows = batch.target_rows()
        ce_coef, kd_coef = coefficients(batch, rows, totals, kd_ratio, config.normalization)
        if torch.is_grad_enabled():
            ledger.count(tokens=batch.num_tokens, sequences=len(batch.sequence_lengths), supervised_tokens=len(rows))
        asks_teacher = teacher is not None and bool((kd_coef != 0).any())
        targets = teacher.targets(batch, examples, rows, ledger) if teacher is not None and asks_teacher else None
        with ledger.phase("student"):
            packed = batch.sequence_lengths if batch.layout == "packed" else None
            hidden, computed = hidden_rows(student, batch.input_ids, batch.positions, rows - 1, packed)
        answers = batch.input_ids.flatten()[rows]
        listwise = self.config.listwise_ratio
        with ledger.phase("head"):
            loss = self._pointwise(
                hidden, head_of(student), answers, ce_coef, kd_coef * (1 - listwise), targets, config, vocab_size
            )
            if listwise and targets is not None:
                loss = _added(loss, self._listwise(hidden, student, examples, kd_coef * listwise, targets, config))
        if torch.is_grad_enabled():
            flops = backbone_forward_flops(student_sizes, computed) + backbone_backward_flops(student_sizes, computed)
            listwise_rows = len(rows) if listwise and targets is not None else 0
            ledger.add_flops(student=flops, head=self._head_flops(student_sizes, loss.head_rows, listwise_rows))
            ledger.add_flops(teacher=self._teacher_head_flops(targets, vocab_size))
        return loss

    def _head_flops(self, sizes: Sizes, pointwise_rows: int, listwise_rows: int) -> int:
        """Of the student: the pointwise terms', and two label rows of the head for the listwise one."""
        two = sizes._replace(vocab_size=2)
        used = two if self.config.support == "labels" else sizes
        return head_flops(used, pointwise_rows) + head_flops(two, listwise_rows)

    def _teacher_head_flops(self, targets: TeacherTargets, vocab_size: int | None) -> int:
        """What the teachers' heads cost beside what a live teacher charges, which is the whole vocabulary once."""
        if targets is None:
            return 0
        extra, listwise = 0, self.config.listwise_ratio
        for part in map(_dense, targets.parts if isinstance(targets, SeveralTargets) else (targets,)):
            rows, width = part.head_weight.shape
            whole = min(vocab_size or rows, rows)
            pointwise = 0 if listwise == 1 else 2 if self.config.support == "labels" else whole
            extra += 2 * len(part) * width * (pointwise + (2 if listwise else 0) - whole)
        return extra

    def _pointwise(
        self,
        hidden: Tensor,
        head: Head,
        answers: Tensor,
        ce_coef: Tensor,
        kd_coef: Tensor,
        targets: TeacherTargets,
        config: LossConfig,
        vocab_size: int | None,
    ) -> FusedLoss:
        """CE and D of each pair, over the two label rows of the heads or over all of them."""
        if self.config.support == "labels":
            head, targets, vocab_size = label_head(head, self.labels), label_targets(targets, self.labels), None
            answers = torch.where(answers == self.labels.yes, YES, NO)
        return weighted_fused_loss(
            hidden,
            head.weight,
            answers,
            head_bias=head.bias,
            ce_coef=ce_coef,
            kd_coef=kd_coef,
            targets=targets,
            divergence=config.divergence,
            temperature=config.temperature,
            vocab_size=vocab_size,
            chunk_bytes=config.chunk_bytes,
        )

    def _listwise(
        self,
        hidden: Tensor,
        student: Any,
        examples: Sequence[Example],
        coef: Tensor,
        targets: TeacherTargets,
        config: LossConfig,
    ) -> Tensor:
        """Weighted sum over requests, and over teachers, of T^2 D between their softmaxes over candidates."""
        owner = _owner(examples, hidden.device)
        scores = log_odds(hidden, label_head(head_of(student), self.labels))
        weights = coef.new_zeros(int(owner.max()) + 1).index_add_(0, owner, coef).to(scores.dtype)
        several = targets if isinstance(targets, SeveralTargets) else SeveralTargets((_dense(targets),), (1.0,))
        values = [
            weight * listwise_divergence(scores, theirs, owner, config.divergence.bind(), config.temperature)
            for weight, theirs in zip(several.weights, self._teacher_scores(several), strict=True)
        ]
        return config.temperature**2 * (weights * torch.stack(values).sum(0)).sum()

    def _teacher_scores(self, targets: SeveralTargets) -> list[Tensor]:
        return [
            log_odds(part.hidden, label_head(Head(part.head_weight, part.head_bias), self.labels))
            for part in map(_dense, targets.parts)
        ]


def _dense(targets: TeacherTargets) -> DenseTargets:
    assert isinstance(targets, DenseTargets), "ranking asks live teachers only (RankTrainConfig)"
    return targets


def _owner(examples: Sequence[Example], device: torch.device) -> Tensor:
    """int64 [N]: the request of each example, numbered in the order of their appearance."""
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(example.sample.trace_key, len(numbers)) for example in examples]
    return torch.tensor(found, device=device)


def _added(loss: FusedLoss, listwise: Tensor) -> FusedLoss:
    return FusedLoss(loss.total + listwise, loss.ce_sum, loss.kd_sum + listwise.detach(), loss.head_rows)

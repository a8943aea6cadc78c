"""The loss of a micro-batch of pairs: CE and KD at the answer position, over labels or vocabulary, and listwise KD.

    (1 - kd_ratio) CE + kd_ratio T^2 [ (1 - listwise_ratio) D(pair) + listwise_ratio D(request) ]

where CE is (1 - order_ratio) CE(pair) + order_ratio L(request) for a loss L on the order of a request by its grades;
averaged over the pairs of a step; a request's listwise term counts as many times as it has candidates, so that it
weighs what its pairs weigh, whatever micro-batch it falls to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.config import checked
from limbeck.distill.config import LossConfig
from limbeck.distill.fused import FusedLoss, fused_loss
from limbeck.distill.microbatch import MicroBatch
from limbeck.distill.rows import SupervisedRows
from limbeck.errors import ConfigError
from limbeck.ledger import head_flops
from limbeck.models.anatomy import Head, Sizes, head_of
from limbeck.models.logits import logits_of
from limbeck.ranking.examples import grades_of
from limbeck.ranking.featurize import Labels
from limbeck.ranking.loss import NO, YES, label_head, listwise_divergence, log_odds, places_of
from limbeck.ranking.order_loss import ORDER_LOSSES
from limbeck.teacher.targets import TeacherTargets
from limbeck.traces.batch import Example


@checked
class RankingLossConfig:
    """What the answer position is trained on, beside the loss that all distillation has."""

    support: Literal["labels", "vocabulary"] = "labels"
    """labels: CE and KD over yes and no alone, both sides renormalised; vocabulary: over all tokens."""
    listwise_ratio: float = 0.0
    """Share of the KD term that compares the candidates of a request with one another, 0 <= x <= 1."""

    order: Literal["ranknet", "lambdaloss", "listmle"] = "ranknet"
    """Loss on the order of a request's candidates by their grades (labels where there are none)."""
    order_ratio: float = 0.0
    """Share of the CE term that is this loss, 0 <= x <= 1; with 1 scores rank and are no probabilities."""

    def __post_init__(self) -> None:
        for name in ("listwise_ratio", "order_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1]; found {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class RankingObjective:
    """The loss of a micro-batch of whole requests."""

    labels: Labels
    config: RankingLossConfig

    def __call__(self, given: MicroBatch) -> FusedLoss:
        """Forward pass of a micro-batch and its share of the step's loss."""
        supervised, listwise = given.used(), self.config.listwise_ratio
        given.count_tokens()
        kd_coef = supervised.kd_coef
        has_kd = bool((kd_coef != 0).any()) if given.terms is None else given.terms.kd
        if given.teacher is not None and has_kd:
            supervised = supervised._replace(targets=given.ask(supervised.rows))
        hidden, computed = given.hidden_states(supervised.rows)
        head, has_list = head_of(given.student.model), bool(listwise) and supervised.targets is not None
        ce_coef, order = supervised.ce_coef, self.config.order_ratio
        with given.ledger.phase("head"):
            pairs = supervised._replace(ce_coef=ce_coef * (1 - order), kd_coef=kd_coef * (1 - listwise))
            loss = self._pointwise(given, pairs, hidden, head)
            if order:
                term = self._order(hidden, head, given.examples, ce_coef * order)
                loss = FusedLoss(loss.total + term, loss.ce_sum + term.detach(), loss.kd_sum, loss.head_rows)
            if supervised.targets is not None and listwise:
                coef, terms = kd_coef * listwise, given.loss.config
                loss = _added(loss, self._listwise(hidden, head, given.examples, coef, supervised.targets, terms))
        num_rows = len(supervised.rows)
        two_rows = num_rows * (has_list + bool(order))
        flops = self._head_flops(given.student.sizes, loss.head_rows, two_rows)
        given.charge(computed, head=flops, supervised_tokens=num_rows)
        if torch.is_grad_enabled() and supervised.targets is not None:
            given.ledger.add_flops(teacher=self._teacher_head_flops(supervised.targets, given.student.vocab_size))
        return loss

    def _head_flops(self, sizes: Sizes, pointwise_rows: int, listwise_rows: int) -> int:
        """Of the student: the pointwise terms', and two label rows of the head for the listwise one."""
        two = sizes._replace(vocab_size=2)
        used = two if self.config.support == "labels" else sizes
        return head_flops(used, pointwise_rows) + head_flops(two, listwise_rows)

    def _teacher_head_flops(self, targets: TeacherTargets, vocab: int) -> int:
        """What the teachers' heads cost beside what a live teacher charges, which is the whole vocabulary once."""
        listwise, whole, two = self.config.listwise_ratio, targets.head_flops(vocab), targets.head_flops(2)
        pointwise = 0 if listwise == 1 else two if self.config.support == "labels" else whole
        return pointwise + (two if listwise else 0) - whole

    def _pointwise(self, given: MicroBatch, supervised: SupervisedRows, hidden: Tensor, head: Head) -> FusedLoss:
        """CE and D of each pair, over the two label rows of the heads or over all of them."""
        answers, targets, vocab = given.labels(supervised.rows), supervised.targets, given.student.vocab_size
        config, losses = given.loss.config, []
        if self.config.support == "labels":
            head, vocab, answers = label_head(head, self.labels), 2, torch.where(answers == self.labels.yes, YES, NO)
            targets = None if targets is None else targets.over(self._entries(hidden))
        for ce_coef, kd_coef, of_one in supervised._replace(targets=targets).by_teacher():
            loss = fused_loss(
                hidden,
                head.weight,
                answers,
                head_bias=head.bias,
                head_softcap=head.softcap,
                ce_coef=ce_coef,
                kd_coef=kd_coef,
                targets=of_one,
                divergence=config.divergence,
                temperature=config.temperature,
                vocab_size=vocab,
                chunk_bytes=config.chunk_bytes,
            )
            losses.append(loss)
        return FusedLoss.sum(losses)

    def _order(self, hidden: Tensor, head: Head, examples: Sequence[Example], coef: Tensor) -> Tensor:
        """Weighted sum over requests of the loss on their order."""
        owner = _owner(examples, hidden.device)
        scores = log_odds(logits_of(hidden, label_head(head, self.labels)))
        places = places_of(owner)
        grades = grades_of(examples).to(scores)
        weights = coef.new_zeros(len(places)).index_add_(0, owner, coef).to(scores.dtype)
        return (weights * ORDER_LOSSES[self.config.order](scores[places], grades[places], places >= 0)).sum()

    def _listwise(
        self,
        hidden: Tensor,
        head: Head,
        examples: Sequence[Example],
        coef: Tensor,
        targets: TeacherTargets,
        config: LossConfig,
    ) -> Tensor:
        """Weighted sum over requests, and over teachers, of T^2 D between their softmaxes over candidates."""
        owner = _owner(examples, hidden.device)
        scores = log_odds(logits_of(hidden, label_head(head, self.labels)))
        weights = coef.new_zeros(int(owner.max()) + 1).index_add_(0, owner, coef).to(scores.dtype)
        divergence, values = config.divergence.bind(), []
        for part, weight in targets.over(self._entries(hidden)).by_teacher():
            theirs = log_odds(part.logits())
            values.append(weight * listwise_divergence(scores, theirs, owner, divergence, config.temperature))
        return config.temperature**2 * (weights * torch.stack(values).sum(0)).sum()

    def _entries(self, hidden: Tensor) -> Tensor:
        return torch.tensor(self.labels, device=hidden.device)


def _owner(examples: Sequence[Example], device: torch.device) -> Tensor:
    """int64 [N]: the request of each example, numbered in the order of their appearance."""
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(example.sample.trace_key, len(numbers)) for example in examples]
    return torch.tensor(found, device=device)


def _added(loss: FusedLoss, listwise: Tensor) -> FusedLoss:
    return FusedLoss(loss.total + listwise, loss.ce_sum, loss.kd_sum + listwise.detach(), loss.head_rows)

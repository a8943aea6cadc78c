"""Token selection: KD on the positions of each sequence that matter most, the rest skipped before the student's head.

A score (`scores`) ranks the n_i KD positions of sequence i. With a fraction x the k_i = max(1, floor(x n_i)) best are
kept; without one all are, each with a weight in proportion to its score. Either way one factor a sequence makes them
carry its whole KD weight. Two things follow: the denominators of a step are those without selection, known before any
forward pass; and what is kept depends on the sequence alone, not on the micro-batch, rank or layout that it falls to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.distill.microbatch import MicroBatch
from limbeck.distill.rows import SupervisedRows
from limbeck.distill.scores import (
    divergences,
    keep_top,
    random_scores,
    scaled,
    standardised,
    student_entropy,
    weigh_softly,
)
from limbeck.ledger import head_forward_flops
from limbeck.models.anatomy import Head
from limbeck.traces.supervise import TokenSelection


def select_without_student(given: MicroBatch, supervised: SupervisedRows) -> SupervisedRows:
    """The positions left where the student need not be asked which; else all of them."""
    select, targets = given.loss.select, supervised.targets
    if select is None or select.reads_student or targets is None or not given.examples:
        return supervised
    with given.ledger.phase("teacher"):
        if select.by == "random":
            scores = random_scores(given.examples, given.owner()[supervised.rows], select.seed)
        else:
            scores = targets.entropy(given.student.vocab_size)
        return _keep(given, supervised, scores, select)[0]


def select_by_student(
    given: MicroBatch, supervised: SupervisedRows, hidden: Tensor, head: Head
) -> tuple[SupervisedRows, Tensor]:
    """The positions left, and their hidden states, where what the student says decides; else all of them."""
    select, targets = given.loss.select, supervised.targets
    if select is None or not select.reads_student or targets is None:
        return supervised, hidden
    vocab, passes = given.student.vocab_size, select.head_passes(len(targets.by_teacher()))
    if torch.is_grad_enabled():
        given.ledger.add_flops(head=passes * head_forward_flops(given.student.sizes, len(hidden)))
    found = []
    if select.by != "divergence":
        found.append(student_entropy(hidden, head, vocab))
    if select.reads_divergence:
        found.append(divergences(hidden, head, targets, given.loss.config, vocab))
    owner, takes_part = given.owner()[supervised.rows], supervised.kd_coef != 0
    kept, used = _keep(given, supervised, _joined(found, owner, takes_part, select), select)
    return kept, hidden[used]


def _joined(found: list[Tensor], owner: Tensor, takes_part: Tensor, select: TokenSelection) -> Tensor:
    """One score of entropy and divergence."""
    if len(found) == 1:
        return found[0]
    if select.by == "tip":
        entropy, distance = (scaled(values, owner, takes_part) for values in found)
        return entropy + distance - entropy * distance
    entropy, distance = (standardised(values, owner, takes_part) for values in found)
    return entropy + distance


def _keep(
    given: MicroBatch, supervised: SupervisedRows, scores: Tensor, select: TokenSelection
) -> tuple[SupervisedRows, Tensor]:
    """The positions left and which they are.

    The loss takes the kept ones through the teacher's head, a second time where the score has taken all; the first time
    is charged when the teacher is asked.
    """
    owner, vocab = given.owner()[supervised.rows], given.student.vocab_size
    if select.fraction is None:
        kd_coef = weigh_softly(scores, owner, supervised.kd_coef)
    else:
        kd_coef = keep_top(scores, owner, supervised.kd_coef, select.fraction)
    kept, used = supervised._replace(kd_coef=kd_coef).used()
    assert kept.targets is not None and supervised.targets is not None
    first = 0 if select.reads_teacher else supervised.targets.head_flops(vocab)
    given.ledger.add_flops(teacher=kept.targets.head_flops(vocab) - first)
    return kept, used

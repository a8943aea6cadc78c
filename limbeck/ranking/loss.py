"""The terms of predictive distillation that the fused loss of limbeck.distill does not have: pure functions.

At an answer position a model has logits over the vocabulary, of which two are those of the labels.

    full-vocabulary terms   CE and D over all of it: `distill.fused_loss` as it is
    label terms             CE and D over {yes, no}, both sides renormalised: the same loss, with the two label rows of
                            each head in place of the head (`label_head`, `TeacherTargets.over`)
    listwise term           D between the softmaxes, over the candidates of one request, of teacher and student scores
                            z_yes - z_no (`listwise_divergence`)

Label terms cost 2 rows of the head instead of V, and say nothing about the other tokens: what the two labels have
together may drift, and `label_mass` shows whether it does. The listwise term sees differences of scores within a
request only, so it ranks but does not calibrate; mix it with one of the others where probabilities matter.

Source of the listwise form: Cao et al. 2007 (ListNet, top-one probabilities), with a teacher's scores for targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.models.anatomy import Head
from limbeck.ranking.featurize import Labels
from limbeck.teacher.targets import Divergence

YES, NO = 0, 1
"""Rows of a label head."""


def label_head(head: Head, labels: Labels) -> Head:
    """The rows of a head that score yes and no, [2 D] and [2]; gradients reach the whole head through them."""
    rows = torch.tensor(labels, device=head.weight.device)
    return head.rows(rows)


def log_odds(logits: Tensor) -> Tensor:
    """Score z_yes - z_no [N] of the logits [N 2] of a label head."""
    return logits[:, YES] - logits[:, NO]


def listwise_divergence(
    scores: Tensor, teacher_scores: Tensor, owner: Tensor, divergence: Divergence, temperature: float = 1.0
) -> Tensor:
    """D(softmax of the teacher's scores / T, softmax of the student's / T) over the candidates of each request.

    Args:
      scores: float [N], differentiable.
      teacher_scores: float [N].
      owner: int64 [N], the request of each candidate, numbered from 0 to R - 1.
      divergence: D of log-probabilities, with its gradient in closed form.
      temperature: T > 0.
    Returns: float [R], differentiable by `scores`; 0 for a request of one candidate.
    """
    places = places_of(owner)
    present = places >= 0
    log_student = _log_softmax(scores[places] / temperature, present)
    log_teacher = _log_softmax(teacher_scores.detach()[places] / temperature, present)
    value, gradient = divergence(log_student.detach().clone(), log_teacher)
    linear = (gradient.masked_fill(~present, 0) * log_student.masked_fill(~present, 0)).sum(-1)
    return value + (linear - linear.detach())


def places_of(owner: Tensor) -> Tensor:
    """int64 [R M]: the rows of each request, -1 behind the last of them; M is the longest."""
    counts = torch.bincount(owner)
    order = torch.argsort(owner, stable=True)
    starts = counts.cumsum(0) - counts
    column = torch.arange(len(owner), device=owner.device) - starts[owner[order]]
    places = owner.new_full((len(counts), int(counts.max())), -1)
    places[owner[order], column] = order
    return places


def _log_softmax(scores: Tensor, present: Tensor) -> Tensor:
    return torch.log_softmax(scores.masked_fill(~present, -torch.inf), -1)

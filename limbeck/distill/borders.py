"""Cross-entropy at borders: places where it is open whether the teacher stops.

In a cut trace the token that follows such a place always goes on, since the traces that stopped there are shorter; CE
on it teaches "go on" although the teacher would stop with probability q. With p_end the teacher's probability of the
end marker or of the end of turn, a place is a border where delta <= p_end <= 1 - delta, whatever token follows. There
CE is left out, or its coefficient goes to the KD term, which carries q itself. Denominators stay as they are.

Own method, after the finding that a cut by share censors ends (docs/truncation.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.distill.microbatch import Borders, MicroBatch
from limbeck.distill.rows import SupervisedRows
from limbeck.traces.render import RenderConfig, stop_ids
from limbeck.traces.supervise import AtBorders, BorderConfig


def spare_borders(given: MicroBatch, supervised: SupervisedRows) -> SupervisedRows:
    """The positions with the coefficients that borders leave them; unchanged where the step does not ask."""
    borders, targets = given.loss.borders, supervised.targets
    if borders is None or targets is None or not len(supervised.rows):
        return supervised
    vocab = given.student.vocab_size
    with given.ledger.phase("teacher"):
        p_end = targets.probability_of(borders.end_ids.to(supervised.rows.device), vocab)
    given.ledger.add_flops(teacher=targets.head_flops(vocab))
    ce_coef, kd_coef = moved(supervised.ce_coef, supervised.kd_coef, p_end, borders.probability, borders.ce)
    return supervised._replace(ce_coef=ce_coef, kd_coef=kd_coef)


def moved(ce_coef: Tensor, kd_coef: Tensor, p_end: Tensor, probability: float, ce: AtBorders) -> tuple[Tensor, Tensor]:
    """CE and KD coefficients behind the rule.

    Args:
      ce_coef, kd_coef: float [N].
      p_end: float [N], the teacher's probability of an end.
      probability: delta.
      ce: none leaves CE out at borders; kd gives its coefficient to the KD term.
    """
    is_border = (p_end >= probability) & (p_end <= 1 - probability)
    taken = torch.where(is_border, ce_coef, 0.0)
    return ce_coef - taken, kd_coef + taken if ce == "kd" else kd_coef


def borders_of(config: BorderConfig | None, tokenizer: Any, render: RenderConfig) -> Borders | None:
    """The borders of a run; None where it makes nothing of them."""
    if config is None:
        return None
    marker = tokenizer.encode(render.end_marker, add_special_tokens=False)[:1]
    ids = sorted({*marker, *stop_ids(tokenizer, render)})
    return Borders(torch.tensor(ids), config.probability, config.ce)

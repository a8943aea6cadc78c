"""Losses on the order of a request's candidates by their grades: pure functions of scores.

    ranknet      mean over pairs g_i > g_j of  log(1 + exp(s_j - s_i))
    lambdaloss   sum over pairs g_i > g_j of  d_ij |G_i - G_j| log2(1 + exp(s_j - s_i))
                 with d_ij = |1/D(|r_i - r_j|) - 1/D(|r_i - r_j| + 1)|, D(r) = log2(1 + r), G = g / ideal DCG, and
                 ranks r by the present scores, through which no gradient goes
    listmle      mean over candidates of  log sum_{j: g_j <= g_i} exp(s_j) - s_i,  those of the least grade left out

A score is the log-odds of yes. A request whose grades are all equal has no order and a loss of 0. Candidates of one
grade are in no order: ListMLE, which asks for a whole one, takes them as ties by Breslow's approximation, and is the
loss of its source where there are none.

Sources: Burges et al. 2005 (RankNet); Wang et al. 2018 (LambdaLoss, NDCG-Loss2, equation 12, with gain g and not
2^g - 1); Xia et al. 2008 (ListMLE, equation 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

OrderLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(scores [R M], grades [R M], present bool [R M]) -> loss [R], differentiable by the scores."""


def ranknet(scores: Tensor, grades: Tensor, present: Tensor) -> Tensor:
    """Mean over the pairs of a request of log(1 + exp(s_j - s_i)).

    Args:
      scores, grades: float [R M]; what is not present counts nothing.
      present: bool [R M].
    Returns: float [R].
    """
    above = _above(grades, present)
    losses = torch.nn.functional.softplus(scores[:, None, :] - scores[:, :, None])
    return (losses * above).sum((1, 2)) / above.sum((1, 2)).clamp(min=1)


def lambdaloss(scores: Tensor, grades: Tensor, present: Tensor) -> Tensor:
    """NDCG-Loss2: pairs count what exchanging their places would do to NDCG. Arguments as for `ranknet`."""
    above = _above(grades, present)
    with torch.no_grad():
        order = scores.masked_fill(~present, -torch.inf).argsort(dim=1, descending=True, stable=True)
        ranks = order.argsort(dim=1)
        apart = (ranks[:, :, None] - ranks[:, None, :]).abs().to(scores.dtype)
        # Of a candidate and itself the distance is 0 and log2(1 + 0) too; such a pair is never above.
        discount = (1 / torch.log2(1 + apart.clamp(min=1)) - 1 / torch.log2(2 + apart)).abs()
        gains = grades.masked_fill(~present, 0)
        places = torch.arange(2, scores.shape[1] + 2, device=scores.device, dtype=scores.dtype)
        ideal = (gains.sort(1, descending=True).values / torch.log2(places)).sum(1)
        weight = discount * (gains[:, :, None] - gains[:, None, :]).abs() * above
        weight = weight / ideal.clamp(min=torch.finfo(scores.dtype).tiny)[:, None, None]
    losses = torch.nn.functional.softplus(scores[:, None, :] - scores[:, :, None]) / math.log(2)
    return (losses * weight).sum((1, 2))


def listmle(scores: Tensor, grades: Tensor, present: Tensor) -> Tensor:
    """-log-likelihood of an order by grades under Plackett and Luce, a candidate. Arguments as for `ranknet`."""
    below = (grades[:, :, None] >= grades[:, None, :]) & present[:, None, :]
    normaliser = torch.logsumexp(scores[:, None, :].masked_fill(~below, -torch.inf), -1)
    least = grades.masked_fill(~present, torch.inf).amin(1, keepdim=True)
    counted = present & (grades > least)
    losses = (normaliser - scores).masked_fill(~counted, 0)
    return losses.sum(1) / counted.sum(1).clamp(min=1)


ORDER_LOSSES: dict[str, OrderLoss] = {"ranknet": ranknet, "lambdaloss": lambdaloss, "listmle": listmle}


def _above(grades: Tensor, present: Tensor) -> Tensor:
    """bool [R M M]: whether the first candidate has a better grade than the second."""
    both = present[:, :, None] & present[:, None, :]
    return (grades[:, :, None] > grades[:, None, :]) & both

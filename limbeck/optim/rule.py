"""The rule of ASGLD in pure functions: when a step fires, how much noise it adds, how long the step is.

    x <- x - lr psi_t u_t + r phi_t zeta_t,   E||zeta_t||^2 = 1

Numbers on the host, or scalars on an accelerator that nothing waits for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Number = float | Tensor

AUTO_FRACTION = 0.05
"""grad_threshold="auto" is this share of the median of S so far."""
AUTO_DENSE, AUTO_EVERY = 16, 16
"""S enters that median at each of the first steps, then at every so-manieth: the whole gradient is read only there."""


def fires(statistic: Number, threshold: Number, since: int | Tensor, wait: int) -> bool | Tensor:
    """Whether a step fires:  S <= g_thres,  and more than `wait` steps have passed since the last fire."""
    return (statistic <= threshold) & (since > wait)


def phi_gated(fired: bool | Tensor) -> Number:
    """phi of the mode gated: 1 on a fire, else 0."""
    return fired * 1.0


def phi_smooth(statistic: Number, threshold: Number) -> Number:
    """phi of the mode smooth:  max(0, 1 - (S / g_thres)^2)."""
    if isinstance(statistic, Tensor):
        return (1 - (statistic / threshold) ** 2).clamp(min=0).nan_to_num(1.0)
    if statistic <= 0 or threshold <= 0:
        return float(statistic <= 0)
    return max(0.0, 1 - (statistic / threshold) ** 2)


def phi_annealed(step: int, power: float) -> float:
    """phi of the mode annealed:  (1 + t)^(-power / 2)."""
    return (1 + step) ** (-power / 2)


def psi(since: int | Tensor, boost: float, boost_steps: int) -> Number:
    """psi: `boost` in the `boost_steps` steps after a fire, else 1."""
    boosted = (since > 0) & (since <= boost_steps)
    if isinstance(boosted, Tensor):
        return torch.where(boosted, boost, 1.0)
    return float(boost) if boosted else 1.0


def auto_weight(step: int) -> float:
    """What the S of this step weighs in the median of "auto": the steps that it stands for, over all steps so far.

    So each tenfold of steps counts alike. 0 where S does not enter.
    """
    if step < AUTO_DENSE:
        return 1 / (step + 1)
    return 0.0 if step % AUTO_EVERY else AUTO_EVERY / (step + 1)


def next_median(median: Number, total: Number, statistic: Number, weight: float) -> tuple[Number, Number]:
    """The median of S so far over the logarithm of time, taken as a geometric mean:  m <- m (S / m)^(w / (W + w)).

    On the way into a saddle S falls at any learning rate, exponentially, or as 1/t while curvatures of many sizes die
    out one after the other; S over m falls with it, and the gate of "auto" opens. While training goes on, S stays above
    the mini-batches' noise, or falls as a small power t^-p, and S over m only as t^(-p/2): for p = 1/2 it takes 160,000
    steps to a twentieth. A median that forgets would follow S down, and one that counts each step alike is too late
    where the flattest of many curvatures takes most of the steps.

    Args:
      median, total: m and W so far, 0 before the first; S of 0 and what is not finite stay out.
      weight: w, from `auto_weight`.
    Returns: both of them, this S included.
    """
    if isinstance(statistic, Tensor):
        value = statistic.double()
        counts = (value > 0) & value.isfinite()
        after: Number = total + weight * counts
        old = torch.where(torch.as_tensor(total, device=value.device) > 0, median, value)
        moved = old * (torch.where(counts, value, 1.0) / old) ** (weight / after)
        return torch.where(counts, moved, median), after
    if not 0 < statistic < math.inf:
        return median, total
    if not total:
        return statistic, weight
    return median * (statistic / median) ** (weight / (total + weight)), total + weight

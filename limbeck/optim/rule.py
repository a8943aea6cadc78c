"""The rule of ASGLD in pure functions: when a step fires, how much noise it adds, how long the step is.

    x <- x - lr psi_t u_t + r phi_t zeta_t,   E||zeta_t||^2 = 1

Numbers on the host, or scalars on an accelerator that nothing waits for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Number = float | Tensor

AUTO_FRACTION = 0.1
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


def auto_weight(step: int) -> int:
    """Steps that the S of this step stands for in the median of "auto"; 0 where it does not enter."""
    if step < AUTO_DENSE:
        return 1
    return 0 if step % AUTO_EVERY else AUTO_EVERY


def next_median(median: Number, steps: Number, statistic: Number, share: int) -> tuple[Number, Number]:
    """The median of S over all steps so far, taken as its geometric mean, after `share` more steps at this S.

    Where S falls as a power of time, as it does while training goes on, S over it tends to a constant, and the gate of
    "auto" stays shut. Where S falls exponentially, as it does on the way into a saddle at any learning rate, S over it
    falls exponentially too, at half the rate, and the gate opens. A median that forgets would follow S instead.

    Args:
      median, steps: so far, 0 before the first; S of 0 and what is not finite stay out.
    """
    if isinstance(statistic, Tensor):
        value = statistic.double()
        counts = (value > 0) & value.isfinite()
        total: Number = steps + share * counts
        old = torch.where(torch.as_tensor(steps, device=value.device) > 0, median, value)
        moved = old * (torch.where(counts, value, 1.0) / old) ** (share / total)
        return torch.where(counts, moved, median), total
    if not 0 < statistic < math.inf:
        return median, steps
    if not steps:
        return statistic, share
    return median * (statistic / median) ** (share / (steps + share)), steps + share

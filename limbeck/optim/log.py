"""What a training log says of the gate and the noise."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from limbeck.optim.gated import GatedOptimizer
from limbeck.optim.noisy import NoisyOptimizer
from limbeck.optim.settings import WITH_GATE


def noise_columns(optimizer: Optimizer) -> dict[str, Any]:
    """Columns for the log of a step: none for an optimizer without noise.

    Returns: `gate_statistic` (S, a lower bound while the gate is clearly shut; None where it was not measured),
      `gate_threshold` (the gate opens where S reaches it; None without a gate), `fires` (so far) and `noise_norm` (of
      the last noise that was drawn, 0 before the first).
    """
    if not isinstance(optimizer, NoisyOptimizer):
        return {}
    stats = {name: float(value) for name, value in optimizer.stats().items()}
    finite = {name: value if math.isfinite(value) else None for name, value in stats.items()}
    return {
        "gate_statistic": finite["statistic"],
        "gate_threshold": finite["threshold"],
        "fires": int(stats["fires"]),
        "noise_norm": stats["noise_norm"],
    }


def noise_notes(optimizer: Optimizer) -> list[str]:
    """What to say at the end of a run: that the gate never opened, if so."""
    if not isinstance(optimizer, GatedOptimizer) or any(int(group["fires"]) for group in optimizer.param_groups):
        return []
    gated = [group for group in optimizer.param_groups if group["mode"] in WITH_GATE]
    if not gated:
        return []
    threshold = gated[0]["grad_threshold"]
    if threshold == "auto":
        threshold = f"auto, a twentieth of {float(gated[0]['gate_median']):.3g}"
    return [
        f"the gate of {type(optimizer).__name__} never opened (grad_threshold {threshold}): no noise was drawn and no "
        "step boosted, so the run is that of the plain optimizer."
    ]

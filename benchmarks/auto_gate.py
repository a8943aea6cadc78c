"""grad_threshold="auto" beside a fixed threshold and no gate: which saddles are left, and what training it disturbs.

Regime: thirteen saddles, entered by exact gradients along a symmetry that keeps gradient descent there, each with its
step size and with a fifth of it (26 settings, 3 seeds). Noise of radius 0.01 for both gates; the fixed threshold is
0.02. A setting is left when the median run comes halfway down from the saddle within 400 / step size steps.

Bound: 26. Keys: `auto_left`, `fixed_left`, `plain_left` (settings left; reach: auto no fewer than fixed, plain 0),
`auto_over_fixed` (median over settings that both leave of the ratio of steps), `training_fires` (fires in 4,000 steps
of training that meets no saddle, on mini-batches and on exact gradients).
Peers: the fixed threshold, plain descent.

    python benchmarks/auto_gate.py [--quick] [--scratch DIRECTORY] [--out benchmarks/results]
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from _study import Outcome, main

from studies.gate import GATES, GateConfig, left_table, measure, median_steps, training_table

QUICK = ("quartic", "octopus", "factorisation", "pca", "tanh_net")


def run(quick: bool, scratch: Path) -> Outcome:
    """Measure every gate at every saddle."""
    config = GateConfig(saddles=QUICK, num_seeds=3, distance=150.0, training_steps=1_000) if quick else GateConfig()
    result = measure(config, scratch / f"auto_gate-{'quick' if quick else 'full'}.jsonl")
    medians = [{gate: median_steps(way[gate]["steps"]) for gate in GATES} for way in result["ways"]]
    both = [found["auto"] / found["fixed"] for found in medians if math.isfinite(found["auto"] + found["fixed"])]
    keys = {
        "settings": len(medians),
        **{f"{gate}_left": sum(math.isfinite(found[gate]) for found in medians) for gate in GATES},
        "auto_over_fixed": statistics.median(both) if both else None,
        "training_fires": {name: found["fires"] for name, found in result["training"].items()},
    }
    return keys, {"Steps until the saddle is left": left_table(result), "In training": training_table(result)}, []


if __name__ == "__main__":
    main("auto_gate", __doc__ or "", run)

"""Escape time of ASGLD, ASG and AGLD from a strict saddle against dimension: affine in ln d, with theory's slope?

Regime: quartic saddle `-gamma/2 a^2 + gamma/4 a^4 + 0.5 ||y||^2`, gamma = 0.4, lr = 0.5, d = 10 ... 10^6, float32. A
run is one real optimizer on one d-dimensional parameter and starts exactly at the saddle; it has left when |a| >= 0.5.
ASGLD and ASG step on mini-batches whose gradient noise has energy sigma^2 / b in every dimension, AGLD on exact
gradients. 401 seeds (101 at 10^6), the same in every dimension; 101 for the null.

Bound: `median steps = c + ln d / (2 ln(1 + lr gamma))`. Keys per method: `slope_over_predicted` (reach 0.95 to 1.05),
`r_squared` (>= 0.99), `loglog_exponent` of steps against d (< 0.1), `per_coordinate_slope`, the slope per ln d when all
noise has a fixed size per coordinate instead (null: |slope| < 0.2). `gd_num_left` counts dimensions in which noiseless
gradient descent left the saddle within 2,000 steps (0).

Peer: the formula itself, and gradient descent as the control. Further controls with the same keys: `sgd`, plain SGD on
ASGLD's mini-batches, and `jitter_gd`, gradient descent after one kick of AGLD's radius at the start: what gate and
later kicks add to the law is the difference to them.
"""

from __future__ import annotations

from pathlib import Path

from _study import Outcome, main

from studies.escape import EscapeConfig, fit_table, measure, median_table

METHODS = ("asgld", "asg", "agld", "sgd", "jitter_gd")
KEYS = (
    "slope_over_predicted",
    "slope_low",
    "slope_high",
    "predicted_slope",
    "r_squared",
    "loglog_exponent",
    "per_coordinate_slope",
)


def run(quick: bool, scratch: Path) -> Outcome:
    """Measure all methods on the full or the quick grid."""
    if quick:
        dims = (10, 100, 1_000, 10_000)
        config = EscapeConfig(methods=METHODS, dims=dims, num_seeds=101, null_seeds=51, control_steps=500)
    else:
        config = EscapeConfig(methods=METHODS, num_seeds=401, num_seeds_large=101, null_seeds=101)
    result = measure(config, scratch / f"escape-{'quick' if quick else 'full'}.jsonl")
    keys = {f"{name}_{key}": found[key] for name, found in result["methods"].items() for key in KEYS}
    keys["gd_num_left"] = result["control_num_left"]
    return keys, {"Fits": fit_table(result), "Median steps": median_table(result)}, []


if __name__ == "__main__":
    main("escape", __doc__, run)

"""Steps and samples to a second-order point against 1/eps: constant batch, linearly growing batch, full gradients.

Regime: d = 1,000, sigma = 1, two problems that start exactly at a strict saddle with gamma = 1. `quartic`: strongly
convex minima. `valley`: a valley without end whose gradient falls as the square of the distance, near the worst case
for descent. ASGLD with batch 1 and lr = eps^2 (constant), ASGLD with batch 1 + floor(0.02 t) and lr = 0.1 (growing),
AGLD with exact gradients and lr = 0.1 (full). A run has arrived when the full gradient has norm <= eps and Lanczos
finds no eigenvalue below -sqrt(rho eps); each end point is tested again from another start vector
(`second_order_fraction`).

Bound, from the abstract of arXiv:1805.09416, in iterations: at most eps^-4 for a constant batch, eps^-2 for a growing
batch and for full gradients. Keys `<problem>_iterations_exponent_<schedule>` and
`<problem>_samples_exponent_<schedule>` with `_low` and `_high` (95 %), and without a prefix those of the quartic.
Reach: at most 4.2, 2.2 and 2.2 on both problems. Theory for the valley: 3.5, 2 and 1.5 where its length, and not the
escape, decides; samples of a growing batch: twice its iterations' exponent.

Controls: `constant_sgd` and `growing_sgd`, plain SGD on the same mini-batches: what ASGLD is while its gate is shut, as
it is at batch 1; `full_jitter`, gradient descent after one kick at the start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _study import Outcome, main

from studies.rates import RatesConfig, exponent_table, measure, median_table


def run(quick: bool, scratch: Path) -> Outcome:
    """Measure both problems on the full or the quick grid."""
    if quick:
        small = {"num_seeds": 4, "seeds_per_cell": 4, "num_dims": 100}
        quartic = RatesConfig(epsilons=(0.1, 0.05), **small)
        valley = RatesConfig(problem="valley_saddle", epsilons=(0.2, 0.1), **small)
    else:
        quartic = RatesConfig(num_seeds=12, seeds_per_cell=6)
        valley = RatesConfig(problem="valley_saddle", epsilons=(0.2, 0.1, 0.05, 0.035), num_seeds=12, seeds_per_cell=6)
    keys: dict[str, Any] = {}
    tables = {}
    for name, config in {"quartic": quartic, "valley": valley}.items():
        result = measure(config, scratch / f"rates-{name}-{'quick' if quick else 'full'}.jsonl")
        keys |= {f"{name}_{key}": value for key, value in _keys(result).items()}
        tables[f"{name}: exponents of 1/eps"] = exponent_table(result)
        tables[f"{name}: medians"] = median_table(result)
    plain = {key.removeprefix("quartic_"): value for key, value in keys.items() if key.startswith("quartic_")}
    return plain | keys, tables, []


def _keys(result: dict[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for schedule, found in result.items():
        for quantity in ("iterations", "samples"):
            if found[f"{quantity}_exponent"] is None:
                continue
            keys[f"{quantity}_exponent_{schedule}"] = found[f"{quantity}_exponent"]
            low, high = found[f"{quantity}_interval"]
            keys[f"{quantity}_exponent_{schedule}_low"] = low
            keys[f"{quantity}_exponent_{schedule}_high"] = high
        keys[f"arrived_fraction_{schedule}"] = found["arrived_fraction"]
        keys[f"second_order_fraction_{schedule}"] = found["second_order_fraction"]
        keys[f"largest_steps_over_claim_{schedule}"] = max(found["steps_over_claim"].values())
    return keys


if __name__ == "__main__":
    main("rates", __doc__, run)

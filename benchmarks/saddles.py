"""Is the gate worth having? ASGLD against its controls on eight problems that start at, or pass, a saddle.

Regime: four saddles that mini-batch noise leaves (quartic d = 100, octopus d = 10, phase retrieval d = 50, matrix
factorisation 20 x 2) and four starts whose symmetry every single sample's gradient keeps: both factors of a product
zero (lora), units that are copies of each other (cloned_units), two of four trained units pruned to zero
(zeroed_units), a softmax bottleneck at zero. Every method sees the same mini-batches and is tuned alike on 3 seeds (4
step sizes, a factor of 3 apart, widened until the best lies inside, times two variants) and measured on 11 others.
Cost: gradients until the target (within 1 % of the known minimum; 5 % of the way from the plateau to what training
finds), 1,000 steps at most.

Methods: ASGLD with momentum 0.9, grad_threshold="auto" and two radii; the same with the gate snr, which tells a small
gradient from a noisy one by two half-batches. Controls: SGD with momentum 0 and 0.9, Adam, both after one kick at the
start (jitter_), noise at every step (PerturbedSGD), SAM, NEON.

Bound: none. Keys: `wins`, `ties`, `losses` of ASGLD against the control with the lowest median, by whether 95 %
bootstrap intervals of the medians meet (`snr_wins` ... with the gate snr); `verdicts` a problem; `medians` (null: half
the runs or more never arrived); `over_best` the ratio of medians. Peers: the controls.

    python benchmarks/saddles.py [--quick] [--scratch DIRECTORY] [--out benchmarks/results]
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from _study import Outcome, main

from studies.fit import lower_median
from studies.saddles import OTHER, OURS, SaddlesConfig, measure, median_table, settings_table

QUICK: dict[str, Any] = {"lrs": (0.1, 0.3), "widenings": 0, "tune_seeds": 1, "num_seeds": 3, "max_steps": 150}


def run(quick: bool, scratch: Path) -> Outcome:
    """Tune and measure every method on every problem."""
    config = SaddlesConfig(**QUICK) if quick else SaddlesConfig()
    result = measure(config, scratch / f"saddles-{'quick' if quick else 'full'}.jsonl")
    medians = {
        problem: {method: _median(found["gradients"]) for method, found in methods.items()}
        for problem, methods in result["problems"].items()
    }
    keys = {
        **result["counts"][OURS],
        **{f"snr_{word}": number for word, number in result["counts"][OTHER].items()},
        "verdicts": result["verdicts"],
        "medians": {problem: {m: _plain(x) for m, x in found.items()} for problem, found in medians.items()},
        "over_best": {name: {p: _over_best(found, name) for p, found in medians.items()} for name in (OURS, OTHER)},
        "edges": sum(not found["is_inside"] for methods in result["problems"].values() for found in methods.values()),
    }
    return keys, {"Median gradients [95 %]": median_table(result), "Tuned settings": settings_table(result)}, []


def _median(gradients: list[float | None]) -> float:
    return lower_median([math.inf if count is None else count for count in gradients])


def _over_best(medians: dict[str, float], name: str) -> float | None:
    best = min(median for method, median in medians.items() if method not in (OURS, OTHER))
    return _plain(medians[name] / best) if math.isfinite(best) else None


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main("saddles", __doc__ or "", run)

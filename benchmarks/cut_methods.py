"""The cells of the cuts that keep more: each arm at its own learning rate, for the map of `cut_regimes.py`.

An arm takes the rate of lowest held-out loss on whole sequences at seed 0, and is then trained over seeds; cells of
other rates are kept in `results/cut_rates.jsonl`. Costs are those of student, head and what the student writes.

    python benchmarks/cut_methods.py --regime capable --arm "common length 0.5, a tenth whole" --seeds 3
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from _cells import STORE, Cell, Regime, train_cells

RATES_STORE = STORE.with_name("cut_rates.jsonl")
LEAD: dict[str, Any] = {"truncation.lead_fraction": 0.5}
COMMON: dict[str, Any] = {"truncation.policy": "common_length", "truncation.lead_fraction": 0.5}
HORIZON: dict[str, Any] = {"truncation.policy": "random_horizon", "truncation.lead_fraction": 0.5}
ROLLOUTS = {"start_fraction": 0.7, "first_new_tokens": 40, "max_new_tokens": 160, "max_staleness_steps": 4}
ARMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "share 0.5": LEAD,
    "common length 0.5": COMMON,
    "whole at the cost of the half": {"equal_cost": COMMON},
    "common length 0.5, a tenth whole": {**COMMON, "truncation.whole_fraction": 0.1},
    "common length 0.3 to 0.7": {
        "truncation.policy": "common_length",
        "truncation.lead_fraction": 0.3,
        "cut_schedule": {"final_fraction": 0.7},
    },
    "share 0.5, KD at borders": {**LEAD, "supervision.borders": {"ce": "kd"}},
    "share 0.5, no CE at borders": {**LEAD, "supervision.borders": {"ce": "none"}},
    "random horizon 0.5": HORIZON,
    "random horizon 0.5, weights up to 2": {**HORIZON, "truncation.max_weight": 2.0},
    "share 0.4, stop controller": {
        "truncation.lead_fraction": 0.4,
        "stop_control": {"by": 0.1, "most": 0.3, "every_steps": 15},
    },
    "a third of the traces, cut and completed": {"completed": COMMON, "traces.num_traces": 500},
    "rollouts that grow": {**COMMON, "truncation.lead_fraction": 0.35, "on_policy": ROLLOUTS},
    "share 0.5, KD alone": {**LEAD, "loss.kd_ratio": 1.0},
    "common length 0.5, KD alone": {**COMMON, "loss.kd_ratio": 1.0},
    "share 0.5, SFT": {**LEAD, "loss.kd_ratio": 0.0},
    "common length 0.5, SFT": {**COMMON, "loss.kd_ratio": 0.0},
    "common length 0.5, half by student entropy": {
        **COMMON,
        "supervision.select": {"by": "student_entropy", "fraction": 0.5},
    },
    "common length 0.5, half by TIP": {**COMMON, "supervision.select": {"by": "tip", "fraction": 0.5}},
    "common length 0.5, half at random": {**COMMON, "supervision.select": {"by": "random", "fraction": 0.5}},
}
REGIMES = {
    "capable": Regime(),
    "equal lengths": Regime(spread=0.0),
    "novice": Regime(student="tiny-student"),
}


def tuned(regime: Regime, arm: str, rates: list[float], scratch: Path) -> Mapping[str, Any]:
    """The changes of an arm at the best of its rates."""
    cells: list[Cell] = [(regime, arm, {**ARMS[arm], "optimizer.learning_rate": rate}, 0) for rate in rates]
    found = train_cells(cells, scratch, RATES_STORE)
    best: Mapping[str, Any] = min(found, key=lambda line: line["validation_ce"])["changes"]
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regime", choices=REGIMES, action="append")
    parser.add_argument("--arm", choices=ARMS, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, action="append", help="a learning rate to choose from; repeatable")
    parser.add_argument("--scratch", type=Path, default=Path("runs/cells"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.regime or REGIMES:
        for arm in options.arm or ARMS:
            changes = tuned(REGIMES[name], arm, options.rate or [1e-4, 3e-4, 1e-3], options.scratch)
            cells: list[Cell] = [(REGIMES[name], arm, changes, seed) for seed in range(options.seeds)]
            for line in train_cells(cells, options.scratch):
                print(name, arm, line["seed"], f"{line['score']:.3f}", f"{line['flops']:.3g}", flush=True)


if __name__ == "__main__":
    main()

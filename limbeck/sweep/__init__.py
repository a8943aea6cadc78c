"""Many students over a grid; `limbeck.sweep(...)` trains them.

Example:
    from limbeck.config import build
    from limbeck.sweep import SweepConfig, on_frontier, plan_runs

    traces = {"source": "builtin:chain", "num_traces": 9}
    distill = {"student": {"model": "tiny-student"}, "teacher": {"model": "tiny-teacher"}, "traces": traces}
    grid = {"lead_fraction": [0.5, 1.0]}
    sweep = build(SweepConfig, {"distill": distill, "problems": {**traces, "seed": 1}, "grid": grid})
    [run.name for run in plan_runs(sweep)], on_frontier(costs=[1.0, 2.0], qualities=[0.7, 0.6])
"""

from limbeck.lazy import lazy, make_callable

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "CutAdviceConfig": "seen",
        "PlannedRun": "plan",
        "SweepConfig": "plan",
        "on_frontier": "frontier",
        "plan_runs": "plan",
        "predict_sweep": "commands",
        "run_name": "plan",
    },
)
make_callable(__name__)

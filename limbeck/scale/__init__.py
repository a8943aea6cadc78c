"""What runs will cost on other machines; `limbeck.plan(...)` and `limbeck.advise(...)` answer.

Example:
    from limbeck.cost import hardware_of
    from limbeck.scale import AdviseConfig, advice_for

    advice_for(AdviseConfig(model="qwen3-8b", workload="reasoning"), hardware_of("h100")).chosen
"""

from limbeck.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "Advice": "advise",
        "AdviseConfig": "advise",
        "AssumedTraces": "planner",
        "Estimate": "cluster",
        "Load": "cluster",
        "PlanConfig": "planner",
        "Requests": "roofline",
        "Times": "roofline",
        "advice_for": "advise:advise",
        "best_plans": "planner:plan",
        "estimate": "cluster",
        "formats_of": "roofline",
        "times_of": "roofline",
    },
)

"""The views `limbeck plan` and `limbeck advise`, and how a dry run is shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.cost.hardware import Hardware, hardware_of, measure
from limbeck.cost.prediction import Prediction, total
from limbeck.scale import advise as advising
from limbeck.scale.advise import Advice, AdviseConfig
from limbeck.scale.cluster import Estimate
from limbeck.scale.console import assumptions, show_advice, show_plan, show_predictions
from limbeck.scale.planner import PlanConfig, flags_of, from_recipe
from limbeck.scale.planner import run as make_plan
from limbeck.stage import Stage, View

SHOWN_PLANS = 3


def tell(stage: Stage, config: Any, out: Path, *, as_json: bool) -> None:
    """Print what a stage will cost on this machine, part by part; `out` is where it would write."""
    assert stage.predict is not None
    hardware = measure()
    given = stage.predict(config, hardware=hardware)
    found = [given] if isinstance(given, Prediction) else given
    if not as_json:
        show_predictions(found, hardware)
        return
    print(json.dumps({"out": f"{out} (not written)", **as_dict(found)}))


def as_dict(found: Sequence[Prediction]) -> dict[str, Any]:
    """The sum, and its parts under `stages`."""
    whole = total("all", found).as_dict() if len(found) > 1 else found[0].as_dict()
    return {**whole, "stages": [part.as_dict() for part in found]}


class Planned(NamedTuple):
    """The recipe's own settings and the fastest that fit."""

    own: Estimate
    best: list[Estimate]
    flags: list[list[str]]
    """What to add to `limbeck distill RECIPE` for each of them."""
    hardware: Hardware

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        plans = [found.as_dict() | {"flags": words} for found, words in zip(self.best, self.flags, strict=True)]
        assumed = assumptions(self.best[0] if self.best else self.own, self.hardware)
        return {"recipe": self.own.as_dict(), "plans": plans, "assumed": assumed}


def plan(config: PlanConfig) -> Planned:
    """The estimate of a recipe as it is, and of the settings that suit the machines best."""
    hardware = hardware_of(config.hardware)
    if config.efficiency is not None:
        hardware = hardware._replace(efficiency=config.efficiency)
    own, *best = make_plan(config, hardware)
    best = best[:SHOWN_PLANS]
    return Planned(own, best, [flags_of(config.distill, found.config) for found in best], hardware)


def _advice_as_dict(answer: tuple[Advice, Hardware]) -> dict[str, Any]:
    found, hardware = answer
    rows = {name: [row.as_dict() for row in getattr(found, name)] for name in ("formats", "cuts")}
    machine = {**hardware._asdict(), "flops": dict(hardware.flops)}
    return {"take": found.chosen, "reasons": found.reasons, **rows, "hardware": machine}


PLAN = View(
    name="plan",
    config=PlanConfig,
    run=plan,
    show=lambda found: show_plan(found.own, found.best, found.flags, found.hardware),
    as_dict=Planned.as_dict,
    reads=from_recipe,
    refers={"distill": "distill"},
)
ADVISE = View(
    name="advise",
    config=AdviseConfig,
    run=advising.run,
    show=lambda answer: show_advice(*answer),
    as_dict=_advice_as_dict,
    subject="model",
)

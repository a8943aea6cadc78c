"""What the command line calls: dry runs of stages, `limbeck plan` and `limbeck advise`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from limbeck.scale import advise as advising
from limbeck.scale.advise import AdviseConfig
from limbeck.scale.console import assumptions, show_advice, show_plan, show_predictions
from limbeck.scale.hardware import Hardware, hardware_of, measure
from limbeck.scale.planner import PlanConfig, flags_of
from limbeck.scale.planner import run as make_plan
from limbeck.scale.prediction import Prediction, total

SHOWN_PLANS = 3


def dry_run(predict: Callable[[Hardware], Sequence[Prediction]], *, quiet: bool) -> dict[str, Any] | None:
    """Predict on this machine and show the table; with `quiet` return it as plain values instead."""
    hardware = measure()
    found = list(predict(hardware))
    if quiet:
        whole = total("all", found).as_dict() if len(found) > 1 else found[0].as_dict()
        return {**whole, "stages": [part.as_dict() for part in found]}
    show_predictions(found, hardware)
    return None


def plan(config: PlanConfig, *, quiet: bool) -> dict[str, Any] | None:
    """Show the recipe's own settings and the fastest that fit; with `quiet` return them as plain values instead."""
    hardware = hardware_of(config.hardware)
    if config.efficiency is not None:
        hardware = hardware._replace(efficiency=config.efficiency)
    own, *best = make_plan(config, hardware)
    best = best[:SHOWN_PLANS]
    flags = [flags_of(config.distill, found.config) for found in best]
    if quiet:
        plans = [found.as_dict() | {"flags": words} for found, words in zip(best, flags, strict=True)]
        return {"recipe": own.as_dict(), "plans": plans, "assumed": assumptions(best[0] if best else own, hardware)}
    show_plan(own, best, flags, hardware)
    return None


def advise(config: AdviseConfig, *, quiet: bool) -> dict[str, Any] | None:
    """Show formats and cuts with their times and what to take; with `quiet` return them as plain values instead."""
    found, hardware = advising.run(config)
    if quiet:
        rows = {name: [row.as_dict() for row in getattr(found, name)] for name in ("formats", "cuts")}
        machine = {**hardware._asdict(), "flops": dict(hardware.flops)}
        return {"take": found.chosen, "reasons": found.reasons, **rows, "hardware": machine}
    show_advice(found, hardware)
    return None

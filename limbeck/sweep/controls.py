"""What a cut has to be compared with: whole traces at its cost, and for a choice of tokens as many random ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from limbeck.cost.hardware import DEVICES
from limbeck.distill.config import DistillConfig
from limbeck.distill.data import UNCUT
from limbeck.distill.predict import predict_distill

SAME_COST = 0.02
"""Cuts whose costs differ by less than this share have one equal-cost arm together."""


class Cost(NamedTuple):
    """What a run will train on, to the last FLOP of its ledger."""

    tokens: int
    flops: int
    """Of student and head; the teacher's pass is paid once for all runs of a sweep."""


def cost_of(config: DistillConfig, tokenizer: Any) -> Cost:
    """Tokens and FLOPs of a run before it runs."""
    found = predict_distill(config, tokenizer=tokenizer, hardware=DEVICES["laptop-cpu"])
    return Cost(found.tokens, found.flops["student"] + found.flops["head"])


def whole_at_cost(config: DistillConfig, cost: Cost, tokenizer: Any) -> DistillConfig:
    """The same run on whole traces, over fewer of them, at the FLOPs of a cut.

    Args:
      config: the cut, or the whole run; what it does not cut stays.
      cost: that of the cut.
      tokenizer: of the student.
    Returns: a config whose `max_tokens` is as many whole-trace tokens as those FLOPs pay, to within one step.
    """
    whole = replace(config, truncation=UNCUT)
    full = cost_of(whole, tokenizer)
    tokens = max(1, round(full.tokens * cost.flops / full.flops))
    return replace(whole, training=replace(whole.training, max_tokens=tokens, max_steps=None))

"""The settings of the gate and the noise: names, defaults, what cannot work."""

from __future__ import annotations

from typing import Any, Literal

import torch

from limbeck.errors import ConfigError, nearest

Mode = Literal["gated", "smooth", "annealed", "constant"]
Gate = Literal["norm", "ema", "cross", "snr"]
NoiseShape = Literal["gaussian", "sphere", "ball"]
NoiseScale = Literal["energy", "relative", "coordinate"]
LowPrecision = Literal["stochastic", "master", "nearest"]

NEVER = -(2**31)
"""`last_fire` of a group that has not fired."""
AUTO_FRACTION = 0.1
"""grad_threshold="auto" is this share of the running median of S."""
NOISE_DEFAULTS: dict[str, Any] = {
    "grad_threshold": None,
    "noise_radius": None,
    "escape_steps": None,
    "mode": "gated",
    "gate": "norm",
    "gate_beta": 0.9,
    "noise": "gaussian",
    "noise_scale": "energy",
    "step_boost": 1.0,
    "boost_steps": 1,
    "anneal_power": 0.55,
    "noise_steps": None,
    "low_precision": "stochastic",
    "seed": 0,
}
COUNTERS: dict[str, Any] = {
    "noise_step": 0,
    "last_fire": NEVER,
    "fires": 0,
    "gate_weight": 0.0,
    "gate_mean": 0.0,
    "gate_square": 0.0,
    "gate_median": 0.0,
}
CHOICES = {
    "mode": ("gated", "smooth", "annealed", "constant"),
    "gate": ("norm", "ema", "cross", "snr"),
    "noise": ("gaussian", "sphere", "ball"),
    "noise_scale": ("energy", "relative", "coordinate"),
    "low_precision": ("stochastic", "master", "nearest"),
}
WHOLE = ("gate", "gate_beta", "noise", "noise_scale")
"""Settings that cannot differ between groups: they speak of all parameters together."""
LOW_PRECISION = (torch.float16, torch.bfloat16)


def chosen(scope: dict[str, Any]) -> dict[str, Any]:
    """The settings among the local variables of an `__init__` that has assigned none of its own."""
    return {name: value for name, value in scope.items() if name not in ("self", "params", "optimizer", "__class__")}


def check_group(name: str, group: dict[str, Any], needs_radius: bool) -> None:
    """Raise ConfigError for settings that cannot work.

    Args:
      name: of the optimizer, for the message.
      needs_radius: modes without a gate need `noise_radius`.
    """
    for field, known in CHOICES.items():
        if group[field] not in known:
            raise ConfigError(f"{name}: {field} is {group[field]!r}; {nearest(str(group[field]), known)}")
    for field in (
        "noise_radius",
        "escape_steps",
        "noise_steps",
        "boost_steps",
        "step_boost",
        "anneal_power",
        "lr",
    ):
        if group[field] is not None and not group[field] >= 0:
            raise ConfigError(f"{name}: {field} is {group[field]}; it must not be negative.")
    if not 0 <= group["gate_beta"] < 1:
        raise ConfigError(f"{name}: gate_beta is {group['gate_beta']}; it lies in [0, 1).")
    threshold, gated = (
        group["grad_threshold"],
        group["mode"] in ("gated", "smooth") and group["gate"] != "snr",
    )
    if isinstance(threshold, str) and threshold != "auto":
        raise ConfigError(f"{name}: grad_threshold is {threshold!r}; give a number or 'auto'.")
    if gated and threshold is None:
        raise ConfigError(f"{name}: mode={group['mode']!r} needs grad_threshold: a gradient norm, or 'auto'.")
    if isinstance(threshold, int | float) and not (threshold > 0 or (threshold == 0 and group["mode"] == "gated")):
        raise ConfigError(f"{name}: grad_threshold is {threshold}; it must be positive.")
    if needs_radius and not gated and group["noise_radius"] is None:
        raise ConfigError(f"{name}: mode={group['mode']!r} with gate={group['gate']!r} needs noise_radius.")
    if group["noise_scale"] == "coordinate" and group["noise"] != "gaussian":
        raise ConfigError(
            f"{name}: noise={group['noise']!r} has a fixed norm; noise_scale='coordinate' needs noise='gaussian'."
        )

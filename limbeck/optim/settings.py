"""The settings of the gate and the noise: names, defaults, what cannot work."""

from __future__ import annotations

import math
import operator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from limbeck.errors import ConfigError, nearest

Mode = Literal["gated", "smooth", "annealed", "constant"]
Gate = Literal["norm", "ema", "cross", "snr"]
NoiseShape = Literal["gaussian", "sphere", "ball"]
NoiseScale = Literal["energy", "relative", "coordinate"]
LowPrecision = Literal["stochastic", "master", "nearest"]
Threshold = float | Literal["auto"] | None

WITH_GATE = ("gated", "smooth")
"""The modes that measure S; the others add noise at every step."""
NEVER = -(2**31)
"""`last_fire` of a group that has not fired."""
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
}
COUNTERS: dict[str, Any] = {
    "noise_step": 0,
    "last_fire": NEVER,
    "fires": 0,
    "gate_weight": 0.0,
    "gate_mean": 0.0,
    "gate_square": 0.0,
    "gate_median": 0.0,
    "gate_median_weight": 0.0,
    "kick_loss": math.inf,
    "converged": False,
    "thermostat": None,
}
"""What a run changes in its groups, and where it starts; a class has those that it needs."""
CHOICES = {
    "mode": get_args(Mode),
    "gate": get_args(Gate),
    "noise": get_args(NoiseShape),
    "noise_scale": get_args(NoiseScale),
    "low_precision": get_args(LowPrecision),
}
WHOLE = ("gate", "gate_beta", "noise", "noise_scale")
"""Settings that cannot differ between groups: they speak of all parameters together."""
LOW_PRECISION = (torch.float16, torch.bfloat16)
_AT_LEAST_ZERO = (
    "lr",
    "noise_radius",
    "step_boost",
    "anneal_power",
    "momentum",
    "dampening",
    "weight_decay",
    "temperature",
    "eps",
    "loss_drop",
)
_COUNTS = ("escape_steps", "noise_steps", "boost_steps", "adapt_steps")
_MAY_BE_NONE = ("noise_radius", "escape_steps", "noise_steps", "adapt_steps", "loss_drop")
_FLAGS = {**dict.fromkeys(("maximize", "nesterov", "reset_momentum"), (False, True)), "foreach": (None, False, True)}


def check_common(name: str, group: dict[str, Any]) -> None:
    """Refuse values of the wrong type or range, of every setting that the group has.

    Args:
      name: of the optimizer, for the message.
    Raises: ConfigError.
    """
    _check_choices(name, group)
    for field in (*_AT_LEAST_ZERO, *_COUNTS):
        read = whole_number if field in _COUNTS else number
        if _is_given(group, field) and read(name, field, group[field]) < 0:
            raise ConfigError(f"{name}: {field} is {group[field]}; it must not be negative.")
    group["seed"] = whole_number(name, "seed", group["seed"])


def check_gate(name: str, group: dict[str, Any], needs_radius: bool) -> None:
    """Refuse settings of gate and noise that cannot work together.

    Args:
      needs_radius: modes without a gate need `noise_radius`.
    Raises: ConfigError.
    """
    if not 0 <= number(name, "gate_beta", group["gate_beta"]) < 1:
        raise ConfigError(f"{name}: gate_beta is {group['gate_beta']}; it lies in [0, 1).")
    is_gated = group["mode"] in WITH_GATE and group["gate"] != "snr"
    _check_threshold(name, group, is_gated)
    if needs_radius and not is_gated and group["noise_radius"] is None:
        raise ConfigError(f"{name}: mode={group['mode']!r} with gate={group['gate']!r} needs noise_radius.")
    if group["noise_scale"] == "coordinate" and group["noise"] != "gaussian":
        raise ConfigError(
            f"{name}: noise={group['noise']!r} has a fixed norm; noise_scale='coordinate' needs noise='gaussian'."
        )


def check_whole(group: dict[str, Any], first: dict[str, Any]) -> None:
    """Refuse a group that differs from the first where groups cannot differ.

    Raises: ConfigError.
    """
    for name in WHOLE:
        if name in group and group[name] != first[name]:
            raise ConfigError(
                f"{name} is {group[name]!r} in one group and {first[name]!r} in another; it must be the same."
            )


def number(name: str, field: str, value: Any) -> float:
    """`value` as a finite float; a tensor of one element counts.

    Raises: ConfigError.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type != "meta":
        value = value.item()
    if isinstance(value, bool) or not hasattr(value, "__float__") or not math.isfinite(float(value)):
        raise ConfigError(f"{name}: {field} is {value!r}; give a finite number.")
    return float(value)


def whole_number(name: str, field: str, value: Any) -> int:
    """`value` as an int.

    Raises: ConfigError.
    """
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ConfigError(f"{name}: {field} is {value!r}; give a whole number.")


def given(names: dict[str, Any]) -> dict[str, Any]:
    """The settings among the arguments of an `__init__`, from its `locals()`."""
    return {name: value for name, value in names.items() if name not in ("self", "params", "optimizer", "__class__")}


def _check_choices(name: str, group: dict[str, Any]) -> None:
    for field, known in CHOICES.items():
        if field in group and group[field] not in known:
            raise ConfigError(f"{name}: {field} is {group[field]!r}; {nearest(str(group[field]), known)}")
    for field, known in _FLAGS.items():
        if field in group and group[field] not in known:
            raise ConfigError(f"{name}: {field} is {group[field]!r}; give {' or '.join(map(str, known))}.")


def _is_given(group: dict[str, Any], field: str) -> bool:
    return field in group and not (group[field] is None and field in _MAY_BE_NONE)


def _check_threshold(name: str, group: dict[str, Any], is_gated: bool) -> None:
    threshold = group["grad_threshold"]
    if threshold is None:
        if is_gated:
            raise ConfigError(f"{name}: mode={group['mode']!r} needs grad_threshold: a gradient norm, or 'auto'.")
        return
    if isinstance(threshold, str):
        if threshold != "auto":
            raise ConfigError(f"{name}: grad_threshold is {threshold!r}; give a number or 'auto'.")
        return
    value = math.inf if threshold == math.inf else number(name, "grad_threshold", threshold)
    if not (value > 0 or (value == 0 and group["mode"] == "gated")):
        raise ConfigError(f"{name}: grad_threshold is {threshold}; it must be positive.")

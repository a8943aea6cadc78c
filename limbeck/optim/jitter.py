"""One kick before training: the cheapest way off an exact saddle, and the control of every method that kicks later."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.optim.block import noise_names, real_numel
from limbeck.optim.noise import NoiseKey, add_noise_, parameter_id
from limbeck.optim.noisy import checked_seed
from limbeck.optim.seed import agreed_seed
from limbeck.optim.settings import LOW_PRECISION, number
from limbeck.optim.sharding import layout, local


@torch.no_grad()
def jitter_(params: Iterable[Tensor | tuple[str, Tensor]], noise_radius: float, seed: int | None = None) -> None:
    """Move all parameters together, in place:  x <- x + r zeta,  E||zeta||^2 = 1.

    Args:
      params: tensors or (name, tensor) pairs; names key the noise, as in ASGLD. What is frozen stays.
      noise_radius: r.
      seed: None draws one from torch's generator.
    Raises: ConfigError for a radius that is negative, and a seed that is no whole number.

    float16 and bfloat16 are rounded stochastically, so that a kick below their rounding step is not lost.
    """
    if number("jitter_", "noise_radius", noise_radius) < 0:
        raise ConfigError(f"jitter_: noise_radius is {noise_radius}; it must not be negative.")
    items = list(params)
    names, tensors = zip(*items, strict=True) if items and isinstance(items[0], tuple) else ((), items)
    given = checked_seed("jitter_", seed)
    drawn = agreed_seed(tensors) if given is None else given
    keys = noise_names([{"params": tensors, "param_names": names}])[0]
    moving = [(key, p) for key, p in zip(keys, tensors, strict=True) if p.requires_grad]
    std = noise_radius / math.sqrt(max(1, sum(real_numel(p) for _, p in moving)))
    for key, param in moving:
        noise = NoiseKey(drawn, 0, parameter_id(key))
        add_noise_(local(param.detach()), noise, layout(param), std, stochastic=param.dtype in LOW_PRECISION)
